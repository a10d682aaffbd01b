# SPDX-License-Identifier: Apache-2.0
"""Result files as CSV and JSON, written atomically: a file appears complete or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    _write(path, text.getvalue())


def write_json(path: Path, data: Any) -> None:
    """Write `data`, as `to_json` formats it, atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    _write(path, to_json(data) + "\n")


def to_json(data: Any, ascii_only: bool = False) -> str:
    """`data` as JSON, with everything but ASCII escaped if asked. NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _write(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # file names may contain bytes that are not UTF-8


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    try:
        if is_special(path):  # never replaced, and it cannot keep a partial file
            path.write_bytes(data)
            return
        path = path.resolve()  # a symbolic link stays one
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:  # the error of a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_special(path: Path) -> bool:
    """Whether `path` exists and is not a regular file, such as /dev/stdout or a pipe: written to, never replaced."""
    return path.exists() and not path.is_file()
