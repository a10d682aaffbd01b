# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: one `Result` a candidate, as a table of text and as rows of results.

Example:
    >>> print(table(compare(Subject(model, images), ["eager", "frozen"])))
    candidate  median ms          p20 - p80  ratio    error  allowed
    eager          60.18      58.90 - 63.02   1.00  2.1e-06  5.0e-06
    ...
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..verification import ErrorRow
from .ceilings import Ceilings, Work
from .peers import Subject
from .results import Row, row
from .timing import Timing


class Result(NamedTuple):
    """One line of the table. It has no times if the candidate was not timed; `note` says why."""

    candidate: str
    timing: Timing | None = None  # wall clock
    ratio: float | None = None  # eager's median divided by this one's: above 1 is faster than eager
    row: ErrorRow | None = None  # the output or gradient closest to its limit, or beyond it
    build_seconds: float = 0.0  # until the end of the first call, including compilation
    peak_mb: float | None = None  # peak memory of one call in MiB, see `mvit_kernels.bench.peak_memory`
    note: str = ""
    launches: int | None = None  # kernel launches of one call on a GPU
    graph: Timing | None = None  # device clock, see `mvit_kernels.bench.device_clock`
    graph_ratio: float | None = None
    graph_note: str = ""  # why there is no `graph`


def table(results: list[Result]) -> str:
    """The results as a text table, one line per candidate; those without times say why. Times are in ms."""
    width = max(len("candidate"), *(len(result.candidate) for result in results))
    header = f"{'candidate':<{width}}  {'median ms':>9}  {'p20 - p80':>17}  {'ratio':>5}  {'error':>7}  {'allowed':>7}"
    lines = [header + "   peak MiB" * any(result.peak_mb is not None for result in results)]
    for result in results:
        line = f"{result.candidate:<{width}}"
        if result.timing is not None:
            timing = result.timing
            spread = f"{timing.p20:.2f} - {timing.p80:.2f}"
            ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
            line += f"  {timing.median:9.2f}  {spread:>17}  {ratio:>5}"
            line += f"  {result.row.error:7.1e}  {result.row.allowed:7.1e}"
            line += "" if result.peak_mb is None else f"  {result.peak_mb:9.1f}"
        lines.append(f"{line}  {result.note}".rstrip())
    return "\n".join(lines)


def csv_rows(
    results: list[Result], subject: Subject, model: str, origin: dict[str, str], /, **more: object
) -> list[Row]:
    """The results in long form (see `rows_of`), with the columns that follow from `subject`."""
    batch, _, height, width = subject.images.shape
    identity = {
        "subject": model,
        "mode": subject.mode,
        "size": str(height) if height == width else f"{height}x{width}",
        "batch": batch,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "backend": subject.backend or "auto",
    }
    return rows_of(results, origin, **identity | more)


def rows_of(
    results: Iterable[Result],
    origin: dict[str, str],
    *,
    work: Work | None = None,
    ceilings: Ceilings | None = None,
    **identity: object,
) -> list[Row]:
    """One row per candidate, and on a GPU a second one for the device clock, with `results.COLUMNS`.

    Args:
        origin: `mvit_kernels.bench.origin.environment()`.
        work: minimal work of one call.
        ceilings: peak rates of the machine.
        identity: the columns that identify the subject.
    """
    rows = []
    for result in results:
        clocks = [("wall", result.timing, result.ratio, result.note)]
        if result.graph is not None or result.graph_note:
            clocks.append(("graph", result.graph, result.graph_ratio, result.graph_note))
        for clock, timing, ratio, note in clocks:
            known = {"candidate": result.candidate, "clock": clock, "samples": 0, "note": note} | identity
            if work is not None:
                known |= {"gflop": work.gflop, "mb": work.megabytes}
            if timing is not None:
                known |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
                known |= {"samples": timing.count, "ratio": ratio}
                if identity.get("batch"):
                    known["images_per_s"] = float(identity["batch"]) / timing.median * 1e3
                if work is not None and ceilings is not None:
                    known |= ceilings.columns(work, timing.median)
            if result.row is not None:
                known |= {"worst": result.row.name, "error": result.row.error, "allowed": result.row.allowed}
            known |= {"build_s": result.build_seconds, "peak_mb": result.peak_mb, "launches": result.launches}
            rows.append(row(**known, **origin))
    return rows
