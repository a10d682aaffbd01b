# SPDX-License-Identifier: Apache-2.0
"""The arguments that select a model and how it runs, shared by the commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..zoo import checked_device, load

if TYPE_CHECKING:
    from torch import Tensor, nn

_NAMES = (
    "own/xxs, own/xs, own/s (or xxs, xs, s); timm's name, such as mobilevit_s; huggingface/s, or the "
    "hub's name, such as apple/mobilevit-small; kornia/s; ssdlite/s for detection; deeplabv3/s or "
    "apple/deeplabv3-mobilevit-small for segmentation (default: our own with the checkpoint's task and variant, "
    "else own/s)"
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def add_model_arguments(
    parser: argparse.ArgumentParser,
    names: str = _NAMES,
    size: tuple[int, int] | None = (256, 256),
    size_text: str = "256",
) -> None:
    """Add the arguments of every command that runs a model: which model, on which images, and how.

    Args:
        parser: of the command.
        names: help on the names of models.
        size: default of --size; None for a command that finds it itself, and takes images one by one.
        size_text: help on that default.
    """
    add_name_arguments(parser, names)
    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--size",
        type=image_size,
        metavar="N|HxW",
        default=size,
        help=f"size of the network's input in pixels (default: {size_text})",
    )
    if size is not None:
        how.add_argument("--batch", type=positive, metavar="N", default=1, help="images per call (default: 1)")
    how.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of weights and images (default: float32)"
    )
    how.add_argument(
        "--device", type=device_name, metavar="NAME", default="cpu", help="cpu, cuda or cuda:N (default: cpu)"
    )
    how.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="backend that must serve the model (default: auto)"
    )
    how.add_argument(
        "--threads", type=thread_count, metavar="N", help="number of CPU threads (default: PyTorch's choice)"
    )


def add_name_arguments(parser: argparse.ArgumentParser, names: str = _NAMES) -> None:
    """Add the arguments that say which model: --model, --pretrained and --checkpoint.

    Args:
        parser: of the command.
        names: help on the names of models.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help=names)
    model.add_argument(
        "--pretrained",
        action="store_true",
        help="load published weights, downloaded from the Hugging Face hub",
    )
    model.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="load these weights: timm's, Hugging Face's, cvnets' or our own, as .pth or .safetensors",
    )


def positive(text: str) -> int:
    """Argument type: an integer from 1 to 2³¹ - 1."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more (below 2³¹)")
    return int(text)


def thread_count(text: str) -> int:
    """Argument type: 1 to eight times the processors, at least 64.

    More are never faster. Of 1024 on two processors a MobileViT took minutes; 100 000 the system refuses, and OpenMP
    ends the process with a segmentation fault.
    """
    processors = os.cpu_count() or 1
    most = max(64, 8 * processors)
    if positive(text) > most:
        raise argparse.ArgumentTypeError(f"{text} threads are too many for {processors} processors; give 1 to {most}")
    return int(text)


def device_name(text: str) -> str:
    """Argument type: a device that can be used here, checked before any work is done; "auto" passes.

    Only a name other than the defaults loads torch, which knows the devices: ``--help`` stays quick.
    """
    if text not in ("auto", "cpu"):
        try:
            checked_device(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("--device ")) from None
    return text


def image_size(text: str) -> tuple[int, int]:
    """Argument type: a size in pixels, ``256``, or height and width as ``250x270``; at least 32 each."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; give 256, or HxW such as 250x270, of 32 pixels or more"
        )
    return int(sides[0]), int(sides[-1])


def share(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1, such as 0.25")
    return value


def three_numbers(text: str) -> tuple[float, float, float]:
    """Argument type: three numbers with commas, one a channel."""
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not three numbers such as 0.485,0.456,0.406") from None
    return red, green, blue


def worker_count(text: str) -> int:
    """Argument type: 0 to 512 processes."""
    if not text.isdecimal() or int(text) > 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 0 to 512")
    return int(text)


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments of `add_model_arguments` select, in that dtype and on that device."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint, device=args.device)
    return model.to(getattr(torch, args.dtype))


def check_size(args: argparse.Namespace, images: int | None = None) -> None:
    """Raise ValueError if the model does not support --size, or if the images would not fit into memory.

    Args:
        args: of `add_model_arguments`.
        images: number of images; None for --batch.
    """
    height, width = args.size
    count = args.batch if images is None else images
    gigabytes = count * 3 * height * width * 4 / 1e9
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else gigabytes * 4
    if gigabytes > memory / 4:  # Linux would grant the memory, and kill the process when it is written to
        raise ValueError(
            f"{count} × 3 × {height} × {width} pixels take {gigabytes:.3g} GB, and this machine has {memory:.3g} GB; "
            f"give a smaller --size or {'--batch' if images is None else 'fewer images'}"
        )
    if (args.model or "").startswith("kornia/") and any(side % 64 for side in args.size):
        raise ValueError(f"--model {args.model}: Kornia's models take multiples of 64 pixels only; give another --size")


def random_images(args: argparse.Namespace) -> Tensor:
    """Random images (batch, 3, H, W) in [0, 1), the same at every call, for the arguments of `add_model_arguments`."""
    import torch

    check_size(args)
    images = torch.rand(args.batch, 3, *args.size, generator=torch.Generator().manual_seed(0), device="cpu")
    return images.to(device=args.device, dtype=getattr(torch, args.dtype))
