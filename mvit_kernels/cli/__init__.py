# SPDX-License-Identifier: Apache-2.0
"""The command line, one module per command: ``add_arguments(subparsers)`` declares it, ``run(args)`` executes it.

torch, and everything that imports it, is imported inside functions here, so that ``--help`` answers immediately.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.files import is_special, to_json, write_csv, write_json

__all__ = [
    "COMMANDS",
    "add_command",
    "add_result_arguments",
    "output_file",
    "print_json",
    "to_json",
    "write_csv",
    "write_json",
    "write_rows",
]

COMMANDS = (
    "info",
    "verify",
    "export",
    "bench",
    "profile",
    "classify",
    "detect",
    "segment",
    "train",
    "evaluate",
    "demo",
)


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add the parser of the command `name`.

    Args:
        subparsers: of the main parser.
        name: of the command.
        run: executes the command and returns the exit code.
        summary: its line in ``mvit-kernels --help``.
        description: text at the top of its own help.
        examples: text at the end of its own help.
    """
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
    """Argument type: a file to be written. Its folder is checked here, before any work is done."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; make it first")
    if not is_special(path) and not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {path.parent} cannot be written to")
    return path


def add_result_arguments(group: argparse._ActionsContainer, what: str) -> None:
    """Add --json, which means the same in every command, and --output for the files that `write_rows` writes.

    Args:
        group: of the command's parser.
        what: is printed or written.
    """
    group.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else")
    group.add_argument(
        "--output",
        type=_rows_file,
        action="append",
        default=[],
        metavar="FILE",
        help=f"write {what} to FILE, as CSV or JSON by its ending; may be repeated",
    )


def _rows_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() not in (".csv", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .csv nor in .json, which say how it is written")
    return path


def write_rows(paths: Sequence[Path], rows: Sequence[Mapping[str, Any]], data: Any) -> None:
    """Write `rows` to each path that ends in .csv, and `data` to each in .json."""
    for path in paths:
        if path.suffix.lower() == ".csv":
            write_csv(path, rows)
        else:
            write_json(path, data)


def print_json(data: Any) -> None:
    """Print `data` as `to_json` formats it, in ASCII if the output's encoding lacks some characters."""
    text = to_json(data)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = to_json(data, ascii_only=True)
    print(text)
