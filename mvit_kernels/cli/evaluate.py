# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels evaluate``: the figures of a checkpoint on a folder, plain, accelerated or frozen."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import add_command, output_file, print_json, write_json
from .labels import read_names
from .models import (
    BACKENDS,
    DTYPES,
    device_name,
    image_size,
    positive,
    share,
    thread_count,
    three_numbers,
    worker_count,
)
from .train import TASKS

if TYPE_CHECKING:
    from ..training.evaluation import Evaluation

_MOST = 30  # classes that are listed one by one; of more, the worst ten

_EXAMPLES = """\
  mvit-kernels evaluate photos --checkpoint runs/photos/best.pth
  mvit-kernels evaluate photos --checkpoint runs/photos/best.pth --freeze --dtype bfloat16 --output frozen.json
  mvit-kernels evaluate photos --checkpoint runs/photos/best.pth --no-accelerate
  mvit-kernels evaluate imagenet --checkpoint mobilevit_s.safetensors --model mobilevit_s --labels imagenet.json
  mvit-kernels evaluate land_use --checkpoint land_use21.pth --labels class_indices.json --size 224 \\
      --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        summary="accuracy, mAP or mIoU of a checkpoint on a folder",
        description="Scores a checkpoint on the validation samples of a folder, or on all where it has no val/. "
        "Checkpoints of mvit-kernels train know their task, classes, size and normalisation; for others give them.",
        examples=_EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the samples, as for train")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", required=True, help="weights in any layout")
    what = parser.add_argument_group("what is evaluated (default: what the checkpoint says)")
    what.add_argument("--task", choices=TASKS)
    what.add_argument("--model", metavar="NAME", help="as for the other commands")
    what.add_argument("--labels", type=Path, metavar="FILE", help="names of the checkpoint's classes, as for classify")
    what.add_argument("--size", type=image_size, metavar="N|HxW", help="pixels of the network's input")
    what.add_argument(
        "--resize", type=positive, metavar="N", help="short side before the crop (default: size × 256/224)"
    )
    what.add_argument("--mean", type=three_numbers, metavar="R,G,B", help="subtracted from the channels")
    what.add_argument("--std", type=three_numbers, metavar="R,G,B", help="divisors of the channels, after --mean")
    what.add_argument(
        "--validation", type=share, metavar="SHARE", help="the share that train --validation SHARE holds back"
    )
    what.add_argument("--annotations", type=Path, metavar="FILE", help="COCO boxes that are not in DIR (detection)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--freeze", action="store_true", help="evaluate the frozen model")
    how.add_argument("--no-accelerate", action="store_true", help="plain PyTorch, to compare")
    how.add_argument("--backend", choices=BACKENDS, default="auto", help="that must serve the model")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: float32)")
    how.add_argument("--batch", type=positive, metavar="N", help="images a call (default: the recipe's)")
    how.add_argument(
        "--device", type=device_name, metavar="NAME", default="auto", help="cpu, cuda or cuda:N (default: a GPU if any)"
    )
    how.add_argument(
        "--workers", type=worker_count, metavar="N", help="processes that load images (default: processors)"
    )
    how.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: PyTorch's choice)")
    result = parser.add_argument_group("result")
    result.add_argument("--json", action="store_true", help="print every figure as JSON, and nothing else")
    result.add_argument("--output", type=output_file, metavar="FILE", help="write every figure to FILE as JSON")
    result.add_argument(
        "--confusion", type=output_file, metavar="FILE", help="write the confusion matrix to FILE.csv and FILE.png"
    )


def run(args: argparse.Namespace) -> int:
    if args.freeze and args.no_accelerate:
        raise ValueError("--freeze and --no-accelerate exclude each other: a frozen model runs on the operators")
    labels = read_names(args.labels)

    import torch

    from ..training.evaluation import evaluate
    from ..training.loop import Settings
    from ..training.outputs import write_confusion

    if args.threads:
        torch.set_num_threads(args.threads)
    changes: dict[str, Any] = {
        key: getattr(args, key) for key in ("model", "resize", "batch") if getattr(args, key) is not None
    }
    changes |= {key: list(getattr(args, key)) for key in ("size", "mean", "std") if getattr(args, key) is not None}
    result = evaluate(
        args.folder,
        args.checkpoint,
        task=args.task,
        changes=changes,
        labels=labels,
        frozen=args.freeze,
        dtype=getattr(torch, args.dtype),
        settings=Settings(
            device=args.device,
            workers=args.workers,
            accelerate=not args.no_accelerate,
            backend=None if args.backend == "auto" else args.backend,
            validation=args.validation,
            annotations=args.annotations,
        ),
    )
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    form = "frozen" if args.freeze else "plain PyTorch" if args.no_accelerate else "accelerated"
    about = {"checkpoint": str(args.checkpoint), "folder": str(args.folder), "form": form, "dtype": args.dtype}
    counted = {"samples": result.samples, "seconds": result.seconds, "classes": list(result.classes)}
    data = {**about, **counted, "remarks": list(result.remarks), **result.figures}
    if args.json:
        print_json(data)
    else:
        print(f"{args.checkpoint}, {form}, {args.dtype}: {result.samples} samples in {result.seconds:.1f} s")
        print(_text(result))
    if args.output:
        write_json(args.output, data)
    if args.confusion and "confusion" in result.figures:
        write_confusion(args.confusion, result.figures["confusion"], result.classes)
    return 0


def _text(result: Evaluation) -> str:
    lines = [f"  {remark}" for remark in result.remarks]
    lines += [f"  {name:<12} {value:.4f}" for name, value in result.figures.items() if isinstance(value, int | float)]
    each = result.figures.get("per_class")
    if isinstance(each, list) and len(each) == len(result.classes):
        rows = [(value, name) for value, name in zip(each, result.classes, strict=True) if value is not None]
        if len(rows) > _MOST:
            rows = sorted(rows)[:10]
            lines.append("  the ten worst classes:")
        width = max((len(name) for _, name in rows), default=0)
        lines += [f"    {name:<{width}}  {value:7.2%}" for value, name in rows]
    return "\n".join(lines)
