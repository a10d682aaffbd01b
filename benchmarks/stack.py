# SPDX-License-Identifier: Apache-2.0
"""How near a transformer stack comes to what this machine can multiply: every stage of MobileViT's variants.

    python benchmarks/stack.py [--models s,xs,xxs] [--dtypes float32,bfloat16] [--batches 1,8] [--size 256]
                               [--threads N] [--seconds S] [--csv FILE]

The stacks run through ``mvit_kernels.transformer``, on random weights. Beside them, in the same turns, PyTorch
multiplies large square matrices of the same dtype (oneDNN's and MKL's best case): the fastest of these is the machine's
product rate, and a stack's per cent is its own rate of arithmetic against that, by medians and by the 20th percentiles,
which say more on a machine that others use too. Counted are the operations of matrix products alone, two for a
multiplication and an addition, with T tokens of width d in sequences of N:

    L · T · (16 d² + 4 N d)      qkv 6 d², out-projection 2 d², MLP 8 d², scores and weighted values 2 N d each

LayerNorm, softmax and SiLU are not counted, and cost time. Each stack is held to the tolerance rule before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels import cpu
from mvit_kernels.cli import write_csv
from mvit_kernels.cli.models import positive
from mvit_kernels.nn.mobilevit import _DEPTHS, _VARIANTS
from mvit_kernels.timing import Timing, environment, interleave
from mvit_kernels.verification import error_row

HEADS, PATCH = 4, 2
SQUARES = (768, 1024, 1536)  # sides of the matrices
SAMPLE_SECONDS = 5e-3  # a sample of a small stack is of many calls
HEADINGS = f"{'':<9} stage   tokens    d    N   GFLOP   median ms   {'p20 - p80':<18} GFLOP/s   of torch.mm's, by p20"


class Stack(NamedTuple):
    """The transformer of one stage, on `images` maps."""

    model: str
    stage: int
    layers: int
    width: int
    side: int  # of the map, in tokens
    images: int

    @property
    def tokens(self) -> int:
        return self.images * self.side**2

    @property
    def sequence(self) -> int:
        return (self.side // PATCH) ** 2

    @property
    def gflop(self) -> float:
        return self.layers * self.tokens * (16 * self.width**2 + 4 * self.sequence * self.width) / 1e9


def stacks(models: list[str], size: int, batch: int) -> list[Stack]:
    """Every stage of `models` at `size` px; a map that is no multiple of the patch is resized up to one."""
    found = []
    for model in models:
        for index, (width, layers) in enumerate(zip(_VARIANTS[model].dims, _DEPTHS, strict=True)):
            side = -(-size // (8 << index))
            found.append(Stack(model, 3 + index, layers, width, -(-side // PATCH) * PATCH, batch))
    return found


def function_of(stack: Stack, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The call that is timed, once it was compared with float64.

    Raises:
        RuntimeError: its error is larger than allowed.
    """
    generator = torch.Generator().manual_seed(stack.stage)

    def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
        return random(out, width, std=width**-0.5), random(out, std=0.1)

    def norm() -> tuple[Tensor, Tensor]:
        return random(d, std=0.1, mean=1.0), random(d, std=0.1)

    d = stack.width
    layers = [
        (*norm(), *linear(3 * d, d), *linear(d, d), *norm(), *linear(2 * d, d), *linear(d, 2 * d))
        for _ in range(stack.layers)
    ]
    x, last = random(stack.images, stack.side, stack.side, d).to(dtype), norm()

    def call(kind: torch.dtype, backend: str | None) -> Callable[[], Tensor]:
        weights = [mvit_kernels.TransformerLayerWeights(*(t.to(dtype).to(kind) for t in layer)) for layer in layers]
        final, rows = tuple(t.to(dtype).to(kind) for t in last), x.to(kind)
        return lambda: mvit_kernels.transformer(
            rows, weights, final, num_heads=HEADS, patch_size=PATCH, backend=backend
        )

    function = call(dtype, None)
    row = error_row("the stack", function(), [call(dtype, "reference")()], call(torch.float64, "reference")())
    if not row.ok:
        raise RuntimeError(f"{stack}: an error of {row.error:.1e}, where {row.allowed:.1e} is allowed")
    return function


def repeated(function: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """`function` as often as makes a sample that the clock can measure, and how often that is."""
    function()
    start = time.perf_counter()
    function()
    calls = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))

    def run() -> None:
        for _ in range(calls):
            function()

    return run, calls


