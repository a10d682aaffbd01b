# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels profile``: a model's time by category, in eager, accelerated and frozen form."""

from __future__ import annotations

import argparse
import functools
import os

from . import add_command, add_result_arguments, print_json, write_rows
from .measuring import subject_of
from .models import add_model_arguments, positive

_EXAMPLES = """\
  mvit-kernels profile --model mobilevit_s
  mvit-kernels profile --model own/xs --batch 8 --peers eager,frozen --operators 10
  mvit-kernels profile --model apple/mobilevit-small --device cuda --dtype bfloat16 --output profile.csv"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "profile",
        run,
        summary="time by category, before and after accelerate and freeze",
        description="Profiles a model eager, accelerated and frozen: convolution, linear, attention, norm and\n"
        "activation, layout copies, launch gaps (the time between operators). The profiler itself\n"
        "costs some microseconds per operator: to compare speed, use bench.",
        examples=_EXAMPLES,
    )
    add_model_arguments(parser)
    what = parser.add_argument_group("what is profiled")
    what.add_argument(
        "--peers",
        metavar="A,B,…",
        default="eager,accelerated,frozen",
        help="the forms of the model, as bench knows them (default: eager,accelerated,frozen)",
    )
    what.add_argument("--calls", type=positive, metavar="N", default=5, help="average over N calls (default: 5)")
    what.add_argument("--operators", type=positive, metavar="N", help="also list the N slowest operators of each form")
    add_result_arguments(parser.add_argument_group("result"), "the times by category")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch 2.13's profiler logs its start and stop on stderr
    import torch

    from ..bench.origin import environment
    from ..bench.peers import PEERS, Subject, check_peers
    from ..bench.profiling import table, time_by_category

    names = [name for name in args.peers.split(",") if name]
    check_peers(names)
    if not names:
        raise ValueError("--peers names no form of the model; see mvit-kernels bench --help for the list")
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = subject_of(args, Subject)
    profiles = {}
    with torch.no_grad():
        for name in names if "all" not in names else PEERS:
            model, images = PEERS[name].build(subject)
            profiles[name] = time_by_category(functools.partial(model, images), calls=args.calls, device=args.device)

    settings = {
        "model": args.model or f"own/{subject.model.mode}",
        "size": "x".join(map(str, args.size)),
        "batch": args.batch,
        "dtype": args.dtype,
        "backend": args.backend,
    }
    rows = [
        {**settings, "candidate": name, "category": category, "ms": round(ms, 4), **environment(args.device)}
        for name, one in profiles.items()
        for category, ms in one.categories.items()
    ]
    write_rows(args.output, rows, rows)
    if args.json:
        print_json(rows)
        return 0
    print(table(profiles))
    for name, one in profiles.items() if args.operators else ():
        print(f"\n{name}")
        for operator in one.operators[: args.operators]:
            print(f"{operator.ms:10.3f} ms  {operator.count:5.0f} ×  {operator.name}  ({operator.category})")
    return 0
