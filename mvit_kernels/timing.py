# SPDX-License-Identifier: Apache-2.0
"""Timing several candidates against each other in one process, and the facts of the place it was done in.

Example:
    >>> times = interleave({"eager": lambda: model(x), "frozen": lambda: frozen(x)}, seconds=5)
    >>> times["eager"].median / times["frozen"].median
    1.8

Candidates take turns, so that a slow minute of the machine (another process, a lower clock) falls on all of them
alike; a comparison of numbers from two runs means nothing on a shared machine. Medians, since the noise has one sign.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from . import __version__

Candidate = Callable[[], object]
MIN_ROUNDS = 3  # the fewest whose median ignores one outlier
# libgomp's threads, which are PyTorch's, spin for 5 ms after a parallel loop in the hope of another one: on cores that
# the threads of another runtime would need by then.
THREADS_ASLEEP = 0.01


class Timing(NamedTuple):
    """Milliseconds a call: the median, the 20th and 80th percentile, and how many samples they are of."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        """The statistics of `samples` (milliseconds), by linear interpolation between neighbours."""
        ordered = sorted(samples)
        if not ordered:
            raise ValueError("Timing.of: no samples")
        return cls(statistics.median(ordered), _percentile(ordered, 0.2), _percentile(ordered, 0.8), len(ordered))


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    warmup_seconds: float = 0.5,
    calls: int = 1,
    pause: float = 0.0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate, one sample of each a round, in an order that is drawn anew for each round.

    Example:
        >>> interleave({"add": lambda: a + b, "mul": lambda: a * b}, rounds=50, calls=1000)
        {'add': Timing(median=0.0011, p20=0.0011, p80=0.0012, count=50), 'mul': ...}

    Drawn, not cyclic: with a fixed cycle one candidate would always find the caches as the same other one left them.
    The draws are seeded; two runs take the same order. On CUDA a sample is taken with events around the calls, after
    the device went idle: the launch of the kernels counts where it is the slower part.

    Args:
        candidates: name -> function without arguments.
        seconds: stop after this much measuring, of all candidates together, but not before three rounds.
        rounds: or take exactly so many rounds. One of the two is wanted.
        warmup_seconds: each candidate is called for so long first, untimed, and once at least.
        calls: calls a sample; its time is divided by them. Above 1 for what takes microseconds.
        pause: seconds of idleness before each sample, so that the threads of the candidate before are asleep; see
            `THREADS_ASLEEP`.
        device: where the candidates run: "cpu" or "cuda".
        progress: called after each round with the number of rounds done and the seconds measured.
        clock: seconds, monotonic; for tests.

    Returns:
        name -> `Timing`, in the order of `candidates`.

    Raises:
        ValueError: no candidates, neither or both of `seconds` and `rounds`, or one of them not positive.
    """
    if not candidates:
        raise ValueError("interleave: candidates is empty; give at least one function")
    if (seconds is None) == (rounds is None):
        raise ValueError("interleave: give either seconds or rounds")
    for name, value in (("seconds", seconds), ("rounds", rounds), ("calls", calls)):
        if value is not None and not value > 0:
            raise ValueError(f"interleave: {name} is {value!r}; a positive number is wanted")

    for function in candidates.values():
        _warm_up(function, warmup_seconds, device, clock)
    sample = _cuda_sample if torch.device(device).type == "cuda" else functools.partial(_cpu_sample, clock=clock)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    start, done = clock(), 0
    while done < rounds if rounds is not None else done < MIN_ROUNDS or clock() - start < seconds:
        draw.shuffle(order)
        for name in order:
            if pause:
                time.sleep(pause)
            samples[name].append(sample(candidates[name], calls))
        done += 1
        if progress is not None:
            progress(done, clock() - start)
    return {name: Timing.of(values) for name, values in samples.items()}


def synchronize(device: str | torch.device) -> None:
    """Wait until everything that was launched on `device` is done; nothing to wait for on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(function: Candidate, seconds: float, device: str | torch.device, clock: Callable[[], float]) -> None:
    start = clock()
    while True:
        function()
        synchronize(device)
        if clock() - start >= seconds:
            return


def _cpu_sample(function: Candidate, calls: int, *, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) * 1e3 / calls


def _cuda_sample(function: Candidate, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _percentile(ordered: list[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


# --------------------------------------------------------------------------------------------------- where, and when


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """What a row of results must tell about its origin: device, threads, versions, commit and date.

    Example:
        >>> environment()["device_name"]
        'AMD EPYC 7763 64-Core Processor'
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "mvit_kernels": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _commit() -> str:
    """The commit of this checkout, "+" behind it where files differ from it; "" where the package is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps into the environment of another project's checkout
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
