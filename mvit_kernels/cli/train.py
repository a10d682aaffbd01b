# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels train``: train or fine-tune a classifier, a detector or a segmentation network on a folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.freed_memory import keep_freed_memory
from . import add_command
from .labels import read_names
from .models import BACKENDS, device_name, image_size, positive, share, thread_count, worker_count

if TYPE_CHECKING:
    from ..training.loop import Summary
    from ..training.recipe import Recipe

TASKS = ("classification", "detection", "segmentation")
_DEFAULTS = dict(zip(TASKS, ("finetune", "ssdlite_finetune", "deeplabv3_finetune"), strict=True))

_EXAMPLES = """\
  mvit-kernels train photos --checkpoint mobilevit_xxs.pth              photos/<class>/*.jpg, a fifth held back
  mvit-kernels train photos --model mobilevit_s --pretrained --epochs 30 --output runs/s
  mvit-kernels train photos --resume --output runs/s                    goes on exactly where it was killed
  mvit-kernels train photos --recipe xxs --set accumulate=8             the paper's recipe, from scratch
  mvit-kernels train voc --task detection --checkpoint mobilevit_xs.pth
  torchrun --nproc_per_node 8 -m mvit_kernels train imagenet --recipe s --sync-batch-norm

Recipes are files: xxs, xs and s (classification as published), ssdlite, deeplabv3 (as published), and finetune,
ssdlite_finetune and deeplabv3_finetune (the defaults). Each run writes its own as recipe.yaml, to be edited and
given by --recipe ./recipe.yaml. The exit code is 2 for an error and 130 after Ctrl-C, which saves first."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "train",
        run,
        summary="train or fine-tune on a folder, accelerated",
        description="Trains on a folder: train/<class>/ and val/<class>/ of photos, or <class>/ with a part held "
        "back; for --task detection photos with VOC XML or COCO JSON boxes, for segmentation photos with index masks. "
        "Everything that can be wrong with it is told before the first step. Checkpoints are written whole or not at "
        "all, and a killed training continues with --resume as if nothing had happened.",
        examples=_EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the samples")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="what is written (default: runs/<name of DIR>)")
    parser.add_argument("--resume", action="store_true", help="continue the training in --output")
    add_start_arguments(parser)
    add_recipe_arguments(parser)
    add_machine_arguments(parser)
    machine = parser.add_argument_group("files and progress")
    machine.add_argument(
        "--save-seconds", type=_seconds, metavar="S", default=120.0, help="between two checkpoints (default: 120)"
    )
    machine.add_argument("--no-tensorboard", action="store_true", help="write no events for TensorBoard")
    machine.add_argument("--quiet", action="store_true", help="no progress, only the summary")


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    start = parser.add_argument_group("where to start")
    start.add_argument("--task", choices=TASKS, help="default: the recipe's, else classification")
    start.add_argument("--model", metavar="NAME", help="as for the other commands (default: own/ and the checkpoint's)")
    start.add_argument("--checkpoint", type=Path, metavar="FILE", help="start from these weights, in any layout")
    start.add_argument("--pretrained", action="store_true", help="start from published weights, from the hub")
    start.add_argument("--labels", type=Path, metavar="FILE", help="names of the checkpoint's classes, as for classify")
    start.add_argument("--new-head", action="store_true", help="replace the checkpoint's classifier even if it fits")
    start.add_argument("--annotations", type=Path, metavar="FILE", help="COCO boxes that are not in DIR (detection)")
    start.add_argument(
        "--validation", type=share, metavar="SHARE", help="held back where the folder has no val/ (default: 0.2)"
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", metavar="NAME|FILE", help="default: fine-tuning, by task")
    recipe.add_argument(
        *("--set", "-s"),
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe, such as weight_decay=0.05 or augmentation.vertical_flip=0.5",
    )
    recipe.add_argument("--epochs", type=positive, metavar="N")
    recipe.add_argument("--batch", type=positive, metavar="N", help="images a step on each process")
    recipe.add_argument("--lr", type=float, metavar="X", help="peak of the learning rate")
    recipe.add_argument("--size", type=image_size, metavar="N|HxW", help="pixels of the network's input")
    scales = recipe.add_mutually_exclusive_group()
    scales.add_argument("--multi-scale", action="store_true", help="a resolution a batch, from 5/8 to 5/4 of the size")
    scales.add_argument("--fixed", action="store_true", help="train at --size alone")
    recipe.add_argument("--amp", choices=("auto", "none", "bfloat16", "float16"), help="autocast")
    recipe.add_argument("--seed", type=int, metavar="N", help="of everything random")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("how it runs")
    machine.add_argument(
        "--device", type=device_name, metavar="NAME", default="auto", help="cpu, cuda or cuda:N (default: a GPU if any)"
    )
    machine.add_argument("--no-accelerate", action="store_true", help="plain PyTorch, to compare")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="that must serve the model")
    machine.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    machine.add_argument("--sync-batch-norm", action="store_true", help="batch norms over all GPUs' images")
    machine.add_argument("--no-channels-last", action="store_true", help="images and weights in NCHW memory")
    machine.add_argument(
        "--workers", type=worker_count, metavar="N", help="processes that load images (default: processors)"
    )
    machine.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine.add_argument(
        "--return-memory", action="store_true", help="let malloc return freed memory to the system, which is slower"
    )


def run(args: argparse.Namespace) -> int:
    if args.pretrained and args.checkpoint:
        raise ValueError("--pretrained and --checkpoint exclude each other: give one of the two")
    labels = read_names(args.labels)
    output = args.output or Path("runs", args.folder.resolve().name)
    recipe = recipe_from(args)
    if not args.return_memory:
        keep_freed_memory()

    import torch

    from ..training.loop import Settings, train

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(
        device=args.device,
        workers=args.workers,
        accelerate=not args.no_accelerate,
        backend=None if args.backend == "auto" else args.backend,
        channels_last=not args.no_channels_last,
        sync_batch_norm=args.sync_batch_norm,
        compile=args.compile,
        validation=args.validation,
        annotations=args.annotations,
        save_seconds=args.save_seconds,
        tensorboard=not args.no_tensorboard,
        progress=not args.quiet,
    )
    summary = train(
        args.folder,
        recipe,
        output,
        checkpoint=args.checkpoint,
        resume=args.resume,
        settings=settings,
        labels=labels,
        new_head=True if args.new_head else None,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(_told(summary, args))
    return 130 if summary.interrupted else 0


def recipe_from(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the arguments ask for; None where a training is resumed and they say nothing of one."""
    from ..training.recipe import parse_change, read_recipe

    changes: dict[str, Any] = {
        key: getattr(args, key) for key in ("model", "epochs", "batch", "lr", "seed") if getattr(args, key) is not None
    }
    if args.pretrained:
        changes["pretrained"] = True
    if args.size:
        changes["size"] = list(args.size)
    if args.amp:
        changes["amp"] = None if args.amp == "none" else args.amp
    if args.fixed:
        changes["multi_scale"] = None
    changes |= dict(map(parse_change, args.changes))
    if args.resume and not (changes or args.recipe or args.multi_scale):
        return None
    name = args.recipe or _DEFAULTS[args.task or "classification"]
    recipe = read_recipe(name, changes)
    if args.multi_scale and recipe.multi_scale is None:
        longest = max(recipe.size)
        scales = {"smallest": max(32, longest * 5 // 8), "largest": longest * 5 // 4}
        recipe = read_recipe(name, {**changes, "multi_scale": scales})
    if args.task not in (None, recipe.task):
        raise ValueError(f"--task {args.task}: the recipe {name} is for {recipe.task}; give another --recipe")
    return recipe


def _told(summary: Summary, args: argparse.Namespace) -> str:
    from ..training.logs import duration
    from ..training.tasks import HELD_BACK

    # To evaluate what was held back, not what was trained on; a folder's own val/ needs no share.
    own = any((args.folder / name).is_dir() for name in ("val", "validation", "valid"))
    share = "" if own else f" --validation {HELD_BACK if args.validation is None else args.validation:g}"
    lines = []
    if summary.best:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in summary.best.items() if name != "epoch")
        lines.append(f"best at epoch {summary.best['epoch'] + 1}: {figures}")
        lines.append(f"  weights    {summary.output / 'best.pth'}")
    lines.append(f"  last       {summary.output / 'last.pth'}, after {summary.epochs} epochs, {summary.step} steps")
    lines.append(f"  logs       {summary.output / 'log.csv'}, epochs.csv, tensorboard/")
    lines.append(f"  time       {duration(summary.seconds)}")
    if summary.interrupted:
        lines.append("interrupted; continue exactly here with")
        lines.append(f"  {_command()} train {args.folder} --resume --output {summary.output}")
    elif summary.best:
        command = f"evaluate {args.folder} --checkpoint {summary.output / 'best.pth'}{share} --freeze"
        lines.append(f"  next       mvit-kernels {command}")
    return "\n".join(lines)


def _command() -> str:
    count = int(os.environ.get("WORLD_SIZE", 1))
    return (
        f"torchrun --nproc_per_node {count} -m mvit_kernels"
        if count > 1
        else Path(sys.argv[0]).stem.replace("__main__", "mvit-kernels")
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
