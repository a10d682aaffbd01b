# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels verify``: the errors of the fast path and of PyTorch's own path, both against float64."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import add_command, add_result_arguments, print_json, write_rows
from .models import add_model_arguments, check_size, load_model, random_images

if TYPE_CHECKING:
    from torch import Tensor

_EXAMPLES = """\
  mvit-kernels verify --model mobilevit_s
  mvit-kernels verify --model apple/mobilevit-small --size 250x270 --gradients
  mvit-kernels verify --model own/xxs --dtype bfloat16 --frozen --output errors.csv
  mvit-kernels verify --checkpoint my.pth --size 224 --image cat.jpg dog.jpg

The exit code is 0 if every error is allowed, 1 if one is not or nothing is accelerated, 2 for any other error."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "verify",
        run,
        summary="check the numerical errors of every block and of the output",
        description="Runs a model accelerated and in plain PyTorch, and compares both with float64: every block and "
        "the output. Allowed is twice PyTorch's own error plus a band for rounding.",
        examples=_EXAMPLES,
    )
    add_model_arguments(parser)
    what = parser.add_argument_group("what is verified")
    what.add_argument(
        "--image",
        nargs="+",
        metavar="FILE",
        default=[],
        help="use these photos, cropped to --size, instead of random images",
    )
    what.add_argument("--frozen", action="store_true", help="verify the frozen copy instead of the accelerated model")
    what.add_argument(
        "--gradients", action="store_true", help="verify the gradient of every parameter instead of the blocks' outputs"
    )
    add_result_arguments(parser.add_argument_group("result"), "the errors")


def run(args: argparse.Namespace) -> int:
    if args.frozen and args.gradients:
        raise ValueError("--frozen and --gradients exclude each other: a frozen model is for inference only")
    from .. import accelerate, freeze, report, verify
    from ..verification import nothing_accelerated

    check_size(args)
    images = _photos(args) if args.image else None
    model = accelerate(load_model(args), backend=args.backend)
    example = random_images(args) if images is None else images.to(next(model.parameters()))
    swapped = report(model)
    idle = "" if args.frozen else nothing_accelerated(swapped, args.gradients)
    if idle:
        print(f"{swapped}\nmvit-kernels: {idle}", file=sys.stderr)
        return 1
    told: list[object] = [swapped]
    if args.frozen:
        frozen = freeze(model)
        told.append(frozen.freeze_report)
        result = verify(frozen, example, reference=model)
    else:
        result = verify(model, example, gradients=args.gradients)
    if not args.json:
        print(*told, result, sep="\n")

    settings = {
        "model": args.model or f"own/{model.mode}",
        "checkpoint": str(args.checkpoint or ""),
        "size": "x".join(map(str, args.size)),
        "batch": len(example),
        "dtype": args.dtype,
        "device": args.device,
        "backend": args.backend,
        "frozen": args.frozen,
    }
    rows = [{**row._asdict(), "ok": row.ok} for row in result.rows]
    data = {**settings, "ok": result.ok, "rows": rows}
    write_rows(args.output, [{**settings, **row} for row in rows], data)
    if args.json:
        print_json(data)
    return 0 if result.ok else 1


def _photos(args: argparse.Namespace) -> Tensor:
    """The photos of --image, (number, 3, H, W), float32."""
    import torch

    from ..zoo.images import load_image, preprocess

    return torch.stack([preprocess(load_image(path), args.size) for path in args.image])
