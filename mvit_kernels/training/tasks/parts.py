# SPDX-License-Identifier: Apache-2.0
"""Which samples of a folder are for training and which for validation: its own parts, or a share held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ..seeds import held_back
from . import HELD_BACK

_VALIDATION = ("val", "valid", "validation")  # names of its folder; the second is Roboflow's


class Part(NamedTuple):
    """Where the samples of one part are."""

    folder: Path
    stems: tuple[str, ...] | None = None  # VOC's lists of names
    annotations: Path | None = None  # a COCO file outside of `folder`


class Samples(Protocol):
    """A `BoxSet` or a `MaskSet`."""

    classes: tuple[str, ...]
    samples: tuple[Any, ...]


Found = TypeVar("Found", bound=Samples)


def parts(folder: Path, lists: str | None) -> tuple[Part | None, Part | None]:
    """The parts for training and for validation; the second is None where the folder has none of its own.

    The first is None where it has one for validation only. Without `lists` all of the folder is for training.

    They are the folders `train` and `val` (or valid, validation) in `folder`; those of COCO, photos in `train2017` and
    `val2017` and their boxes in annotations/instances_train2017.json; or VOC's ImageSets/`lists`/train.txt and val.txt.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(f"{folder} is no folder")
    if lists is None:
        return Part(folder), None
    files = {split: _coco_file(folder, split) for split in ("train", *_VALIDATION)}
    folders = {split: _split_folder(folder, split, file) for split, file in files.items()}
    found = {split: Part(where, None, files[split]) for split, where in folders.items() if where is not None}
    if found:
        return found.pop("train", None), next(iter(found.values()), None)
    names = [folder / "ImageSets" / lists / f"{split}.txt" for split in ("train", "val")]
    if all(path.is_file() for path in names):
        training, validation = (Part(folder, _stems(path)) for path in names)
        return training, validation
    return Part(folder), None


def read_parts(
    folder: Path,
    lists: str | None,
    read: Callable[[Part, Sequence[str] | None], Found],
    validation: float | None,
    classes: Sequence[str] | None = None,
) -> tuple[Found | None, Found | None, str]:
    """What `Task.open` opens: training and validation samples, and a remark on what was held back.

    Args:
        folder, validation: as for `Task.open`.
        lists: the folder of VOC's lists; None to take the folder as one, without looking for parts.
        read: reads a part, given the names of its classes or None to find them.
        classes: their names, where they are known (`Task.classes`).
    """
    training, own = parts(folder, lists)
    if own is not None:
        if validation == 1:
            return None, read(own, classes), ""
        if validation is not None and 0 < validation < 1:
            raise ValueError(
                f"validation={validation:g}: {folder} has validation samples of its own"
                f"{f', in {own.folder.name}' if own.folder != folder else ''}; leave it out"
            )
        if training is None:
            raise ValueError(f"{folder} has a folder {own.folder.name} for validation, and no train for training")
        found = read(training, classes)
        return found, read(own, found.classes), ""
    share = HELD_BACK if validation is None else validation
    whole = read(training, classes)
    if len(whole.samples) < 2 and 0 < share < 1:
        raise ValueError(f"{folder} has one sample; training with a validation needs at least 2")
    held = held_back([sample[0].name for sample in whole.samples], share)
    rest = tuple(sample for i, sample in enumerate(whole.samples) if i not in held)
    remark = f"held back for validation: {len(held)} of {len(whole.samples)} samples" if 0 < share < 1 else ""
    kept = tuple(whole.samples[i] for i in sorted(held))
    return whole._replace(samples=rest) if rest else None, whole._replace(samples=kept) if kept else None, remark


def _coco_file(folder: Path, split: str) -> Path | None:
    """A COCO file for one split that is not in the split's own folder."""
    names = (f"annotations/instances_{split}*.json", f"annotations/{split}.json", f"{split}.json")
    return next((path for name in names for path in sorted(folder.glob(name))), None)


def _split_folder(folder: Path, split: str, file: Path | None) -> Path | None:
    """The folder of a split's photos: of its name, or of what the COCO file is named after, such as train2017."""
    names = [split, f"images/{split}"]
    if file is not None:
        name = file.stem.removeprefix("instances_")
        names = [name, f"images/{name}", *names]
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    return folder if found is None and file is not None else found


def _stems(path: Path) -> tuple[str, ...]:
    return tuple(line.split()[0] for line in path.read_text().splitlines() if line.strip())
