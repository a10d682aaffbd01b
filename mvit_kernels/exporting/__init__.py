# SPDX-License-Identifier: Apache-2.0
"""``export``: a MobileViT of any library as a file for another runtime, compared with the model once it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .._utils.arguments import check_model
from .._utils.plain import cast_floats
from .comparison import Difference, compare
from .plan import Contents, FlatOutputs, Plan, output_names
from .report import ExportReport
from .targets import TARGETS, Target, target_named

__all__ = ["TARGETS", "Contents", "Difference", "ExportReport", "export"]

Size = int | tuple[int, int]
_SIZE = (256, 256)  # as published
_SUFFIXES = {  # of the paths from which a target is told
    ".onnx": "onnx",
    ".xml": "openvino",
    ".mlpackage": "coreml",
    ".param": "ncnn",
    ".tflite": "litert",
    ".pte": "executorch",
    ".pt2": "torch",
}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    sizes: Size | Sequence[Size] | Literal["dynamic"] | None = None,
    batch: int | Literal["dynamic"] | None = None,
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
) -> ExportReport:
    """Write `model` to a file for another runtime, then run the file and compare it with the model.

    Example:
        >>> report = mvit_kernels.export(model, "mobilevit_s.onnx", sizes=64)  # ".xml" is OpenVINO's, ".pt2" PyTorch's
        >>> report.ok, report.contents.highest_rank
        (True, 4)

    Batch norms are folded into their convolutions. The file takes float32 images (B, C, H, W) named ``images``, and
    returns the model's outputs in float32: ``output``, or ``logits`` of Hugging Face's classes, or ``logits`` and
    ``offsets`` of our detector. The model is not changed.

    Args:
        model: a timm, Hugging Face, Kornia, cvnets or own MobileViT, also for detection or segmentation; accelerated,
            frozen or plain.
        path: the file to write, with the target's suffix. What is there is replaced once the new file is right.
        target: "onnx", "openvino", "coreml", "ncnn", "litert", "executorch", "torch" (``torch.export``'s program) or
            "aotinductor" (compiled for this machine's kind of processor); None for the one of the path's suffix.
        sizes: the images' size: 256, or (height, width); a list of such for a file that takes several, which Core ML's
            can; "dynamic" for any. None for 256 × 256 px.
        batch: number of images, or "dynamic" for any; None for any where that costs no time
            (ONNX, ``torch.export``), else 1.
        dtype: of weights and arithmetic: float32, or what else the target has.
        opset: of ONNX's operators: 18, which everything reads, or 23, in which attention is one node: 2 to 3 % faster
            in ONNX Runtime on a CPU, but unknown to many of its accelerators' providers; None for 18.

    Returns:
        An `ExportReport`: size, node counts and the largest differences, on random images and on photographs.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: an unknown target or suffix; sizes, a batch or a dtype that the target does not have; a model that
            `freeze` refuses.
        ImportError: a library that the target needs is not installed; the error names the extra.
        RuntimeError: the file computes something else than the model, by more than rounding explains. No file is left.
    """
    check_model("export", model)
    path = Path(path)
    chosen = _target(path, target)
    plan = _plan(chosen, sizes, batch, dtype, opset)
    chosen.require()

    network = _form(chosen.form)(model, plan, **chosen.form_options)
    plan, network = _traceable(network, plan, chosen)
    # In a folder beside `path`, so that what is written can be renamed, and nothing is left where it is wrong.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder, path.name)
        with torch.no_grad():
            chosen.write(network, plan, part)
        contents = chosen.contents(part)
        chosen.check(contents, plan)
        run = chosen.load(part, plan)
        differences, agreement = ((), None) if run is None else compare(run, model, plan, chosen.slack)
        del run  # which may keep the file open
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        report = ExportReport(
            chosen.name, path, written, chosen.form, plan.dtype, _images(plan), contents, differences, agreement
        )
        if not report.ok:
            raise RuntimeError(f"export: the file computes something else than the model, and is not kept\n{report}")
        _move(Path(folder), path.parent)
    return report


def _target(path: Path, name: str | None) -> Target:
    if name is None:
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"export: path is {str(path)!r}, whose suffix names no target; give target=, one of "
                f"{', '.join(TARGETS)}, or a path that ends in one of {', '.join(_SUFFIXES)}"
            )
        name = _SUFFIXES[path.suffix]
    chosen = target_named(name)
    if path.suffix != chosen.suffix:
        raise ValueError(f"export: path is {str(path)!r}; one that ends in {chosen.suffix} is wanted for {name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: the folder {path.parent} does not exist; make it first")
    return chosen


def _plan(
    target: Target,
    sizes: Size | Sequence[Size] | str | None,
    batch: int | str | None,
    dtype: torch.dtype,
    opset: int | None,
) -> Plan:
    """The arguments of `export` as what the target is asked for, checked."""
    if dtype not in target.dtypes:
        known = ", ".join(str(each).removeprefix("torch.") for each in target.dtypes)
        raise ValueError(f"export: dtype is {dtype!r}; {target.name} files have {known}")
    dynamic_size = isinstance(sizes, str)
    if dynamic_size and sizes != "dynamic":
        raise ValueError(f"export: sizes is {sizes!r}; a size, a list of sizes or 'dynamic' is wanted")
    if dynamic_size and not target.dynamic_size:
        raise ValueError(
            f"export: sizes is 'dynamic', and {target.name} files have fixed sizes; give one, as sizes=256"
        )
    several = [_SIZE] if sizes is None or dynamic_size else sizes if isinstance(sizes, list) else [sizes]
    pairs = tuple(dict.fromkeys(map(_pair, several)))
    if not pairs or (len(pairs) > 1 and not target.enumerated_sizes):
        raise ValueError(f"export: sizes is {sizes!r}; {target.name} files take one size; give one, as sizes=256")
    if isinstance(batch, str) and batch != "dynamic":
        raise ValueError(f"export: batch is {batch!r}; a number of images or 'dynamic' is wanted")
    if batch == "dynamic" and not target.dynamic_batch:
        raise ValueError(f"export: batch is 'dynamic', and {target.name} files have a fixed one; give it, as batch=1")
    if batch is None:
        batch = "dynamic" if target.dynamic_batch_is_free else 1
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"export: batch is {batch!r}; a whole number of 1 or more is wanted")
    dynamic_batch = batch == "dynamic"
    # torch.export takes an axis of one element to be fixed.
    images = 2 if dynamic_batch else int(batch)
    plan = Plan(pairs, (), images, 3, dtype, dynamic_batch, dynamic_size, target.attention)
    if opset is not None and opset not in target.opsets:
        known = " or ".join(map(str, target.opsets)) or f"none for {target.name}, which has no operators of ONNX,"
        raise ValueError(f"export: opset is {opset!r}; {known} is wanted")
    if not target.opsets:
        return plan
    from .targets.onnx import in_opset

    return in_opset(plan, opset or target.opsets[0])


def _pair(size: Size) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 32 for side in sides):
        raise ValueError(f"export: a size is {size!r}; 32 or more pixels, or (height, width), are wanted")
    return sides


def _form(name: str) -> Callable[..., nn.Module]:
    if name == "phone":
        from .phone import phone_form  # it and the plain form are loaded when they are used

        return phone_form
    from .plain import plain_form

    return plain_form


def _traceable(network: nn.Module, plan: Plan, target: Target) -> tuple[Plan, nn.Module]:
    """The plan with what only the network tells, and the network as `Target.write` takes it."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    plan = plan._replace(channels=first.in_channels)
    dtype = plan.dtype if target.casts_network else torch.float32
    network = cast_floats(network, dtype)
    try:
        with torch.no_grad():
            plan = plan._replace(outputs=output_names(network(plan.example().to(dtype))))
    except RuntimeError as error:  # such as Kornia's, whose blocks take whole patches alone
        raise ValueError(
            f"export: the model does not take images {_images(plan)}; give other sizes: {error}"
        ) from error
    return plan, FlatOutputs(network, dtype).eval()


def _images(plan: Plan) -> str:
    """The shapes of images that a file of `plan` takes, in words."""
    batch = "any number" if plan.dynamic_batch else str(plan.batch)
    sizes = "any size" if plan.dynamic_size else " or ".join(f"{height}x{width}" for height, width in plan.sizes)
    return f"{batch} × {plan.channels} × {sizes}"


def _move(folder: Path, into: Path) -> None:
    """Move everything in `folder` into the folder `into`, over what has the same names there."""
    for part in folder.iterdir():
        place = into / part.name
        if place.is_dir() and not place.is_symlink():  # a file that is a folder, such as Core ML's
            shutil.rmtree(place)
        os.replace(part, place)
