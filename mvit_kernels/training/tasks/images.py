# SPDX-License-Identifier: Apache-2.0
"""Photos in folders: which there are, and whether each of them can be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..._utils.text import some

__all__ = ["SUFFIXES", "check_images", "image_files", "raise_unreadable"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The photos in `folder` and below, by suffix, sorted; hidden files and folders are left out."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


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
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        reasons = pool.map(_why_unreadable, share, chunksize=16)
        raise_unreadable([(path, reason) for path, reason in zip(share, reasons, strict=True) if reason], len(share))


def raise_unreadable(broken: Sequence[tuple[Path, str]], of: int) -> None:
    """Raise for files that cannot be read, if there are any, of `of` files that were checked."""
    if broken:
        named = some([f"{path} ({reason})" for path, reason in broken])
        raise ValueError(f"{len(broken)} of {of} images cannot be read: {named}; repair or remove them")


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
