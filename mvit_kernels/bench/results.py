# SPDX-License-Identifier: Apache-2.0
"""Results as long-form CSV: one line per candidate and clock, with the same columns for everything that is measured.

Example:
    >>> append(Path("benchmarks/results/nvidia-h200/operators.csv"), rows)
    >>> rows = latest(read(Path("benchmarks/results/nvidia-h200/operators.csv")))

Files are appended to and never edited. A line's ``ratio`` refers to a candidate that was measured in turns with it.
Such lines have the same ``date``, and `latest` keeps them together.
"""

from __future__ import annotations

import csv
import errno
import functools
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# What was measured. `stage` is "s/3" for stage 3 of MobileViT-S; `mode` is inference, training (forward and backward),
# step (training with an optimizer step) or recipe (a whole step of the paper's recipe); `size` is the image's side in
# pixels; `tokens` is the transformer's number of tokens, in sequences of `sequence` tokens; `clock` is wall or graph,
# see `mvit_kernels.bench.timing`.
SUBJECT = ("suite", "subject", "stage", "mode", "size", "batch", "tokens", "sequence", "dtype", "backend")
IDENTITY = (*SUBJECT, "candidate", "clock")
# `ratio` is the median of eager divided by this median; gflop and mb are a call's minimal work; the percentages are of
# the machine's peak rates in the same run, see `mvit_kernels.bench.ceilings`.
MEASURED = (
    *("median_ms", "p20_ms", "p80_ms", "samples", "ratio", "images_per_s"),
    *("gflop", "mb", "gflop_per_s", "gb_per_s", "percent_product", "percent_bandwidth"),
    *("launches", "peak_mb", "worst", "error", "allowed", "build_s", "note"),
)
ORIGIN = (
    *("device", "device_name", "cpu", "isa", "threads", "driver", "torch", "cuda", "triton", "libraries", "python"),
    *("mvit_kernels", "commit", "date"),
)
COLUMNS = (*IDENTITY, *MEASURED, *ORIGIN)

Row = dict[str, Any]


def row(**known: Any) -> Row:
    """A line with all columns in order; those that are not given are empty. Floats are rounded to four digits.

    Raises:
        ValueError: an unknown column.
    """
    unknown = known.keys() - set(COLUMNS)
    if unknown:
        raise ValueError(f"results: no column is named {', '.join(sorted(unknown))}")
    return {name: _text(known.get(name)) for name in COLUMNS}


def _text(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return "" if value is None else value


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append `rows` to the file, which is created with a header line if it does not exist or is empty.

    They are written at once, and what could not be written as a whole is taken back: whatever happens, the file ends
    with a complete line.

    Raises:
        ValueError: the file has other columns, or ends in the middle of a line.
        OSError: it cannot be written.
    """
    new = _is_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if new:
        writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode("utf-8", "backslashreplace")
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except BaseException:  # Ctrl-C too
            file.truncate(before)
            raise


def check_file(path: Path) -> None:
    """Raise what `append` would, before anything is measured; the folder is created if it does not exist.

    Raises:
        ValueError: the file has other columns, or ends in the middle of a line.
        OSError: the file or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_new(path):
            path.open("ab").close()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".mvit_kernels-"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"results cannot be written there: {error.strerror}", str(path)) from error


def _is_new(path: Path) -> bool:
    """Whether the file is missing or empty; an error if rows cannot be appended to what it has."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        found = next(csv.reader([file.readline().decode("utf-8", "replace")]), [])
        file.seek(-1, os.SEEK_END)
        whole = file.read(1) == b"\n"
    if found != list(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes: move it away, or name another file")
    if not whole:
        raise ValueError(f"{path} ends in the middle of a line: delete that line, or name another file")
    return False


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a file, each with all columns as text; columns that an older file lacks are empty."""
    with path.open(newline="", encoding="utf-8") as file:
        return [dict.fromkeys(COLUMNS, "") | line for line in csv.DictReader(file)]


def key(line: Mapping[str, Any], columns: Iterable[str] = SUBJECT) -> tuple[str, ...]:
    """The values of the columns that identify a line, as text."""
    return tuple(str(line[name]) for name in columns)


def latest(lines: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """For each subject and clock the lines that were measured last, in the order in which the subjects first appear.

    Lines of one subject and date were measured in turns with each other, and are kept together. A date on which no
    candidate was timed does not replace one on which some were.
    """
    lines = list(lines)
    group = functools.partial(key, columns=(*SUBJECT, "clock"))
    last: dict[tuple[str, ...], tuple[bool, str]] = {}
    timed = {(group(line), line["date"]) for line in lines if line["median_ms"] != ""}
    for line in lines:
        when = ((group(line), line["date"]) in timed, line["date"])
        last[group(line)] = max(when, last.get(group(line), when))
    order = {one: index for index, one in enumerate(last)}
    newest = [line for line in lines if line["date"] == last[group(line)][1]]
    return sorted(newest, key=lambda line: order[group(line)])
