# SPDX-License-Identifier: Apache-2.0
"""Build, check and measure everything on a machine with a GPU: what `benchmarks/gpu.sh` runs. See there.

The order and the shares of the budget are `STEPS`. Time that a step leaves is shared by those behind it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import steps
from faults import fault
from machine import ROOT, Machine
from runner import LEAST, Cut, Runner

MOST_FILES, MOST_BYTES = 8, 16 * 2**20  # of what comes back


class Step(NamedTuple):
    """A step, and its share of the budget among those that are left."""

    run: Callable[[Machine, float], None]
    share: float
    on_cpu: bool = False


# Shares are about what each took on an H200's host with 16 cores, in seconds: libraries load in 10, the cache is warm
# after 37, small cases of the CUDA kernels took 24, the operators' tests 92 and were not done, networks 48, suites 60.
STEPS = {
    "library": Step(Machine.library, 100, on_cpu=True),
    "warm": Step(steps.warm, 45),
    "fault": Step(fault, 120),
    "correctness": Step(steps.correctness, 45, on_cpu=True),
    "verify": Step(steps.verify, 40),
    "tests": Step(steps.tests, 100),
    "speed": Step(steps.speed, 100, on_cpu=True),
    "compiled": Step(steps.compiled, 110),
    "counters": Step(steps.counters, 45),
    "sanitizer": Step(steps.sanitizer, 60),
}


def chosen(text: str) -> tuple[list[str], list[str]]:
    """The steps that are asked for, in their order; and words that are none."""
    words = text.split() or list(STEPS)
    return [name for name in STEPS if name in words], [word for word in words if word not in STEPS]


def run(machine: Machine, names: list[str]) -> None:
    runner = machine.runner
    if not machine.ask():
        runner.note("nothing can be done: the budget or the interpreter does not suffice", bad=True)
        raise SystemExit(2)
    machine.describe()
    if machine.device == "cpu":
        names = [name for name in names if STEPS[name].on_cpu]
    for index, name in enumerate(names):
        rest = [STEPS[other].share for other in names[index:]]
        seconds = runner.left * rest[0] / sum(rest)
        if seconds < LEAST:
            runner.note(f"{name}: skipped, the budget is spent")
            continue
        try:
            if runner.cut:
                raise Cut(runner.cut)
            STEPS[name].run(machine, seconds)
        except Exception as error:  # a defect of a step is no reason to lose the others
            runner.note(f"{name}: FAILED: {type(error).__name__}: {error}", bad=True)
            runner.stop()


def finish(runner: Runner) -> None:
    """The last lines of the report, and no more files than come back."""
    for path in sorted(runner.folder.glob("*.csv")):
        with path.open(encoding="utf-8", errors="replace") as lines:
            runner.note(f"{path.name}: {max(sum(1 for _ in lines) - 1, 0)} rows")
    for path in [*runner.folder.glob("*.core"), *runner.folder.glob("blocks.csv")]:
        files = [p for p in runner.folder.iterdir() if p.is_file()]
        if len(files) > MOST_FILES or path.stat().st_size > MOST_BYTES:
            path.unlink()
            runner.note(f"{path.name}: deleted, since {MOST_FILES} files of {MOST_BYTES >> 20} MiB come back")
    runner.note(f"done; bad: {int(runner.bad)}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="See the head of the script.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT") or "gpu_results"))
    parser.add_argument("minutes", nargs="?", type=float, default=float(os.environ.get("BUDGET") or 9))
    given = parser.parse_args(arguments)
    names, unknown = chosen(os.environ.get("STEPS", ""))
    if unknown:
        parser.error(f"STEPS: there is no {', '.join(unknown)}; choose from {' '.join(STEPS)}")
    try:
        runner = Runner(given.folder.resolve(), given.minutes)
    except OSError as error:
        parser.error(f"{given.folder}: {error.strerror}")
    os.chdir(ROOT)
    commit = os.environ.get("MVIT_KERNELS_COMMIT", "")
    runner.note(" ".join(["mvit_kernels", *filter(None, [commit]), f"for {given.minutes:g} minutes:", *names]))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: setattr(runner, "cut", signal.Signals(number).name))
    try:
        run(Machine(runner, os.environ.get("PYTHON") or sys.executable), names)
    except Cut as why:
        runner.note(f"cut from outside by {why}", bad=True)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        runner.stop()
        finish(runner)
    return int(runner.bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
