# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured in the run whose rows are compared with it.

Example:
    >>> ceilings = measure(torch.float32, "cpu")
    >>> ceilings.gflop_per_s, ceilings.gb_per_s
    (210.4, 31.2)

The rate of products is that of the fastest large square ``torch.mm`` of the dtype (MKL's and cuBLAS's best case), or
on the CPU of a dense 3 × 3 convolution (oneDNN's), on random numbers: zeros run faster. MKL gives AMD's processors
half of their rate in float32: on two cores of a Zen 5 219 GFLOP/s where the convolution has 500, and multiplications
in registers 553. The bandwidth is that of a copy far larger than the caches, bytes read plus bytes written. Both by
the 20th percentile of the times: what the machine can do, which its other users only slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .timing import Timing, interleave

# Sides of the matrices, and elements of the copy; the largest product takes 36 ms on two cores and 1.5 ms on an H100.
SQUARES = {"cpu": (1024, 1536), "cuda": (4096, 8192)}
CONVOLUTION = (256, 56)  # channels in and out, and the side of the map
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
SECONDS = {"cpu": 0.6, "cuda": 0.3}


class Work(NamedTuple):
    """The least that a call can do, whatever its candidate does."""

    gflop: float  # of products, two operations for a multiplication and an addition
    megabytes: float  # every input and weight read once, every result written once


class Ceilings(NamedTuple):
    """The machine's best, and what it is of."""

    gflop_per_s: float
    gb_per_s: float
    timings: dict[str, Timing]  # "product of 1536 × 1536" -> milliseconds, the copy's too
    work: dict[str, Work]  # of each of these

    def amounts(self, name: str) -> dict[str, float]:
        """What one of `timings` did, and its rate, by their columns' names."""
        (gflop, megabytes), ms = self.work[name], self.timings[name].p20
        if gflop:
            return {"gflop": gflop, "gflop_per_s": gflop / ms * 1e3}
        return {"mb": megabytes, "gb_per_s": megabytes / ms}

    def columns(self, work: Work, milliseconds: float) -> dict[str, float]:
        """The rates of a call that does `work` in so long, and per cent of the machine's, by their columns' names."""
        gflop_per_s, gb_per_s = work.gflop / milliseconds * 1e3, work.megabytes / milliseconds
        return {
            "gflop_per_s": gflop_per_s,
            "gb_per_s": gb_per_s,
            "percent_product": 100 * gflop_per_s / self.gflop_per_s,
            "percent_bandwidth": 100 * gb_per_s / self.gb_per_s,
        }


def measure(dtype: torch.dtype, device: str | torch.device = "cpu", *, seconds: float | None = None) -> Ceilings:
    """Measure both rates on `device`, which should do nothing else."""
    kind = torch.device(device).type
    calls: dict[str, Callable[[], object]] = {}
    work: dict[str, Work] = {}
    for side in SQUARES[kind]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = f"product of {side} × {side}"
        calls[name] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        work[name] = Work(2 * side**3 / 1e9, 0.0)
    if kind == "cpu":
        channels, side = CONVOLUTION
        x = torch.randn(1, channels, side, side, device="cpu").to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device="cpu").to(dtype, memory_format=torch.channels_last)
        name = f"product of a 3 × 3 convolution of {channels} channels"
        calls[name] = functools.partial(torch.nn.functional.conv2d, x, weight)
        work[name] = Work(2 * 9 * channels**2 * (side - 2) ** 2 / 1e9, 0.0)
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.zeros_like(source)
    name = f"copy of {source.nbytes / 2**20:.0f} MiB"
    calls[name], work[name] = functools.partial(target.copy_, source), Work(0.0, 2 * source.nbytes / 1e6)
    with torch.no_grad():
        timings = interleave(
            calls, seconds=seconds or SECONDS[kind], warmup_seconds=0.05, sample_seconds=5e-3, device=device
        )
    best = max(one.gflop / timings[n].p20 * 1e3 for n, one in work.items())
    return Ceilings(best, work[name].megabytes / timings[name].p20, timings, work)