def product(side: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def measure(wanted: list[Stack], dtype: torch.dtype, seconds: float) -> list[dict[str, object]]:
    """A row for each stack, and one for each square product that they are measured against."""
    functions = {stack: function_of(stack, dtype) for stack in wanted} | {n: product(n, dtype) for n in SQUARES}
    runs = {key: repeated(function) for key, function in functions.items()}
    names = {str(key): key for key in functions}
    times = interleave({name: runs[key][0] for name, key in names.items()}, seconds=seconds, warmup_seconds=0.1)

    gflop = {key: 2 * key**3 / 1e9 if isinstance(key, int) else key.gflop for key in functions}
    milliseconds = {
        key: Timing(*(value / runs[key][1] for value in times[name][:3]), times[name].count)
        for name, key in names.items()
    }
    rate = {key: gflop[key] / timing.median * 1e3 for key, timing in milliseconds.items()}
    quiet = {key: gflop[key] / timing.p20 * 1e3 for key, timing in milliseconds.items()}
    rows = []
    for key, timing in milliseconds.items():
        stack = None if isinstance(key, int) else key
        rows.append(
            {
                "model": stack.model if stack else "torch.mm",
                "stage": stack.stage if stack else "",
                "batch": stack.images if stack else "",
                "dtype": str(dtype).removeprefix("torch."),
                "layers": stack.layers if stack else "",
                "width": stack.width if stack else key,
                "tokens": stack.tokens if stack else key,
                "sequence": stack.sequence if stack else "",
                "gflop": round(gflop[key], 4),
                "median_ms": round(timing.median, 4),
                "p20_ms": round(timing.p20, 4),
                "p80_ms": round(timing.p80, 4),
                "samples": timing.count,
                "gflop_per_s": round(rate[key], 1),
                "percent": round(100 * rate[key] / max(rate[side] for side in SQUARES), 1),
                "percent_p20": round(100 * quiet[key] / max(quiet[side] for side in SQUARES), 1),
            }
        )
    return rows


def whole(rows: list[dict[str, object]]) -> list[str]:
    """For each model and batch, all of its stacks together."""
    best = max(row["gflop_per_s"] for row in rows if row["model"] == "torch.mm")
    lines = []
    for key in dict.fromkeys((row["model"], row["batch"]) for row in rows if row["model"] != "torch.mm"):
        mine = [row for row in rows if (row["model"], row["batch"]) == key]
        gflop, ms = sum(row["gflop"] for row in mine), sum(row["median_ms"] for row in mine)
        rate = gflop / ms * 1e3
        lines.append(
            f"{key[0]:<9}   all {'':>18} {gflop:7.3f} {ms:11.3f}   {'':<18} {rate:7.1f} {100 * rate / best:7.1f} %"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="s,xs,xxs", help="of s, xs and xxs (default: all)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="(default: float32,bfloat16)")
    parser.add_argument("--batches", default="1,8", help="images (default: 1,8)")
    parser.add_argument("--size", type=positive, default=256, help="of the images in pixels (default: 256)")
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring for each dtype and batch")
    parser.add_argument("--csv", type=Path, help="write the table there")
    args = parser.parse_args()
    models, dtypes, batches = (text.split(",") for text in (args.models, args.dtypes, args.batches))
    unknown = set(models) - set(_VARIANTS)
    if unknown:
        parser.error(f"unknown models: {', '.join(sorted(unknown))}; choose from {', '.join(_VARIANTS)}")
    if args.threads:
        torch.set_num_threads(args.threads)

    origin = environment()
    print(f"{origin['device_name']}, threads: {origin['threads']}, {cpu.instruction_set() or 'no C++ library'}")
    table = []
    for dtype in dtypes:
        for batch in map(int, batches):
            with torch.inference_mode():
                rows = measure(stacks(models, args.size, batch), getattr(torch, dtype), args.seconds)
            print(f"\n{dtype}, batch {batch}, {args.size} px")
            print(HEADINGS)
            for row in rows:
                spread = f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}"
                what = (
                    f"{row['model']:<9} {row['stage']!s:>5} {row['tokens']:>8} {row['width']:>4} {row['sequence']!s:>4}"
                )
                times = f"{row['gflop']:7.3f} {row['median_ms']:11.3f}   {spread:<18} {row['gflop_per_s']:7.1f}"
                print(f"{what} {times} {row['percent']:7.1f} % {row['percent_p20']:7.1f} %")
            print("\n".join(whole(rows)), flush=True)
            settings = {"size": args.size, "instruction_set": cpu.instruction_set()}
            table += [settings | row | origin for row in rows]
    if args.csv:
        write_csv(args.csv, table)


if __name__ == "__main__":
    sys.exit(main())
