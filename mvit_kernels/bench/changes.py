# SPDX-License-Identifier: Apache-2.0
"""What changed beyond the noise between two sets of results: ``mvit-kernels bench --compare OLD NEW``.

Example:
    >>> found = changes(load("old.csv"), load("new.csv"))
    >>> print(report(found))
    slower  mobilevit_s inference 256 1 float32: openvino  40.0 -> 60.0 ms, +36.4 %
    5 in both: 1 slower, 4 same

Rows with the same identity, device and number of threads are compared. A candidate has moved if its ranges do not
overlap and its median differs by more than `least` percent. The range of a candidate that was measured once is that
from its 20th to its 80th percentile; of one measured in several rounds (`mvit_kernels.bench.commits`), that of the
rounds' medians. Two runs on a shared machine differ because of its other users, so times are taken relative to the
median of eager in the same turns (except eager's own). Candidates that were timed before and are not now, or the
reverse, are found too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import results

KEY = (*results.IDENTITY, "device_name", "cpu", "threads")
ORDER = ("wrong", "lost", "slower", "faster", "new", "same")  # of the report, what to look at first

Line = dict[str, str]
Range = tuple[float, float, float]  # median, low, high


class Change(NamedTuple):
    """One candidate before and after."""

    verdict: str  # one of `ORDER`
    line: Line  # a row of it, by which it is identified
    old_ms: float | None
    new_ms: float | None
    old: Range | None = None  # relative to eager's median, or ms
    new: Range | None = None
    note: str = ""  # why a time is missing

    @property
    def factor(self) -> float:
        """New time divided by old time, each relative to eager's; nan if one is missing."""
        return self.new[0] / self.old[0] if self.old and self.new else float("nan")

    @property
    def about(self) -> str:
        """What was measured, and the candidate."""
        kept = ("subject", "stage", "mode", "size", "batch", "dtype")
        about = " ".join(value for value in results.key(self.line, kept) if value)
        clock = "" if self.line["clock"] == "wall" else f" ({self.line['clock']})"
        return f"{about}: {self.line['candidate']}{clock}"

    def __str__(self) -> str:
        line = f"{self.verdict:<7} {self.about}"
        if self.old_ms is None or self.new_ms is None:
            return f"{line}  {self.note}"
        return f"{line}  {self.old_ms:.4g} -> {self.new_ms:.4g} ms, {100 * (self.factor - 1):+.1f} %"

    @property
    def columns(self) -> dict[str, Any]:
        """As one line of a table: the identity, the verdict, both times and their quotient."""
        identity = dict(zip(KEY, results.key(self.line, KEY), strict=True))
        factor = None if self.old_ms is None or self.new_ms is None else float(f"{self.factor:.4g}")
        times = {"verdict": self.verdict, "old_ms": self.old_ms, "new_ms": self.new_ms, "factor": factor}
        return {**identity, **times, "note": self.note}


def load(what: str, root: Path) -> list[Line]:
    """The newest rows of a file, a folder, or a commit; without those of the machine's own rates.

    Args:
        what: a CSV file, a folder of them, or the first digits of a commit.
        root: the folder with the results that are searched for a commit.

    Raises:
        ValueError: there are no such rows.
    """
    path = Path(what)
    if path.is_dir() or path.is_file():
        files: Iterable[Path] = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
        wanted: Callable[[Line], bool] = lambda line: True  # noqa: E731
    else:
        files, wanted = sorted(root.rglob("*.csv")), lambda line: bool(what) and line["commit"].startswith(what)
    try:
        lines = [line for file in files for line in results.latest(filter(wanted, results.read(file)))]
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not a CSV file of results") from None
    lines = [line for line in lines if line["subject"] not in ("", "machine")]
    if not lines:
        raise ValueError(f"{what} is not a result file, a folder with results or a commit in {root}")
    return lines


def changes(old: list[Line], new: list[Line], *, absolute: bool = False, least: float = 3.0) -> list[Change]:
    """The change of each candidate that is in both sets, in the order of `ORDER`.

    Args:
        old, new: rows, as `load` returns them; or with rows of several rounds.
        absolute: compare times as they are, not relative to eager's.
        least: change of the median in percent below which a candidate is "same".
    """
    then, now = _by_key(old), _by_key(new)
    bases = _eager(old), _eager(new)
    found = []
    for key in (key for key in then if key in now):
        a, b = (_timed(lines) for lines in (then[key], now[key]))
        if not (a and b):
            if a or b:
                note = then[key][-1]["note"] if b else now[key][-1]["note"]
                verdict = "new" if b else "wrong" if note.startswith("not timed") else "lost"
                found.append(Change(verdict, then[key][-1], _median_ms(a), _median_ms(b), note=note))
            continue
        before, after = (_range(lines, eager, absolute) for lines, eager in zip((a, b), bases, strict=True))
        factor = after[0] / before[0]
        apart = after[1] > before[2] or after[2] < before[1]
        moved = apart and abs(factor - 1) > least / 100
        verdict = ("slower" if factor > 1 else "faster") if moved else "same"
        found.append(Change(verdict, a[-1], _median_ms(a), _median_ms(b), before, after))
    return sorted(found, key=lambda change: ORDER.index(change.verdict))


def report(found: Iterable[Change], everything: bool = False) -> str:
    """The changes as text, one a line, and their number; `everything` also lists what did not change."""
    found = list(found)
    lines = [str(change) for change in found if everything or change.verdict != "same"]
    counts = [f"{count} {v}" for v in ORDER if (count := sum(change.verdict == v for change in found))]
    return "\n".join([*lines, f"{len(found)} in both: {', '.join(counts)}"])


def _by_key(lines: list[Line]) -> dict[tuple[str, ...], list[Line]]:
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(results.key(line, KEY), []).append(line)
    return found


def _eager(lines: list[Line]) -> dict[tuple[tuple[str, ...], str], Line]:
    return {(results.key(line, KEY), line["date"]): line for line in lines if line["candidate"] == "eager"}


def _timed(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["median_ms"] != ""]


def _median_ms(lines: list[Line]) -> float | None:
    return statistics.median(float(line["median_ms"]) for line in lines) if lines else None


def _range(lines: list[Line], eager: dict[tuple[tuple[str, ...], str], Line], absolute: bool) -> Range:
    """The median of the rounds and their range; of one round its percentiles. Relative to eager's median in the same
    turns, if there is one."""
    rounds = []
    for line in lines:
        base = eager.get((results.key(line | {"candidate": "eager"}, KEY), line["date"]))
        relative = not absolute and line["candidate"] != "eager" and base is not None and base["median_ms"]
        unit = float(base["median_ms"]) if relative else 1.0
        rounds.append(tuple(float(line[name]) / unit for name in ("median_ms", "p20_ms", "p80_ms")))
    if len(rounds) == 1:
        return rounds[0]
    medians = [one[0] for one in rounds]
    return statistics.median(medians), min(medians), max(medians)
