# SPDX-License-Identifier: Apache-2.0
"""Timing in turns: its order, warm-up, number of samples, and statistics."""

import random

import numpy as np
import pytest

from mvit_kernels.bench.timing import Timing, interleave


class Clock:
    """A clock that only candidates advance."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def candidate(self, name, *seconds):
        """A function that takes `seconds` in turn, over and over."""
        state = {"calls": 0}

        def run():
            self.now += seconds[state["calls"] % len(seconds)]
            state["calls"] += 1
            self.log.append(name)

        return run


def test_timing_statistics_are_numpys():
    for count in (1, 2, 3, 10, 101):
        draw = random.Random(count)
        samples = [draw.random() for _ in range(count)]
        expected = np.percentile(samples, (50, 20, 80))
        assert Timing.of(samples)[:3] == pytest.approx(expected) and Timing.of(samples).count == count


def test_interleave_takes_turns_and_takes_medians():
    clock = Clock()
    candidates = {"a": clock.candidate("a", 0.001, 0.002, 0.009), "b": clock.candidate("b", 0.004)}
    candidates["c"] = clock.candidate("c", 0.1)
    times = interleave(candidates, rounds=30, warmup_seconds=0.0, clock=lambda: clock.now)
    assert list(times) == ["a", "b", "c"]
    assert times["a"] == pytest.approx((2.0, 1.0, 9.0, 30)) and times["b"] == pytest.approx((4.0, 4.0, 4.0, 30))
    assert clock.log[:3] == ["a", "b", "c"]  # one call each for warming up
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, len(clock.log), 3)]
    assert len(rounds) == 30 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3, "every round has the same order, so that each candidate has one predecessor"


def test_interleave_warms_up_by_time_and_stops_by_time():
    clock, seen = Clock(), []
    candidates = {"slow": clock.candidate("slow", 0.5), "fast": clock.candidate("fast", 0.1)}
    times = interleave(
        candidates, seconds=5.9, warmup_seconds=1.0, clock=lambda: clock.now, progress=lambda *done: seen.append(done)
    )
    warm_up = clock.log[:12]
    assert warm_up.count("slow") == 2 and warm_up.count("fast") == 10
    assert times["slow"].count == times["fast"].count == 10
    assert seen[-1] == (10, pytest.approx(6.0))
    times = interleave({"slow": clock.candidate("slow", 50.0)}, seconds=1.0, warmup_seconds=0, clock=lambda: clock.now)
    assert times["slow"].count == 3  # a median of fewer would be one outlier


def test_interleave_divides_by_the_calls_of_a_sample():
    clock = Clock()
    times = interleave(
        {"a": clock.candidate("a", 0.003)}, rounds=2, calls=10, warmup_seconds=0, clock=lambda: clock.now
    )
    assert times["a"] == pytest.approx((3.0, 3.0, 3.0, 2)) and len(clock.log) == 21


def test_interleave_makes_samples_as_long_as_asked():
    clock = Clock()
    candidates = {"short": clock.candidate("short", 0.001), "long": clock.candidate("long", 0.5)}
    times = interleave(candidates, rounds=3, sample_seconds=0.01, warmup_seconds=0, clock=lambda: clock.now)
    assert times["short"] == pytest.approx((1.0, 1.0, 1.0, 3)) and times["long"] == pytest.approx((500.0,) * 3 + (3,))
    assert (
        clock.log.count("short") == 1 + 1 + 3 * 10 and clock.log.count("long") == 1 + 1 + 3
    )  # warm-up, trial, samples


@pytest.mark.parametrize(
    "candidates, options",
    [({}, {"rounds": 1}), ({"a": list}, {}), ({"a": list}, {"rounds": 1, "seconds": 1}), ({"a": list}, {"rounds": 0})],
)
def test_interleave_refuses(candidates, options):
    with pytest.raises(ValueError, match="interleave: "):
        interleave(candidates, **options)
