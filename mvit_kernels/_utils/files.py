# SPDX-License-Identifier: Apache-2.0
"""Result files as CSV and JSON, written atomically: a file appears complete or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows`, with a header line, atomically.

    Args:
        path: the file; its folder exists.
        rows: at least one, all with the same keys.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, data: Any) -> None:
    """Write `data`, as `to_json` formats it, atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    write_text(path, to_json(data) + "\n")


def to_json(data: Any, ascii_only: bool = False) -> str:
    """`data` as JSON, with everything but ASCII escaped if asked. NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, in UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # file names may contain bytes that are not UTF-8


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    if is_special(path):  # never replaced, and it cannot keep a partial file
        try:
            path.write_bytes(data)
        except OSError as error:
            raise _named(error, path) from error
        return
    with write_whole(path.resolve()) as file:  # a symbolic link stays one
        file.write(data)


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path`, on the disk before it does, when the block ends without an error.

    Raises:
        OSError: it cannot be written; what was at `path` is untouched, and no part of the new file is left.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which that of a full disk lacks."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` outlive a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_special(path: Path) -> bool:
    """Whether `path` exists and is not a regular file, such as /dev/stdout or a pipe: written to, never replaced."""
    return path.exists() and not path.is_file()
