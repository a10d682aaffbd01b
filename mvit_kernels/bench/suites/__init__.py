# SPDX-License-Identifier: Apache-2.0
"""Benchmark suites with a time budget, which ``mvit-kernels bench --suite`` and ``make bench`` run.

Example:
    >>> run(["operators"], device="cpu", minutes=5, folder=Path("benchmarks/results/amd-epyc-zen5"))

A suite is a list of cases, the most valuable first. Each case is one table of candidates that are checked against
float64 and then timed in turns. Its rows are appended to ``<suite>.csv`` in the folder when it is done, so that an
interrupted run keeps its results. A case that would not fit into the rest of the budget, estimated from earlier ones,
is skipped and counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ceilings import Ceilings
from ..origin import environment
from ..results import Row, append, check_file, key, read, row
from . import networks, operators
from ._case import Case, Context
from .selection import Selection, select


class Suite(NamedTuple):
    """A list of cases, and its share of the budget."""

    cases: Callable[[str], list[Case]]  # of a device type, "cpu" or "cuda"
    share: float  # of the budget of all suites
    seconds: Mapping[str, float]  # device type -> measuring time of a case
    least: float  # seconds that the first case takes at least, including building


SUITES = {
    "models": Suite(networks.models, 0.4, {"cpu": 8.0, "cuda": 2.0}, 20.0),
    "operators": Suite(operators.cases, 0.3, {"cpu": 1.0, "cuda": 0.3}, 3.0),
    "mobile": Suite(networks.mobile, 0.1, {"cpu": 0.0, "cuda": 0.0}, 100.0),  # timed by number of runs
    "training": Suite(networks.training, 0.1, {"cpu": 10.0, "cuda": 2.0}, 20.0),
    "blocks": Suite(networks.blocks, 0.1, {"cpu": 2.0, "cuda": 1.0}, 10.0),
}


# Candidates of ours, of which a wrong result is a defect.
OURS = ("accelerated", "frozen", "compile_accelerated", "cpu", "triton", "cuda")


class DeviceLost(RuntimeError):
    """The GPU has returned errors since a candidate ran on it, so this process can do nothing more on it."""


def check_suites(names: Iterable[str]) -> list[str]:
    """`names` in the order of `SUITES`, without repeats; "all" is every suite.

    Raises:
        ValueError: an unknown suite.
    """
    names = list(names)
    for name in names:
        if name not in SUITES and name != "all":
            raise ValueError(f"unknown suite {name!r}; choose from {', '.join(SUITES)}, or all")
    return [name for name in SUITES if name in names or "all" in names]


def cases_of(names: Iterable[str], device: str, selection: Selection | None = None) -> dict[str, list[Case]]:
    """Suite -> the cases of it that are selected, in their order; a suite of which none is, is left out.

    Raises:
        ValueError: an unknown suite; nothing is selected. The error lists what there is.
    """
    found = {name: SUITES[name].cases(device) for name in check_suites(names)}
    everything = [case for cases in found.values() for case in cases]
    what = f"the {'suite' if len(found) == 1 else 'suites'} {', '.join(found)} on {device}"
    chosen = select(everything, selection or Selection(), what)
    kept = {name: [case for case in cases if case in chosen] for name, cases in found.items()}
    return {name: cases for name, cases in kept.items() if cases}


def run(
    names: Iterable[str],
    *,
    device: str,
    minutes: float,
    folder: Path,
    resume: bool = False,
    selection: Selection | None = None,
    seconds: float | None = None,
    measured: Callable[[list[Row]], None] = lambda rows: None,
    progress: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
    **how: Any,
) -> bool:
    """Measure the suites `names` within `minutes`, and append the rows to the files in `folder`.

    Args:
        names: from `SUITES`, or "all".
        device: "cpu" or "cuda".
        minutes: time budget of all suites together. A case that has begun is finished.
        folder: for the files, one per suite; created if it does not exist. It is written to before any work is done.
        resume: skip cases that the files already have from this commit, torch version and device.
        selection: of the cases; None for all.
        seconds: measuring time of a case; None for the suite's own.
        measured: called with the rows of each case, when they are in the file.
        progress: called with each line of text.
        clock: a monotonic clock in seconds; for tests.
        how: ``backend`` and ``memory`` of `Context`.

    Returns:
        Whether every candidate of ours that ran was correct.

    Raises:
        ValueError: an unknown suite; a selection of nothing; a file with other columns; a budget in which nothing can
            be measured.
        OSError: the folder, or a file in it, cannot be written.
        DeviceLost: the GPU returns errors. The case at fault has a row that says so; run again with `resume`.
    """
    chosen = cases_of(names, device, selection)
    origin = environment(device)
    for name in chosen:
        check_file(folder / f"{name}.csv")
    if resume:
        for name, cases in chosen.items():
            chosen[name] = _without_done(cases, name, folder / f"{name}.csv", origin, how)
    _check_budget(chosen, minutes)
    end = clock() + 60 * minutes
    right = True
    names = list(chosen)
    for index, name in enumerate(names):
        shares = [SUITES[n].share for n in names[index:]]
        mine = clock() + (end - clock()) * shares[0] / sum(shares)  # time that an earlier suite left is shared as well
        lasting = seconds or SUITES[name].seconds[device]
        context = Context(device, name, seconds=lasting, progress=progress, clock=clock, **how)
        context.end = mine
        right &= _run_suite(name, chosen[name], context, folder / f"{name}.csv", measured)
    return right


def _check_budget(chosen: Mapping[str, list[Case]], minutes: float) -> None:
    """Raise ValueError if no case would be begun, with the smallest budget in which one would be."""
    needed, names = [], list(chosen)
    for index, name in enumerate(names):
        share = SUITES[name].share / sum(SUITES[n].share for n in names[index:])
        needed += [max(SUITES[name].least, 2 * case.compiles) / share for case in chosen[name]]
    if needed and 60 * minutes < min(needed):
        least = math.ceil(100 * min(needed) / 60 + 0.5) / 100
        what = "no case" if len(names) > 1 or len(chosen[names[0]]) > 1 else "the case"
        raise ValueError(
            f"--budget {minutes:g}: {what} of {', '.join(names)} can be measured in {60 * minutes:.3g} s; "
            f"the smallest useful budget is {least:g} minutes"
        )


def _without_done(
    cases: list[Case], name: str, path: Path, origin: Mapping[str, str], how: Mapping[str, Any]
) -> list[Case]:
    """The cases that the file does not have from this commit, torch version and device."""
    here = ("device_name", "commit", "torch")
    lines = read(path) if path.exists() else []
    lines = [line for line in lines if all(line[column] == origin[column] for column in here)]
    done = {(key(line), line["candidate"].startswith("compile")) for line in lines}
    return [case for case in cases if (key(_subject(case, name, how.get("backend"))), bool(case.compiles)) not in done]


def _subject(case: Case, suite: str, backend: str | None) -> Row:
    return row(suite=suite, **case.subject | ({"backend": backend} if backend else {}))


def _run_suite(
    name: str, cases: list[Case], context: Context, path: Path, measured: Callable[[list[Row]], None]
) -> bool:
    origin = environment(context.device)
    took: list[tuple[float, float]] = []  # (cost, seconds) of each case
    right, left_out = True, 0
    written: list[Ceilings] = []
    for case in cases:
        has_room = context.left >= expected_seconds(case.cost, took, SUITES[name].least)
        if not has_room or (case.compiles and context.build_seconds(case.compiles) is None):
            left_out += 1
            continue
        context.progress(f"{name}: {case.name} ({context.left / 60:.1f} min left)")
        start = context.clock() - context.compiled
        try:
            rows = case.measure(context)
        except (RuntimeError, ValueError) as error:  # out of memory, for example: the next case may be smaller
            note = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            candidate = "compile" if case.compiles else "eager"  # by which `resume` finds the case
            about = _subject(case, name, context.backend)
            rows = [about | {"candidate": candidate, "clock": "wall", "samples": 0, "note": note} | origin]
            context.progress(f"  {note}")
        for dtype, ceilings in context.known_ceilings():
            if ceilings not in written:
                written.append(ceilings)
                rows = _machine_rows(name, dtype, ceilings, origin) + rows
        append(path, rows)
        measured(rows)
        for line in _lines(rows):
            context.progress(line)
        if context.device == "cuda":
            _check_device(case)
            torch.cuda.empty_cache()
        right &= not any(_is_wrong(one) for one in rows)
        took.append((case.cost, context.clock() - context.compiled - start))
    context.progress(f"{name}: {len(took)} cases in {path}; {left_out} skipped, which did not fit into the budget")
    return right


def expected_seconds(cost: float, took: list[tuple[float, float]], least: float) -> float:
    """The estimated seconds of a case of `cost`, without compiling.

    It is the time of the shortest earlier case, which is mostly building, plus the time of all cases beyond that, in
    proportion to their cost. The first case counts as `least`, because it imported the libraries for all.
    """
    if not took:
        return least
    samples = [(took[0][0], least), *took[1:]]
    if len(samples) == 1:
        return least * max(1.0, cost / samples[0][0])
    fixed = min(seconds for _, seconds in samples)
    return fixed + cost * sum(seconds - fixed for _, seconds in samples) / sum(cost for cost, _ in samples)


def _check_device(case: Case) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU was lost in {case.name}: {error}") from error


def _is_wrong(one: Row) -> bool:
    return one["candidate"] in OURS and str(one["note"]).startswith("not timed")


def _machine_rows(suite: str, dtype: torch.dtype, ceilings: Ceilings, origin: dict[str, str]) -> list[Row]:
    """The machine's peak rates, to which the percentages of other rows refer, as rows of their own."""
    rows = []
    for name, timing in ceilings.timings.items():
        known = {"suite": suite, "subject": "machine", "candidate": name, "clock": "wall", "samples": timing.count}
        known |= {"dtype": str(dtype).removeprefix("torch.") if name.startswith("product") else ""}
        known |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
        known |= ceilings.amounts(name)
        rows.append(row(**known, **origin))
    return rows


def _lines(rows: Iterable[Row]) -> list[str]:
    """The rows as readable text, one per line."""
    lines, last = [], ""
    for one in rows:
        if (about := f"{one['subject']} {one['stage']}") != last:
            last = about
            lines.append(f"  {about}")
        if one["median_ms"] == "":
            lines.append(f"    {one['candidate']:<26} {one['clock']:<5} {one['note']}")
            continue
        text = f"    {one['candidate']:<26} {one['clock']:<5} {one['median_ms']:>9} ms"
        if one["ratio"] != "":
            text += f"  {one['ratio']:>6} ×"
        if one["percent_product"] != "":
            text += f"  {one['percent_product']:>5.1f} % of products, {one['percent_bandwidth']:>5.1f} % of bandwidth"
        lines.append(text)
    return lines
