# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels export``: a model as a file for another runtime, compared with the model once it is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import add_command, output_file, print_json
from .models import add_name_arguments, image_size, positive

TARGETS = ("onnx", "openvino", "coreml", "ncnn", "litert", "executorch", "torch", "aotinductor")
_DTYPES = ("float32", "float16", "bfloat16")
_EXAMPLES = """\
  mvit-kernels export --model mobilevit_s --pretrained --output mobilevit_s.onnx
  mvit-kernels export --checkpoint runs/photos/best.pth --size dynamic --output photos.onnx
  mvit-kernels export --model own/xxs --output xxs.xml --dtype float16
  mvit-kernels export --model apple/mobilevit-small --size 224 256 --output small.mlpackage

The exit code is 0, or 2 where the file is not right, and then it is not left there."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "export",
        run,
        summary="write a model for ONNX Runtime, OpenVINO, Core ML, ncnn and others, and check the file",
        description="Writes a model for another runtime, with batch norms folded, then runs the file on random images "
        "and photographs and compares it with the model.",
        examples=_EXAMPLES,
    )
    add_name_arguments(parser)
    what = parser.add_argument_group("what is written")
    what.add_argument(
        "--output", type=_place, required=True, metavar="FILE", help="the file; its suffix says the format"
    )
    what.add_argument("--target", choices=TARGETS, help="the format (default: that of FILE's suffix)")
    what.add_argument(
        "--size",
        type=_size,
        nargs="+",
        metavar="N|HxW",
        help="size of the images in pixels; several for a file that takes several; or dynamic for any (default: 256)",
    )
    what.add_argument(
        "--batch",
        type=_batch,
        metavar="N",
        help="images per call, or dynamic for any number (default: dynamic where that costs no time, else 1)",
    )
    what.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="dtype of weights and arithmetic (default: float32)"
    )
    what.add_argument("--opset", type=positive, metavar="N", help="of ONNX's operators: 18 or 23 (default: 18)")
    what.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import export
    from ..zoo import load

    sizes = args.size
    if sizes is not None and "dynamic" in sizes:
        if len(sizes) > 1:
            raise ValueError("--size: dynamic is any size; give it alone, or sizes without it")
        sizes = "dynamic"
    report = export(
        load(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint),
        args.output,
        target=args.target,
        sizes=sizes,
        batch=args.batch,
        dtype=getattr(torch, args.dtype),
        opset=args.opset,
    )
    if args.json:
        print_json(report.as_dict())
    else:
        print(report)
    return 0


def _place(text: str) -> Path:
    """Argument type: what is to be written. Core ML's files are folders, of which a new one replaces an old one."""
    path = Path(text)
    return path if path.suffix == ".mlpackage" and path.is_dir() else output_file(text)


def _size(text: str) -> str | tuple[int, int]:
    return text if text == "dynamic" else image_size(text)


def _batch(text: str) -> str | int:
    return text if text == "dynamic" else positive(text)
