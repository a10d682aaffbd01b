# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels demo``: accelerate, freeze, verify and time models on photographs."""

from __future__ import annotations

import argparse

from . import add_command
from .models import positive

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
        "scikit-learn bring; writes the times as CSV and as a plot.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="(more than one may be given; default: mobilevit_s, mobilevit_xxs)",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for the one --model")
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="of the photographs in pixels (256)")
    parser.add_argument(
        "--batch", type=positive, action="append", metavar="N", help="(more than one may be given; default: 1 and 8)"
    )
    parser.add_argument("--device", metavar="NAME", help="(default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="on the CPU (default: PyTorch's choice)")
    parser.add_argument("--budget", type=float, default=255.0, metavar="S", help="seconds for everything (255)")
    parser.add_argument("--output", default="demo_results", metavar="FOLDER", help="(default: demo_results)")


def run(args: argparse.Namespace) -> int:
    from ..bench.demo import run

    return run(args)
