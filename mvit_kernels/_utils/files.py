# SPDX-License-Identifier: Apache-2.0
"""Result files, as CSV and JSON: a file appears whole or not at all."""

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
    """Write `rows`, all of the same keys, with a line of headings; the file appears whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def write_json(path: Path, data: Any) -> None:
    """Write `data` as `to_json` has it; the file appears whole or not at all."""
    _write(path, to_json(data) + "\n")


def to_json(data: Any, ascii_only: bool = False) -> str:
    """`data` as JSON, all but ASCII escaped if asked. NaN and infinities, which JSON has not, become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _write(path: Path, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")  # names of files may have letters that no encoding has
    try:
        if is_special(path):  # nothing to rename, and no half file to fear
            path.write_bytes(data)
            return
        path = path.resolve()  # a link stays a link
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, as /dev/stdout: to be written to, never to be replaced."""
    return path.exists() and not path.is_file()
