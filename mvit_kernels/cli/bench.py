# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels bench``: a model in eager, accelerated, frozen and compiled form, checked and timed in turns."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .._utils.freed_memory import keep_freed_memory
from ..zoo import load
from . import add_command, output_file, write_csv, write_json
from .models import add_model_arguments, random_images

if TYPE_CHECKING:
    from ..bench.peers import Subject

_PEERS = "eager,channels_last,accelerated,frozen"

_EXAMPLES = """\
  mvit-kernels bench --model mobilevit_s
  mvit-kernels bench --model apple/mobilevit-small --batch 8 --peers eager,accelerated,frozen,compile
  mvit-kernels bench --model own/xxs --train --csv training.csv
  mvit-kernels bench --model mobilevit_xs --device cuda --dtype bfloat16 --peers all --json xs.json
  mvit-kernels bench --suite all --budget 30
  mvit-kernels bench --suite operators --device cuda --budget 3 --results here

The exit code is 1 if the error of accelerated or frozen is more than allowed, 2 for any other error."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="speedup over PyTorch, in milliseconds per call",
        description="Times a model in several forms. Each is first compared with float64, and not timed if its\n"
        "error is more than twice PyTorch's own plus a band for rounding. Then all take turns in one\n"
        "process; times are medians with the 20th and 80th percentile, ratios are to eager: above 1 is\n"
        "faster. In training, --dtype bfloat16 and float16 mean autocast, else weights of that dtype.",
        examples=_EXAMPLES,
    )
    add_model_arguments(parser)
    suites = parser.add_argument_group("suites, instead of one model: they choose models, batches and peers themselves")
    suites.add_argument(
        "--suite",
        metavar="A,B,…",
        help="operators, blocks, models, training, mobile (MobileNetV2 and MobileViT, 100 runs at batch 1), or all",
    )
    suites.add_argument(
        "--budget",
        type=_number,
        metavar="MIN",
        default=10.0,
        help="minutes for all suites together, the most valuable cases first (default: 10)",
    )
    suites.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="append the rows to FOLDER/<suite>.csv (default: benchmarks/results/<device>, in the current folder)",
    )
    suites.add_argument("--resume", action="store_true", help="skip what the files already have from this commit")
    suites.add_argument("--dry-run", action="store_true", help="list the cases in their order without measuring")
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--peers",
        metavar="A,B,…",
        default=None,
        help=f"the candidates; eager is always included (default: {_PEERS}, without frozen in training). "
        "Known are eager, channels_last, accelerated, frozen, compile, compile_channels_last, "
        "compile_reduce_overhead, compile_max_autotune, "
        "compile_freezing, compile_accelerated, onnxruntime, openvino, openvino_by_image, or all",
    )
    what.add_argument("--train", action="store_true", help="measure forward and backward instead of inference")
    what.add_argument(
        "--seconds",
        type=_number,
        metavar="S",
        default=10.0,
        help="measuring time of all candidates together (default: 10)",
    )
    what.add_argument(
        "--build-seconds",
        type=_number,
        metavar="S",
        help="give up a candidate that takes longer to be built or compiled (default: never)",
    )
    what.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="do not measure peak memory; on the CPU, measuring it builds each candidate once more",
    )
    what.add_argument("--csv", type=output_file, metavar="FILE", help="write the table to FILE, one line per candidate")
    what.add_argument("--json", type=output_file, metavar="FILE", help="write the table to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()  # for all candidates alike; rows say so
    return _run_model(args) if args.suite is None else _run_suites(args)


def _run_suites(args: argparse.Namespace) -> int:
    import torch

    from ..bench.origin import environment, folder_name
    from ..bench.suites import SUITES, check_suites, run
    from ..zoo import checked_device

    if args.model or args.peers or args.csv or args.json:
        raise ValueError(
            "--suite chooses models and peers, and names its files itself: leave out --model, --peers, --csv and --json"
        )
    names = check_suites(args.suite.split(","))
    device = checked_device(args.device).type
    if args.dry_run:
        for name in names:
            for case in SUITES[name].cases(device):
                print(f"{name}: {case.name}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.results or Path("benchmarks", "results", folder_name(environment(device)))
    folder.mkdir(parents=True, exist_ok=True)  # before any work is done
    start = time.perf_counter()

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", flush=True)

    right = run(names, device=device, minutes=args.budget, folder=folder, resume=args.resume, progress=progress)
    return 0 if right else 1


def _run_model(args: argparse.Namespace) -> int:
    import torch

    from ..bench.comparison import compare
    from ..bench.origin import environment
    from ..bench.peers import PEERS, Subject, check_peers
    from ..bench.tables import csv_rows, table

    peers = args.peers
    if peers is None:
        peers = ",".join(n for n in _PEERS.split(",") if not (args.train and n == "frozen"))
    if not peers.strip(","):
        raise ValueError("--peers names no candidate; see mvit-kernels bench --help for the list")
    peers = check_peers(filter(None, peers.split(",")), args.train)
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = subject_of(args, Subject)
    name = args.model or f"own/{subject.model.mode}"

    start = time.perf_counter()

    def progress(step: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {step}", file=sys.stderr, flush=True)

    results = compare(
        subject,
        peers,
        seconds=args.seconds,
        build_seconds=args.build_seconds,
        memory=args.memory,
        progress=progress,
    )
    origin = environment(args.device)
    kind = "training" if args.train else "inference"
    size = "x".join(map(str, args.size))
    print(f"{name}, {kind}, batch {args.batch}, {size} px, {args.dtype}, torch {origin['torch']}, ", end="")
    print(f"{origin['device_name']}, threads: {origin['threads']}")
    print(table(results))
    rows = csv_rows(results, subject, name, origin)
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        write_json(args.json, rows)
    wrong = [r for r in results if PEERS[r.candidate].ours and r.row is not None and not r.row.ok]
    return 1 if wrong else 0


def subject_of(args: argparse.Namespace, subject_class: type[Subject]) -> Subject:
    """The `peers.Subject` that the arguments of `add_model_arguments` ask for."""
    import torch

    model = load(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint, device=args.device)
    return subject_class(
        model,
        random_images(argparse.Namespace(**{**vars(args), "dtype": "float32"})),
        getattr(torch, args.dtype),
        None if args.backend == "auto" else args.backend,
        getattr(args, "train", False),
    )


def _number(text: str) -> float:
    """Argument type: a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
