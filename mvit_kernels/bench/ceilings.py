# SPDX-License-Identifier: Apache-2.0
"""The machine's peak rates of arithmetic and memory, measured in the same run as the rows that refer to them.

Example:
    >>> ceilings = measure(torch.float32, "cpu")
    >>> ceilings.gflop_per_s, ceilings.gb_per_s
    (210.4, 31.2)

The rate of products, in GFLOP/s, is that of the fastest large square ``torch.mm`` of the dtype (the best case of MKL
and cuBLAS) or, on the CPU, of a dense 3 × 3 convolution (oneDNN's). Operands are random, because zeros run faster. MKL
reaches half of the float32 rate of AMD's processors: 219 GFLOP/s on two cores of a Zen 5, where the convolution reaches
500, and multiplications in registers 553. The bandwidth, in GB/s, is that of a copy far larger than the caches, bytes
read plus bytes written. Both are taken from the 20th percentile of the times, because other users of the machine can
only slow it down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .timing import Timing, interleave

# Sides of the square matrices. The largest product takes 36 ms on two cores and 1.5 ms on an H100.
SQUARES = {"cpu": (1024, 1536), "cuda": (4096, 8192)}
CONVOLUTION = (256, 56)  # channels (in and out), side of the map
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
SECONDS = {"cpu": 0.6, "cuda": 0.3}


class Work(NamedTuple):
    """The minimal work of a call, independent of how a candidate does it."""

    gflop: float  # of matrix products and convolutions; a multiply-add counts as two operations
    megabytes: float  # 10⁶ bytes: every input and weight read once, every result written once


class Ceilings(NamedTuple):
    """The machine's peak rates, and the measurements behind them."""

    gflop_per_s: float
    gb_per_s: float
    timings: dict[str, Timing]  # "product of 1536 × 1536" -> milliseconds; the copy is among them
    work: dict[str, Work]  # of each entry of `timings`

    def amounts(self, name: str) -> dict[str, float]:
        """The work and the rate of one entry of `timings`, by column name."""
        (gflop, megabytes), ms = self.work[name], self.timings[name].p20
        if gflop:
            return {"gflop": gflop, "gflop_per_s": gflop / ms * 1e3}
        return {"mb": megabytes, "gb_per_s": megabytes / ms}

    def columns(self, work: Work, milliseconds: float) -> dict[str, float]:
        """The rates of a call that does `work` in `milliseconds`, also in percent of the peak, by column name."""
        gflop_per_s, gb_per_s = work.gflop / milliseconds * 1e3, work.megabytes / milliseconds
        return {
            "gflop_per_s": gflop_per_s,
            "gb_per_s": gb_per_s,
            "percent_product": 100 * gflop_per_s / self.gflop_per_s,
            "percent_bandwidth": 100 * gb_per_s / self.gb_per_s,
        }


def measure(dtype: torch.dtype, device: str | torch.device = "cpu", *, seconds: float | None = None) -> Ceilings:
    """Measure the peak rates of `dtype` on `device`, which should be otherwise idle.

    Args:
        dtype: of the products.
        device: "cpu" or "cuda".
        seconds: measuring time; by default 0.6 s on the CPU and 0.3 s on a GPU.
    """
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
