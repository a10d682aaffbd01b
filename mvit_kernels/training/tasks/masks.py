# SPDX-License-Identifier: Apache-2.0
"""Photos with index masks, images whose pixels are the numbers of classes, checked whole before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..._utils.text import some
from . import photos
from .boxes import read_class_list
from .photos import refuse

IGNORED = 255  # pixels without a class: of no effect in training, and not counted in evaluation
_IMAGE_FOLDERS = ("images", "JPEGImages", "image", "img")
_MASK_FOLDERS = ("masks", "SegmentationClass", "labels", "annotations", "mask")
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")

# PASCAL VOC's classes in the order of its masks' numbers.
_VOC = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)


class Pair(NamedTuple):
    """A photo and its mask."""

    image: Path
    mask: Path


class MaskSet(NamedTuple):
    """Pairs, and the names of the classes; the first is the background where the set has one."""

    classes: tuple[str, ...]
    samples: tuple[Pair, ...]


def read_masks(folder: Path, *, classes: Sequence[str] | None = None, stems: Iterable[str] | None = None) -> MaskSet:
    """Read the pairs of photos and masks in `folder`.

    Example:
        >>> found = read_masks(Path("camvid"))
        >>> len(found.classes), len(found.samples)
        (12, 8)

    Args:
        folder: has `images` and `masks`, or VOC's `JPEGImages` and `SegmentationClass`, whose files have the same names
            but for the ending.
        classes: the names of the classes by number; None for the lines of `folder`/classes.txt, for VOC's names beside
            a `SegmentationClass` with numbers up to 20, or else for as many numbers as the masks have.
        stems: names, without ending, of the pairs to read; None for all. VOC's folder of images has others beside.

    A mask is an image of one channel or of a palette, whose colours are of no account, of its photo's size. Its values
    are numbers of classes, or 255 for no class.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no pair at all, or no pixel of any class; photos without a mask and masks without a photo, files
            that cannot be read, masks of another size than their photo's, in colour, or with values beyond the classes.
            All of these are named.
    """
    if not folder.is_dir():
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(f"{folder} is no folder with photos")
    image_folder, mask_folder = _folder_in(folder, _IMAGE_FOLDERS), _folder_in(folder, _MASK_FOLDERS)
    images, masks = photos.by_stem(image_folder), photos.by_stem(mask_folder, _MASK_SUFFIXES)
    if stems is None and mask_folder.name == "SegmentationClass":
        stems = list(masks)  # most of VOC's photos have no mask
    wanted = list(stems) if stems is not None else [*images, *(stem for stem in masks if stem not in images)]
    offenders = [f"{mask_folder.name}/{stem}.png has no photo" for stem in wanted if stem not in images]
    offenders += [f"{image_folder.name}/{images[s].name} has no mask" for s in wanted if s in images and s not in masks]
    pairs = [Pair(images[stem], masks[stem]) for stem in wanted if stem in images and stem in masks]
    counts = photos.each(_inspect, pairs)
    offenders += [each for each in counts if isinstance(each, str)]
    found = sorted({value for each in counts if not isinstance(each, str) for value in each} - {IGNORED})
    if classes is None and (folder / "classes.txt").is_file():
        classes = read_class_list(folder / "classes.txt")
    if classes is None and mask_folder.name == "SegmentationClass" and found and found[-1] < len(_VOC):
        classes = _VOC
    if classes is None:
        if found and found[-1] > IGNORED:
            raise ValueError(f"{mask_folder} has values up to {found[-1]}; numbers of classes up to 254 are wanted")
        classes = [f"class {number}" for number in range(found[-1] + 1 if found else 0)]
    if len(classes) > IGNORED:
        raise ValueError(f"{folder} has {len(classes)} classes; masks have numbers up to 254, and 255 for no class")
    for pair, values in zip(pairs, counts, strict=True):
        beyond = [] if isinstance(values, str) else [v for v in values if v >= len(classes) and v != IGNORED]
        if beyond:
            offenders.append(
                f"{pair.mask.name} has the value{'s' if len(beyond) > 1 else ''} {some(beyond)}, and there are "
                f"{len(classes)} classes, 0 to {len(classes) - 1} (255 is no class)"
            )
    refuse(folder, offenders)
    if not pairs:
        raise ValueError(f"{folder} has no photo with a mask")
    if not found:
        raise ValueError(f"{folder}: no pixel of the {len(pairs)} masks is of any class")
    return MaskSet(tuple(classes), tuple(pairs))


def read_mask(path: Path) -> np.ndarray:
    """The numbers of classes in a mask, (height, width), int64: of its pixels, or of its palette's entries.

    Raises:
        ValueError: the mask is in colour, or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise ValueError(
                    f"{path} is in colour (mode {image.mode}); masks whose values are numbers of classes are wanted"
                )
            return np.array(image).astype(np.int64)
    except (OSError, SyntaxError) as error:  # Pillow's decoders raise both
        reason = getattr(error, "strerror", None) or "it is no image, or is damaged"
        raise ValueError(f"{path} cannot be read as a mask: {reason}") from None


def _folder_in(folder: Path, names: Sequence[str]) -> Path:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise ValueError(
            f"{folder} has no folder {names[0]} (or {names[1]}); photos in images and masks in masks are wanted"
        )
    return found[0]


def _inspect(pair: Pair) -> list[int] | str:
    """The values in a mask, or what is wrong with the pair."""
    size = photos.photo_size(pair.image)
    if isinstance(size, str):
        return size
    try:
        mask = read_mask(pair.mask)
    except ValueError as error:
        return str(error)
    if mask.shape != size[::-1]:
        there = f"{mask.shape[1]} × {mask.shape[0]}"
        return f"{pair.mask.name} has {there} pixels, and its photo {pair.image.name} {size[0]} × {size[1]}"
    return np.unique(mask).tolist()
