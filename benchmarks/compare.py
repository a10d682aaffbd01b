# SPDX-License-Identifier: Apache-2.0
"""List what changed beyond the noise between two sets of results.

    python benchmarks/compare.py OLD NEW [--absolute] [--least PERCENT] [--all]

OLD and NEW are each a CSV file, a folder of CSV files, or a commit (its first digits), whose rows are then searched for
in ``benchmarks/results``. Rows with the same identity, device and number of threads are compared, the newest of each
set.

A candidate has moved if its ranges from the 20th to the 80th percentile do not overlap and its median differs by more
than `--least` percent. Two runs on a shared machine differ because of its other users, so times are taken relative to
the median of eager in the same turns (except eager's own); ``--absolute`` compares times as they are. Candidates that
were timed before and are not now, or the reverse, are listed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mvit_kernels.bench import results

RESULTS = Path(__file__).resolve().parent / "results"
KEY = (*results.IDENTITY, "device_name", "cpu", "threads")

Line = dict[str, str]


class Change(NamedTuple):
    """One candidate before and after."""

    key: tuple[str, ...]
    verdict: str  # faster, slower, same, lost, new, wrong
    old: Line
    new: Line
    factor: float  # new time divided by old time, each relative to eager's; nan if one is missing


def load(what: str, root: Path = RESULTS) -> list[Line]:
    """The newest rows of a file, a folder, or a commit; without those of the machine's own rates.

    Raises:
        ValueError: there are no such rows.
    """
    path = Path(what)
    if path.is_dir() or path.is_file():
        files: Iterable[Path] = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
        wanted: Callable[[Line], bool] = lambda line: True  # noqa: E731
    else:
        files, wanted = sorted(root.rglob("*.csv")), lambda line: bool(what) and line["commit"].startswith(what)
    lines = [line for file in files for line in results.latest(filter(wanted, results.read(file)))]
    lines = [line for line in lines if line["subject"] not in ("", "machine")]
    if not lines:
        raise ValueError(f"{what} is not a result file, a folder with results or a commit in {root}")
    return lines


def changes(old: list[Line], new: list[Line], *, absolute: bool = False, least: float = 3.0) -> list[Change]:
    """The change of each candidate that is in both sets.

    Args:
        old, new: rows, as `load` returns them.
        absolute: compare times as they are, not relative to eager's.
        least: change of the median in percent below which a candidate is "same".
    """
    then, now = ({results.key(line, KEY): line for line in lines} for lines in (old, new))
    found = []
    for key in (key for key in then if key in now):
        a, b = then[key], now[key]
        if not (a["median_ms"] and b["median_ms"]):
            if a["median_ms"] or b["median_ms"]:
                verdict = ("wrong" if b["note"].startswith("not timed") else "lost") if a["median_ms"] else "new"
                found.append(Change(key, verdict, a, b, float("nan")))
            continue
        before, after = (_interval(line, set_, absolute) for line, set_ in ((a, then), (b, now)))
        factor = after[0] / before[0]
        apart = after[1] > before[2] or after[2] < before[1]
        moved = apart and abs(factor - 1) > least / 100
        found.append(Change(key, ("slower" if factor > 1 else "faster") if moved else "same", a, b, factor))
    return found


def _interval(line: Line, lines: dict[tuple[str, ...], Line], absolute: bool) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile), relative to eager's median in the same turns if there is one."""
    eager = lines.get(results.key(line | {"candidate": "eager"}, KEY))
    relative = not absolute and line["candidate"] != "eager" and eager is not None and eager["median_ms"]
    unit = float(eager["median_ms"]) if relative else 1.0
    median, low, high = (float(line[name]) / unit for name in ("median_ms", "p20_ms", "p80_ms"))
    return median, low, high


def text(change: Change) -> str:
    """The change as one readable line."""
    a, b = change.old, change.new
    kept = ("subject", "stage", "mode", "size", "batch", "dtype")
    about = " ".join(value for value in results.key(a, kept) if value)
    clock = "" if a["clock"] == "wall" else f" ({a['clock']})"
    line = f"{change.verdict:<7} {about}: {a['candidate']}{clock}"
    if not (a["median_ms"] and b["median_ms"]):
        return f"{line}  {b['note'] or a['note']}"
    return f"{line}  {a['median_ms']} -> {b['median_ms']} ms, {100 * (change.factor - 1):+.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--absolute", action="store_true", help="compare absolute times, not times relative to eager's")
    parser.add_argument(
        "--least", type=float, default=3.0, metavar="PERCENT", help="ignore changes below this (default: 3)"
    )
    parser.add_argument("--all", action="store_true", help="also list what did not change")
    args = parser.parse_args()
    try:
        found = changes(load(args.old), load(args.new), absolute=args.absolute, least=args.least)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not found:
        print("compare: the two have no row with the same subject, candidate and device", file=sys.stderr)
        return 2
    order = ("wrong", "lost", "slower", "faster", "new", "same")
    for change in sorted(found, key=lambda change: order.index(change.verdict)):
        if args.all or change.verdict != "same":
            print(text(change))
    counts = ", ".join(f"{sum(c.verdict == v for c in found)} {v}" for v in order if any(c.verdict == v for c in found))
    print(f"{len(found)} in both: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
