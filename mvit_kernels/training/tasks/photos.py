# SPDX-License-Identifier: Apache-2.0
"""Photos of a data set: found by name, and all read once before the first step, so that no run ends at a broken one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..._utils.text import some
from .images import SUFFIXES

Item = TypeVar("Item")
Found = TypeVar("Found")

_NAMED = 100  # offenders that a message names; beyond, their number


def by_stem(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """File stem -> path of the files in `folder` with one of `suffixes`, sorted as people count: 2 before 10.

    Raises:
        ValueError: two files have one stem, such as 1.jpg and 1.png: nothing says which of them is meant.
    """
    found: dict[str, Path] = {}
    twice = []
    for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            if found.setdefault(path.stem, path) is not path:
                twice.append(f"{found[path.stem].name} and {path.name}")
    if twice:
        raise ValueError(f"{folder} has {some(twice, _NAMED)}, which differ in their endings alone; keep one of each")
    return found


def natural(name: str) -> list[str | int]:
    """A sorting key by which "photo 2" comes before "photo 10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def each(function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`function` of every item, in order, on a few threads: Pillow's decoders release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, items))


def photo_size(path: Path) -> tuple[int, int] | str:
    """(width, height) of the photo, upright by its EXIF orientation, or why it cannot be read.

    The whole file is decoded, so that a cut one is found; JPEGs at an eighth of their size, which takes a third of the
    time and reads every byte all the same.
    """
    from PIL import Image

    from ...zoo.images import load_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if image.mode in ("RGB", "L", "CMYK") and image.format == "JPEG":
                    turned = image.getexif().get(0x0112, 1) >= 5
                    image.draft("RGB", (1, 1))
                    image.load()
                    return (height, width) if turned else (width, height)
    except Exception:  # noqa: S110 - whatever it was, load_image says it in words
        pass
    try:
        return load_image(path).size
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            return f"{path}: {error.strerror}"
        return str(error)


def refuse(folder: Path, offenders: Iterable[str]) -> None:
    """Raise one ValueError that names all `offenders` found in `folder`; none: return."""
    offenders = list(offenders)
    if offenders:
        count = f"{len(offenders)} things are" if len(offenders) > 1 else "one thing is"
        raise ValueError(f"{folder}: {count} not as training needs it: {some(offenders, _NAMED, '; ')}")
