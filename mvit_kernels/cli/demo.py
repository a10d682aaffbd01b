# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels demo``: accelerate, freeze, verify and time models on photographs."""

from __future__ import annotations

import argparse

from . import add_command
from .models import device_name, positive, thread_count

_EXAMPLES = """\
  mvit-kernels demo
  mvit-kernels demo --model own/xs --batch 4 --budget 60 --output /tmp/demo"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "demo",
        run,
        summary="accelerate, freeze, verify and time models on photographs",
        description="Accelerates, freezes, verifies and times MobileViT on photographs that matplotlib and "
        "scikit-learn ship; writes the times as CSV and as a plot.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="a model; may be repeated (default: mobilevit_s, mobilevit_xxs)",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for the one --model")
    parser.add_argument(
        "--size", type=positive, default=256, metavar="N", help="size of the photographs in pixels (default: 256)"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        action="append",
        metavar="N",
        help="images per call; may be repeated (default: 1 and 8; on a GPU 1 and 64)",
    )
    parser.add_argument(
        "--device",
        type=device_name,
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="number of CPU threads (default: PyTorch's choice, or 1 on a busy machine)",
    )
    parser.add_argument(
        "--budget", type=float, default=255.0, metavar="S", help="seconds for everything (default: 255)"
    )
    parser.add_argument(
        "--output",
        default="demo_results",
        metavar="FOLDER",
        help="folder for the table and the plot (default: demo_results)",
    )


def run(args: argparse.Namespace) -> int:
    from ..bench.demo import run

    return run(args)
