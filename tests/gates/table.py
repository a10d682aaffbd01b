# SPDX-License-Identifier: Apache-2.0
"""What the compilers' gates have in common: their arguments, and the table that they print or write."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parser(description: str, architectures: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments of every gate."""
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("--arch", type=int, nargs="*", default=architectures)
    arguments.add_argument("--dry", action="store_true", help="print, and write no table")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count())
    return arguments


def committed(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, numbers as such."""
    with path.open(newline="") as file:
        return [{k: int(v) if v.isdecimal() else v for k, v in row.items()} for row in csv.DictReader(file)]


def publish(rows: Iterable[Mapping[str, Any]], path: Path, columns: Sequence[str], *, dry: bool) -> None:
    """Print `rows`, or write them to `path`."""
    rows = list(rows)
    if dry:
        for row in rows:
            print(*row.values(), sep=" | ")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows", file=sys.stderr)
