# SPDX-License-Identifier: Apache-2.0
"""Find better tiles for this machine's GPU, and print the rows of the tables to paste.

Example:
    $ python -m mvit_kernels.backends.triton.tune --width 144 --batch 64

The tables of the row-wise operators are searched around their present rows. Each candidate is timed, forward or
backward, at the shapes of MobileViT's stage of that width; those that do not launch are skipped. Nothing is chosen at
call time: what is printed has no effect until it is in a table. Attention's tables are not searched.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

SIDES = {64: 32, 80: 16, 96: 32, 120: 16, 144: 32, 192: 16, 240: 8}  # of the map, for images of 256 px
WARPS, STAGES = (4, 8), (1, 2, 3)


def candidates(row: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Variants of a row (rows, columns, …, warps, stages[, limit]): the first two numbers halved and doubled, and other
    warps and stages."""
    first, second, *rest = row
    at = len(row) - 2 if row[-1] < 16 else len(row) - 3  # of the warps; a limit may follow the stages
    for a, b, warps, stages in itertools.product(
        *[[n for n in (size // 2, size, 2 * size) if n >= 16] for size in (first, second)], WARPS, STAGES
    ):
        yield (a, b, *rest[: at - 2], warps, stages, *row[at + 2 :])


def forget(modules: list[ModuleType]) -> None:
    """Clear the cached plans, which were made with other tables."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def best_row(
    table: dict, key: object, run: Callable[[], object], time: Callable[[Callable], float], modules: list[ModuleType]
) -> tuple[tuple[int, ...], float, float]:
    """The fastest row for ``table[key]``, its time, and the time of the present row. The table is left as it was.

    Args:
        table, key: where the row is.
        run: the launch to time.
        time: times a function, in ms.
        modules: those whose cached plans depend on the table.

    Raises:
        RuntimeError: no candidate runs, not even the present row.
    """
    standing = table[key]
    times = {}
    try:
        for row in dict.fromkeys((standing, *candidates(standing))):
            table[key] = row
            forget(modules)
            try:
                times[row] = time(run)
            except Exception as error:  # too much shared memory, or a tile that Triton refuses
                print(f"  {row}: {type(error).__name__}", file=sys.stderr)
    finally:
        table[key] = standing
        forget(modules)
    if not times:
        raise RuntimeError("not even the row that stands in the table runs here")
    row = min(times, key=times.get)
    return row, times[row], times.get(standing, float("nan"))


def jobs(width: int, batch: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict, Callable]]:
    """(name of the table, the table, what to time), for every row-wise operator, forward and backward."""
    from . import _row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual

    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype) / shape[-1] ** 0.5

    side = SIDES[width]
    x, norm = t(batch, side, side, width), (torch.ones(width, device=device), torch.zeros(width, device=device))
    qkv, proj, fc1, fc2 = t(3 * width, width), t(width, width), t(2 * width, width), t(width, 2 * width)
    bias = t(3 * width)
    mlp = (*norm, fc1, bias[: 2 * width], fc2)
    out, mean, rstd = layer_norm_linear.forward(x, *norm, qkv, bias, 1e-5, "")
    hidden = t(batch, side, side, 2 * width)

    def norm_backward():
        _row_gradients.norm_backward(out, qkv, x, mean, rstd, norm[0], None, torch.empty_like(x))

    def weight_gradients():  # of a whole layer, as one launch in training
        before = _weight_gradients.Norm(mean, rstd, *norm)
        _weight_gradients.weight_gradients(
            mean.numel(),
            _weight_gradients.Product(out, x, qkv, before),
            _weight_gradients.Product(x, x, proj),
            _weight_gradients.Product(hidden, x, fc1, before),
            _weight_gradients.Product(x, hidden, fc2),
        )

    yield (
        "layer_norm_linear._TILES",
        layer_norm_linear._TILES,
        lambda: layer_norm_linear.forward(x, *norm, qkv, bias, 1e-5, ""),
    )
    yield (
        "linear_residual._TILES",
        linear_residual._TILES,
        lambda: linear_residual.forward(x, proj, bias[:width], x),
    )
    yield (
        "layer_norm_mlp._TILES",
        layer_norm_mlp._TILES,
        lambda: layer_norm_mlp.forward(x, *mlp, bias[:width], 1e-5),
    )
    yield (
        "layer_norm_mlp._HIDDEN_TILES",
        layer_norm_mlp._HIDDEN_TILES,
        lambda: layer_norm_mlp.backward(x, x, mean, rstd, *mlp),
    )
    yield "_row_gradients._NORM_TILES", _row_gradients._NORM_TILES, norm_backward
    yield "_weight_gradients._WEIGHT_TILES", _weight_gradients._WEIGHT_TILES, weight_gradients


def main(argv: list[str] | None = None) -> int:
    command = "python -m mvit_kernels.backends.triton.tune"
    parser = argparse.ArgumentParser(prog=command, description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, choices=SIDES, nargs="*", default=(64, 144, 192, 240))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    from ..contract import unavailable

    if why := unavailable("triton", "cuda"):
        print(f"tune: it measures on a GPU, and the Triton backend has none here: {'; '.join(why)}", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    from . import _row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual
    from ._launch import kind_of

    dtype = getattr(torch, arguments.dtype)
    modules = [_row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual]
    for width in arguments.width:
        for name, table, run in jobs(width, arguments.batch, dtype, "cuda"):
            row, took, before = best_row(table, kind_of(dtype), run, do_bench, modules)
            print(f'{name}: "{kind_of(dtype)}": {row},  # d={width}: {1e3 * took:.1f} µs, was {1e3 * before:.1f}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
