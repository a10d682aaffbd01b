# SPDX-License-Identifier: Apache-2.0
"""The command line, one module a command: ``add_arguments(subparsers)`` declares it, ``run(args)`` is it.

torch and everything that imports it are imported inside functions here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("info", "verify", "bench", "profile", "classify")


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """The parser of the command `name`, its summary in ``mvit-kernels --help``, its examples at its foot."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def output_file(text: str) -> Path:
    """An argument's type: a file to be written, whose folder must exist before any work is done."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; make it first")
    if not _is_special(path) and not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {path.parent} cannot be written to")
    return path


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


def print_json(data: Any) -> None:
    """Print `data` as `to_json` has it; where the output's encoding has not all letters, in ASCII."""
    text = to_json(data)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = to_json(data, ascii_only=True)
    print(text)


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
        if _is_special(path):  # nothing to rename, and no half file to fear
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


def _is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, as /dev/stdout: to be written to, never to be replaced."""
    return path.exists() and not path.is_file()
