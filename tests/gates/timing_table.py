# SPDX-License-Identifier: Apache-2.0
"""The launches that were measured on an H200 beside what `gates.timing` predicts of a checkout's kernels.

Example:
    $ git worktree add ../measured b167d52       # the last commit whose kernels are those that were measured
    $ cd ../measured/tests && python -m gates.timing_table         # writes tests/data/timing.csv
    $ python -m gates.timing_table --dry --only patch_attention    # of the kernels here

`microseconds` and `issue` (per cent of the issue slots) were measured: with ncu, which empties the caches before, or as
medians of replayed graphs (docs/kernels/measured.md). Everything behind them is predicted.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gates import table, timing
from support import ROOT, TESTS
from support.sass.launches import cuda_launches
from support.sass.pipes import Machine

TABLE = TESTS / "data" / "timing.csv"
COLUMNS = (
    *("backend", "operator", "batch", "side", "width", "measured", "microseconds", "issue", "predicted", "ratio"),
    *("predicted_issue", "tensor", "shared", "special", "resident", "first_wait", "second_wait"),
)


def row(known: dict) -> dict[str, object]:
    """A row with today's prediction."""
    sizes = (known["operator"], *(int(known[name]) for name in ("batch", "side", "width")))
    if known["backend"] == "triton":
        from support.sass.triton_launches import triton_launches

        launches = triton_launches(*sizes)
    else:
        launches = [(launch, timing.cubin(launch.kernel)) for launch in cuda_launches(*sizes)]
    found = [timing.predicted(launch, Machine(), file) for launch, file in launches]
    first, microseconds = found[0], sum(each.microseconds for each in found)
    by_reason = first.result.waits.sum(0)
    waits = [timing.REASONS[k] for k in by_reason.argsort()[::-1] if timing.REASONS[k] != "issued"]
    return known | {
        "predicted": f"{microseconds:.1f}",
        "ratio": f"{microseconds / float(known['microseconds']):.2f}",
        "predicted_issue": round(100 * first.issue),
        "tensor": round(100 * first.busy("tensor")),
        "shared": round(100 * first.busy("shared memory")),
        "special": round(100 * first.busy("special")),
        "resident": first.resident,
        "first_wait": waits[0],
        "second_wait": waits[1],
    }


def spread(rows: list[dict], backend: str) -> float:
    """The root mean square of the logarithms of predicted / measured."""
    logs = [math.log(float(each["ratio"])) for each in rows if each["backend"] == backend]
    return math.sqrt(sum(log * log for log in logs) / max(len(logs), 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="gates.timing_table", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="print, and write no table")
    parser.add_argument("--only", default="", help="operators that have this in their name")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose kernels are timed")
    given = parser.parse_args()
    timing.use(given.root)
    known = table.committed(TABLE)
    shown = [row(each) for each in known if given.only in each["operator"]]
    by_sizes = {tuple(each[name] for name in COLUMNS[:5]): each for each in (*known, *shown)}
    table.publish(shown if given.dry else by_sizes.values(), TABLE, COLUMNS, dry=given.dry)
    for backend in ("cuda", "triton"):
        print(f"{backend}: {spread(shown, backend):.3f} root mean square of log(predicted / measured)")


if __name__ == "__main__":
    main()
