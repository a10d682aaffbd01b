# SPDX-License-Identifier: Apache-2.0
"""Row-wise operators as kernels and composed of PyTorch's products: rows for `mvit_kernels/backends/cpu/composed.py`.

    OMP_NUM_THREADS=1 python benchmarks/products.py --dtype bfloat16
    OMP_NUM_THREADS=2 python benchmarks/products.py --dtype bfloat16 --batch 8 32

Prints the time of our kernel over that of the composed operator, for each shape at which MobileViT trains (256 px):
above 1 PyTorch's products are faster. The two take turns. A row belongs in the table where that holds with one thread
and with several. Freed memory is kept, as `mvit-kernels train` keeps it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mvit_kernels import keep_freed_memory
from mvit_kernels.backends import cpu
from mvit_kernels.backends.cpu.composed import COMPOSED
from mvit_kernels.backends.library import load, raw

WIDTHS = {"s": (144, 192, 240), "xs": (96, 120, 144), "xxs": (64, 80, 96)}  # of stages 3, 4 and 5
PIXELS = (32 * 32, 16 * 16, 8 * 8)


def arguments_of(name: str, rows: int, d: int, dtype: torch.dtype) -> tuple:
    """The arguments of the raw operator `name` for `rows` rows of width d, as in a layer of MobileViT."""
    operator, backward = name.removesuffix("_backward"), name.endswith("_backward")
    x = torch.randn(rows, d).to(dtype)
    norm = (torch.rand(d) + 0.5, torch.randn(d))

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)

    if operator == "linear_residual":
        forward = (x, *weight(d, d), torch.randn(rows, d).to(dtype))
        return (forward[3], x, forward[1]) if backward else forward
    if operator == "layer_norm_linear":
        forward = (x, *norm, *weight(3 * d, d), 1e-5, "")
    else:
        forward = (x, *norm, *weight(2 * d, d), *weight(d, 2 * d), 1e-5)
    if not backward:
        return forward
    out, mean, rstd = raw(operator, "cpu")(*forward)
    more = (*forward[1:5], "") if operator == "layer_norm_linear" else forward[1:6]
    return (torch.randn(out.shape).to(dtype), x, mean, rstd, *more)


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The median time of each call in seconds; the calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--operators", nargs="+", choices=list(COMPOSED), default=list(COMPOSED))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each comparison (default: 0.1)")
    args = parser.parse_args()

    keep_freed_memory()
    if why := load("cpu"):
        parser.error(why)
    threads = torch.get_num_threads()
    print(f"{cpu.instruction_set()}, {args.dtype}, threads: {threads}; AMX: {bool(cpu.instruction_set_beside_amx())}")
    for batch in args.batch:
        for variant, widths in WIDTHS.items():
            for stage, (d, pixels) in enumerate(zip(widths, PIXELS, strict=True), 3):
                rows, line = batch * pixels, []
                for name in args.operators:
                    arguments = arguments_of(name, rows, d, getattr(torch, args.dtype))
                    calls = [lambda f=f, a=arguments: f(*a) for f in (raw(name, "cpu"), COMPOSED[name])]
                    ours, composed = medians(calls, args.seconds)
                    line.append(f"{name} {ours / composed:.2f} ({ours * 1e3:.3f} ms)")
                print(f"{variant}/{stage}, {rows} rows of {d}: " + ", ".join(line), flush=True)


if __name__ == "__main__":
    main()
