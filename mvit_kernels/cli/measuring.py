# SPDX-License-Identifier: Apache-2.0
"""What ``mvit-kernels bench`` does with its arguments, by use: one function each, from arguments to an exit code."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..zoo import checked_device, load
from . import print_json, write_rows
from .models import random_images

if TYPE_CHECKING:
    from ..bench.changes import Change
    from ..bench.peers import Subject
    from ..bench.suites.selection import Selection

DEFAULT_PEERS = "eager,channels_last,accelerated,frozen"
SIZES = "num_heads patch_size inner hidden out_features layers stride dilation residual activation".split()
COMMITS = Path("build", "commits")


def run_model(args: argparse.Namespace) -> int:
    """Time one model in several forms."""
    import torch

    from ..bench.comparison import compare
    from ..bench.origin import environment
    from ..bench.peers import PEERS, Subject, check_peers
    from ..bench.tables import csv_rows, table

    args.size, args.batch = args.size or (256, 256), args.batch or 1
    args.dtype, args.device, args.backend = args.dtype or "float32", args.device or "cpu", args.backend or "auto"
    peers = args.peers
    if peers is None:
        peers = ",".join(name for name in DEFAULT_PEERS.split(",") if not (args.train and name == "frozen"))
    if not peers.strip(","):
        raise ValueError("--peers names no candidate; see mvit-kernels bench --help for the list")
    peers = check_peers(filter(None, peers.split(",")), args.train)
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = subject_of(args, Subject)
    name = args.model or f"own/{subject.model.mode}"
    results = compare(
        subject,
        peers,
        seconds=args.seconds or 10.0,
        build_seconds=args.build_seconds,
        memory=not args.no_memory,
        progress=_progress(sys.stderr),
    )
    origin = environment(args.device)
    kind = "training" if args.train else "inference"
    size = "x".join(map(str, args.size))
    about = f"{name}, {kind}, batch {args.batch}, {size} px, {args.dtype}"
    _show(args, f"{about}, {_place(origin)}\n{table(results)}", csv_rows(results, subject, name, origin), about)
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


def run_operator(args: argparse.Namespace) -> int:
    """Time one operator at a shape of the user's own."""
    import torch

    from ..backends.library import SCHEMAS
    from ..bench.origin import environment
    from ..bench.suites import OURS
    from ..bench.suites._case import Context
    from ..bench.suites.operands import OPERATORS, check_call
    from ..bench.suites.operators import OwnShape, results_of
    from ..bench.tables import rows_of, table

    if len(args.operator) > 1:
        raise ValueError(f"--shape is that of one operator; --operator names {len(args.operator)}")
    (operator,) = args.operator
    if operator not in OPERATORS:
        raise ValueError(f"--operator: unknown operator {operator!r}; choose from {', '.join(sorted(OPERATORS))}")
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) not in (None, False)}
    if sizes.get("activation") == "none":
        sizes["activation"] = None
    try:
        check_call(operator, args.shape, **sizes)
    except ValueError as error:
        raise ValueError(str(error).replace("num_heads", "heads")) from None
    if args.train and f"{operator}_backward" not in SCHEMAS and operator != "transformer":
        raise ValueError(f"--train: {operator} is for inference only and has no gradient")
    _check_memory(args.shape)
    device = checked_device(args.device or "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peers is not None and not args.peers.strip(","):
        raise ValueError("--peers names no candidate")
    backend = None if args.backend in (None, "auto") else args.backend
    context = Context(
        str(device),
        "",
        seconds=args.seconds or 10.0,
        backend=backend,
        peers=None if args.peers in (None, "all") else tuple(filter(None, args.peers.split(","))),
        build_seconds=args.build_seconds,
        progress=_progress(sys.stderr),
    )
    setting = OwnShape(operator, args.shape, sizes, args.dtype or "float32", args.train)
    results, case = results_of(setting, context)
    work = case.training_work if args.train else case.work
    origin = environment(device)
    identity = setting.subject | {"backend": backend or "auto"}
    rows = rows_of(results, origin, work=work, ceilings=context.ceilings(getattr(torch, setting.dtype)), **identity)
    amount = f"{work.gflop:.3g} GFLOP of products and {work.megabytes:.3g} MB a call"
    _show(args, f"{setting.name}, {_place(origin)}\n{amount}\n{table(results)}", rows, setting.name)
    wrong = [r for r in results if r.candidate in (*OURS, "reference") and r.row is not None and not r.row.ok]
    return 1 if wrong else 0


def _check_memory(shape: Sequence[int]) -> None:
    """Refuse a map that float64 and its gradients would not fit for: Linux kills the process when it is written to."""
    gigabytes = 16 * 8 * math.prod(shape) / 1e9  # some sixteen maps in float64: q, k, v, hidden rows, gradients
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else gigabytes * 2
    if gigabytes > memory:
        raise ValueError(
            f"--shape {','.join(map(str, shape))}: the float64 check takes some {gigabytes:.3g} GB, and this machine "
            f"has {memory:.3g} GB; give a smaller shape"
        )


# --------------------------------------------------------------------------------------------------------------- suites


def run_suite(args: argparse.Namespace) -> int:
    """Measure suites within a budget; or list their cases."""
    import torch

    from .. import backends
    from ..bench.origin import environment, folder_name
    from ..bench.suites import cases_of, check_suites, run

    names = check_suites(args.suite)
    device = checked_device(args.device or "cpu").type
    selection = _selection(args)
    backend = None if args.backend in (None, "auto") else args.backend
    if backend and (why := backends.unavailable(backend, device)):
        raise ValueError(f"--backend {backend} cannot run here: {'; '.join(why)}")
    chosen = cases_of(names, device, selection)
    if args.seconds and "mobile" in chosen:
        raise ValueError("--seconds: the suite mobile makes 100 runs, by the paper's protocol; name the other suites")
    if args.dry_run:
        if args.json:
            print_json([{"suite": name, "case": case.name} | case.subject for name in chosen for case in chosen[name]])
        else:
            print("\n".join(f"{name}: {case.name}" for name in chosen for case in chosen[name]))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.results or Path("benchmarks", "results", folder_name(environment(device)))
    rows: list[Any] = []
    try:
        right = run(
            names,
            device=device,
            minutes=args.budget or 10.0,
            folder=folder,
            resume=args.resume,
            selection=selection,
            seconds=args.seconds,
            backend=backend,
            memory=not args.no_memory,
            measured=rows.extend,
            progress=_progress(sys.stderr if args.json else sys.stdout, digits=0),
        )
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is in {folder}. To go on: {_again()}", file=sys.stderr)
        raise
    if args.json:
        print_json(rows)
    return 0 if right else 1


def _again() -> str:
    """The command that goes on with an interrupted one."""
    words = sys.argv[1:]
    if words[:1] != ["bench"]:  # called from Python
        return "the same command with --resume"
    return shlex.join(["mvit-kernels", *words, *["--resume"] * ("--resume" not in words)])


def _selection(args: argparse.Namespace) -> Selection:
    """What the arguments select among cases or rows."""
    from ..bench.suites.selection import Selection

    return Selection(
        operator=args.operator or (),
        model=tuple(filter(None, (args.model or "").split(","))),
        stage=args.stage or (),
        dtype=(args.dtype,) if args.dtype else (),
        batch=(str(args.batch),) if args.batch else (),
        size=("x".join(map(str, dict.fromkeys(args.size))),) if args.size else (),
        training=args.train,
    )


# ------------------------------------------------------------------------------------------------------------ comparing


def run_compare(args: argparse.Namespace) -> int:
    """Tell what changed between two sets of results."""
    from ..bench.changes import changes, load
    from ..bench.suites.selection import select

    root = args.results or Path("benchmarks", "results")
    selection = _selection(args)
    old, new = (select(load(what, root), selection, what) for what in args.compare)
    found = changes(old, new, absolute=args.absolute, least=args.least or 3.0)
    return _show_changes(args, found, "the two have no row with the same subject, candidate and device")


def run_commits(args: argparse.Namespace) -> int:
    """Measure two commits in turns, and tell what changed."""
    from ..bench.changes import changes
    from ..bench.commits import ROUNDS, measure

    old, new = measure(
        *args.compare_commits,
        names=args.suite or ("operators",),
        minutes=args.budget or 10.0,
        folder=args.results or COMMITS,
        device=checked_device(args.device or "cpu").type,
        rounds=args.rounds or ROUNDS,
        seconds=args.seconds,
        threads=args.threads,
        selection=_selection(args),
        progress=_progress(sys.stderr),
    )
    found = changes(old, new, absolute=args.absolute, least=args.least or 3.0)
    return _show_changes(args, found, "no case was measured in both commits")


def _show_changes(args: argparse.Namespace, found: list[Change], none: str) -> int:
    from ..bench.changes import report
    from ..bench.plots import draw_changes

    if not found:
        raise ValueError(none)
    rows = [change.columns for change in found if args.all or change.verdict != "same" or args.json or args.output]
    if args.plot:
        draw_changes(found, args.plot)
    _write(args, rows, report(found, args.all))
    return 0


# -------------------------------------------------------------------------------------------------------------- showing


def _show(args: argparse.Namespace, text: str, rows: list[Any], title: str) -> None:
    """Print the table or its rows as JSON; write and draw it where that was asked for."""
    from ..bench.plots import draw_table

    if args.plot:
        draw_table(rows, title, args.plot)
    _write(args, rows, text)


def _write(args: argparse.Namespace, rows: list[Any], text: str) -> None:
    write_rows(args.output, rows, rows)  # before what a closed pipe may end
    if args.json:
        print_json(rows)
    else:
        print(text)


def _progress(stream: Any, digits: int = 1) -> Callable[[str], None]:
    start = time.perf_counter()

    def progress(step: str) -> None:
        print(f"{time.perf_counter() - start:6.{digits}f} s  {step}", file=stream, flush=True)

    return progress


def _place(origin: dict[str, str]) -> str:
    return f"torch {origin['torch']}, {origin['device_name']}, threads: {origin['threads']}"
