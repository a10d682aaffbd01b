# SPDX-License-Identifier: Apache-2.0
"""The command line, one module a command: ``add_arguments(subparsers)`` declares it, ``run(args)`` is it.

torch and everything that imports it are imported inside functions here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._utils.files import is_special, to_json, write_csv, write_json

__all__ = ["COMMANDS", "add_command", "output_file", "print_json", "to_json", "write_csv", "write_json"]

COMMANDS = ("info", "verify", "bench", "profile", "classify", "demo")


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
    if not is_special(path) and not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {path.parent} cannot be written to")
    return path


def print_json(data: Any) -> None:
    """Print `data` as `to_json` has it; where the output's encoding has not all letters, in ASCII."""
    text = to_json(data)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = to_json(data, ascii_only=True)
    print(text)
