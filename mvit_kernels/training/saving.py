# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: written so that a file is there whole or not at all, and read with suspicion.

``last.pth`` has everything that the training goes on from, ``best.pth`` the weights with the best figure. Both hold
tensors, numbers and texts only (``weights_only=True``), and `mvit_kernels.load_checkpoint` reads either into a model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._utils.files import write_whole
from ..checkpoints.files import read_file
from .recipe import Recipe, from_dict

__all__ = ["Described", "check_space", "describe", "prepare_folder", "read_run", "save"]

FORMAT = "mvit_kernels training 1"
LAST, BEST = "last.pth", "best.pth"
_NEEDED = ("task", "classes", "recipe", "epoch", "batch", "step", "world_size", "state_dict", "optimizer")


class Described(NamedTuple):
    """What a checkpoint says of itself beside its weights; of others' files mostly nothing."""

    task: str | None = None
    classes: tuple[str, ...] | None = None
    recipe: Recipe | None = None
    figures: Mapping[str, float] = {}


def save(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, and to the disk before it takes the place of the one before.

    Raises:
        OSError: the file cannot be written; the one before is untouched, and no part of the new one is left.
    """
    try:
        with write_whole(path) as part:
            torch.save({"format": FORMAT, **contents}, part)
    except RuntimeError as error:  # torch.save's, where the disk is full: "unexpected pos" or "file write failed"
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); is the disk full?") from error


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make the folder of a training, and refuse one that has another training in it.

    Raises:
        ValueError: there is a training without `resume`, or none with it.
        OSError: it cannot be made or written to.
    """
    last = folder / LAST
    if resume and not last.exists():
        raise ValueError(f"--resume: there is no {last}; give the --output of the training, or leave out --resume")
    if not resume and any((folder / name).exists() for name in (LAST, BEST)):
        raise ValueError(
            f"{folder} has a training in it; continue it with --resume, or give another folder by --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".trial.{os.getpid()}.part"
    trial.touch()  # asks the file system; os.access does not know of read-only mounts and quotas
    trial.unlink()
    for part in folder.glob(".*.part"):  # of a training that was killed while it wrote
        with contextlib.suppress(OSError):
            part.unlink()


def check_space(folder: Path, weights: int) -> None:
    """Refuse to begin where the checkpoints will not fit.

    Args:
        folder: exists.
        weights: bytes of the model's parameters and buffers.

    Raises:
        OSError: there is too little space.
    """
    # last.pth: weights, their average and Adam's two moments, twice while it is replaced; best.pth: weights, twice;
    # 16 MB for logs, TensorBoard's events and pictures.
    wanted = (2 * 4 + 2) * weights + 16e6
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB of free space, and the checkpoints take up to {wanted / 1e6:.0f} MB; "
            "make space, or give another folder by --output"
        )


def read_run(path: Path) -> dict[str, Any]:
    """The contents of a ``last.pth``.

    Raises:
        ValueError: the file is damaged, or no checkpoint of a training by this package; it says why and what to do.
        OSError: it cannot be read.
    """
    advice = f"train anew into another --output; the best weights, if they are whole, are in {path.with_name(BEST)}"
    try:
        contents = read_file(path)
    except ValueError as error:
        raise ValueError(f"--resume: {str(error).removeprefix('load_checkpoint: ')}; or {advice}") from error
    if not isinstance(contents, Mapping) or contents.get("format") != FORMAT:
        found = contents.get("format") if isinstance(contents, Mapping) else None
        kind = f"of another version ({found!r:.60})" if found else "not of a training by mvit-kernels"
        raise ValueError(
            f"--resume: {path} is {kind}, so that it cannot be continued exactly; its weights can start a training: "
            f"--checkpoint {path} --output another/folder"
        )
    missing = [key for key in _NEEDED if key not in contents]
    if missing:
        raise ValueError(f"--resume: {path} lacks {', '.join(missing)}; {advice}")
    return dict(contents)


def describe(path: Path) -> Described:
    """What the checkpoint at `path`, in any layout, says of itself.

    Raises:
        As `mvit_kernels.load_checkpoint` does for files that it cannot read.
    """
    contents = read_file(path)
    if not isinstance(contents, Mapping):
        return Described()
    if contents.get("format") == FORMAT:
        recipe = from_dict(contents["recipe"], str(path))
        return Described(contents["task"], tuple(contents["classes"]), recipe, dict(contents.get("figures") or {}))
    names = [key for key in _keys(contents) if isinstance(key, str)]
    if any(".aspp." in f".{name}" or "segmentation_head." in name or "seg_head." in name for name in names):
        return Described("segmentation")
    if any("ssd_heads." in name or ".heads.5." in f".{name}" for name in names):
        return Described("detection")
    return Described()


def _keys(contents: Mapping[Any, Any], depth: int = 0) -> list[Any]:
    keys = []
    for key, value in contents.items():
        keys += _keys(value, depth + 1) if isinstance(value, Mapping) and depth < 4 else [key]
    return keys
