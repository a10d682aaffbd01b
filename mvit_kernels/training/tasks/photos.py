# SPDX-License-Identifier: Apache-2.0
"""Photos of a data set: which there are, and all read before the first step, so that no run ends at a broken one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..._utils.text import some

Item = TypeVar("Item")
Found = TypeVar("Found")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_NAMED = 100  # offenders that a message names; beyond, their number


def image_files(folder: Path) -> list[Path]:
    """The photos in `folder` and below, by suffix, sorted; hidden files and folders are left out."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


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


def check_images(paths: Sequence[Path]) -> None:
    """Read every photo as far as it takes to see that it is whole, in threads: a JPEG at an eighth of its size.

    Of several processes each takes its share of the photos, and torchrun ends the others when one raises.

    Raises:
        ValueError: some cannot be read; it counts all of them, and names the first few with the reasons.
        ImportError: Pillow is not installed.
    """
    from ...zoo.images import _pillow

    _pillow()
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = paths[rank::count]
    reasons = each(_why_unreadable, share)
    broken = [f"{path} ({reason})" for path, reason in zip(share, reasons, strict=True) if reason]
    if broken:
        raise ValueError(f"{len(broken)} of {len(share)} images cannot be read: {some(broken)}; repair or remove them")


def _why_unreadable(path: Path) -> str:
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            return "0 bytes"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and of odd metadata, which do not matter here
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    return f"more than 8 bits a channel, mode {image.mode}"
                if image.format == "PNG":
                    image.verify()  # the checksums of all its chunks
                else:
                    image.draft("RGB", (32, 32))
                    image.load()
    except Exception as error:  # Pillow's decoders raise many kinds
        text = str(error).replace(f" {str(path)!r}", "").partition("\n")[0]
        return text or type(error).__name__
    return ""


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
