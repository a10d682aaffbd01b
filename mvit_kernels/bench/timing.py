# SPDX-License-Identifier: Apache-2.0
"""Timing several candidates against each other in one process.

Example:
    >>> times = interleave({"eager": lambda: model(x), "frozen": lambda: frozen(x)}, seconds=5)
    >>> times["eager"].median / times["frozen"].median
    1.8

Runs are interleaved: candidates take turns, so that a slow minute of the machine (another process, a lower clock)
affects all of them alike. Numbers from two separate runs cannot be compared on a shared machine. Times are medians,
because noise only ever makes a call slower.

There are two clocks. The wall clock counts what a caller waits for: Python, the dispatcher, kernel launches, and the
device until it is idle again. The device clock (`interleave(..., events=True)` on replays of CUDA graphs, see
`mvit_kernels.bench.device_clock`) counts the kernels alone. On the CPU the two are the same.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

Candidate = Callable[[], object]
MIN_ROUNDS = 3  # the smallest number whose median ignores one outlier
# The threads of libgomp, PyTorch's OpenMP runtime, spin for 5 ms after a parallel loop in case another one follows, and
# occupy cores that the threads of another runtime may need by then. Seconds after which they are asleep:
THREADS_ASLEEP = 0.01


class Timing(NamedTuple):
    """Milliseconds per call: the median, the 20th and 80th percentile, and the number of samples."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        """The statistics of `samples` (milliseconds); percentiles are interpolated linearly between neighbors."""
        ordered = sorted(samples)
        if not ordered:
            raise ValueError("Timing.of: no samples")
        return cls(statistics.median(ordered), _percentile(ordered, 0.2), _percentile(ordered, 0.8), len(ordered))

    def per(self, calls: int) -> Timing:
        """The same statistics per call, for samples of `calls` calls each."""
        return Timing(self.median / calls, self.p20 / calls, self.p80 / calls, self.count)


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    warmup_seconds: float = 0.5,
    calls: int = 1,
    sample_seconds: float = 0.0,
    pause: float = 0.0,
    device: str | torch.device = "cpu",
    events: bool = False,
    progress: Callable[[int, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate in interleaved runs: one sample of each per round, in a new random order each round.

    Example:
        >>> interleave({"add": lambda: a + b, "mul": lambda: a * b}, rounds=50, calls=1000)
        {'add': Timing(median=0.0011, p20=0.0011, p80=0.0012, count=50), 'mul': ...}

    The order is random and not cyclic: in a fixed cycle a candidate would always find the caches as the same other one
    left them. It is seeded, so two runs take the same order. On CUDA a sample begins and ends with an idle device, so
    that launch overhead counts where launching is slower than the kernels.

    Args:
        candidates: name -> function without arguments.
        seconds: stop after this much measuring time of all candidates together, but not before three rounds.
        rounds: take exactly this many rounds instead. Give one of the two.
        warmup_seconds: warm-up: each candidate is first called for this long, at least once, without timing.
        calls: calls per sample; the time is divided by it. Use more than 1 for calls that take microseconds.
        sample_seconds: take as many more calls per sample as make it this long, judged by a trial after the warm-up, so
            that the cost of reading the clock and, on CUDA, of waiting for the device is small.
        pause: idle seconds before each sample, after which the previous candidate's threads are asleep; see
            `THREADS_ASLEEP`.
        device: where the candidates run: "cpu" or "cuda".
        events: on CUDA, measure device time with events around the calls.
        progress: called after each round with the number of rounds done and the seconds measured.
        clock: a monotonic clock in seconds; for tests.

    Returns:
        name -> `Timing` (milliseconds per call), in the order of `candidates`.

    Raises:
        ValueError: no candidates; neither or both of `seconds` and `rounds`; `seconds`, `rounds` or `calls` is not
            positive.
    """
    if not candidates:
        raise ValueError("interleave: candidates is empty; give at least one function")
    if (seconds is None) == (rounds is None):
        raise ValueError("interleave: give either seconds or rounds")
    for name, value in (("seconds", seconds), ("rounds", rounds), ("calls", calls)):
        if value is not None and not value > 0:
            raise ValueError(f"interleave: {name} is {value!r}; a positive number is wanted")

    on_gpu = torch.device(device).type == "cuda"
    sample = functools.partial(_wall_sample, device=device, clock=clock)
    if on_gpu and events:
        sample = _device_sample
    count: dict[str, int] = {}
    for name, function in candidates.items():
        _warm_up(function, warmup_seconds, device, clock)
        # A trial of one call, because the first calls of the warm-up may have compiled.
        count[name] = (
            max(calls, round(sample_seconds * 1e3 / max(sample(function, 1), 1e-6))) if sample_seconds else calls
        )
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    start, done = clock(), 0
    while done < rounds if rounds is not None else done < MIN_ROUNDS or clock() - start < seconds:
        draw.shuffle(order)
        for name in order:
            if pause:
                time.sleep(pause)
            samples[name].append(sample(candidates[name], count[name]))
        done += 1
        if progress is not None:
            progress(done, clock() - start)
    return {name: Timing.of(values) for name, values in samples.items()}


def synchronize(device: str | torch.device) -> None:
    """Wait until everything that was launched on `device` is done; does nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(function: Candidate, seconds: float, device: str | torch.device, clock: Callable[[], float]) -> None:
    start = clock()
    while True:
        function()
        synchronize(device)
        if clock() - start >= seconds:
            return


def _wall_sample(function: Candidate, calls: int, *, device: str | torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    for _ in range(calls):
        function()
    synchronize(device)
    return (clock() - start) * 1e3 / calls


def _device_sample(function: Candidate, calls: int) -> float:
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
