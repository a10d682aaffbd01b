# SPDX-License-Identifier: Apache-2.0
"""Find better tiles for this machine's GPU, and print the rows of the tables to paste.

Example:
    $ python -m mvit_kernels.backends.triton.tune --width 144 192 240 --batch 256 --forward    # about a minute
    $ python -m mvit_kernels.backends.triton.tune --width 144 --search

Each candidate is timed, forward or backward, at the shapes of MobileViT's stage of that width; those that do not launch
are skipped. Candidates are the row that stands and those of `TRIED`; with ``--search``, and where nothing is listed,
also variants of the row that stands. Nothing is chosen at call time: what is printed has no effect until it is in a
table. Attention's tables are not searched.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._tiles import Resident, Tile

SIDES = {64: 32, 80: 16, 96: 32, 120: 16, 144: 32, 192: 16, 240: 8}  # of the map, for images of 256 px
WARPS, STAGES = (4, 8), (1, 2, 3)

# Per table and key. The first of each is what an H200 was measured with, at commit 5c7d698; the rows that stand are
# predictions (docs/kernels/triton.md).
TRIED: dict[str, dict[Any, tuple]] = {
    "layer_norm_linear._TILES": {
        "wgmma 160": (Tile(64, 64, 16, 4, 2), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 2, 128)),
        "wgmma 192": (Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2, 128)),
        "wgmma 256": (Tile(64, 64, 64, 4, 2), Tile(128, 32, 64, 8, 3), Tile(64, 64, 64, 8, 2)),
        "wgmma few": (Tile(64, 64, 64, 4, 2), Tile(64, 32, 64, 4, 3)),
    },
    "layer_norm_mlp._TILES": {
        "wgmma 160": (Tile(64, 32, 16, 8, 2), Tile(64, 32, 64, 8, 3), Tile(128, 32, 32, 8, 3, 128)),
        "wgmma 192": (Tile(64, 32, 64, 8, 2), Tile(64, 32, 64, 8, 3), Tile(128, 32, 64, 8, 3)),
        "wgmma 256": (Tile(64, 32, 64, 8, 2), Tile(64, 32, 64, 4, 2), Tile(64, 16, 64, 4, 3)),
        "wgmma few": (Tile(64, 32, 64, 8, 2), Tile(64, 32, 64, 8, 3)),
    },
    "linear_residual._TILES": {
        "wgmma": (Tile(64, 256, 32, 4, 2), Tile(64, 256, 32, 4, 4), Tile(64, 128, 64, 4, 3)),
        "wgmma few": (Tile(64, 64, 32, 4, 2), Tile(64, 64, 64, 4, 2)),
    },
    "linear_residual._RESIDENT": {  # None: the weight does not stay
        96: (None, Resident(Tile(64, 64, 64, 4, 2), 3 * 132), Resident(Tile(64, 64, 64, 4, 3), 2 * 132)),
        160: (None, Resident(Tile(64, 64, 64, 4, 2), 2 * 132), Resident(Tile(128, 64, 64, 8, 2), 132)),
    },
}


class Job(NamedTuple):
    """What to time, and the row of a table that it depends on."""

    name: str
    table: dict
    key: Any
    run: Callable[[], object]


def variants(row: tuple) -> Iterator[tuple]:
    """Variants of a row: a `Tile`, or (rows, columns, …, warps, stages). The first two numbers are halved and doubled,
    and warps and stages changed. None, of a `Resident`."""
    if isinstance(row, Resident):
        return
    first, second = row[:2]
    for a, b, warps, stages in itertools.product(
        *[[n for n in (size // 2, size, 2 * size) if n >= 16] for size in (first, second)], WARPS, STAGES
    ):
        if isinstance(row, Tile):
            yield row._replace(rows=a, columns=b, warps=warps, stages=stages)
        else:
            yield (a, b, *row[2:-2], warps, stages)


def candidates(job: Job, search: bool) -> list:
    """What is tried for a job, each once, first the row that stands."""
    standing = job.table[job.key]
    listed = TRIED.get(job.name, {}).get(job.key, ())
    around = variants(standing) if search or not listed else ()
    return list(dict.fromkeys((standing, *listed, *around)))


def forget(modules: list[ModuleType]) -> None:
    """Clear the cached plans, which were made with other tables."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def best_row(
    job: Job, rows: Iterable, time: Callable[[Callable], float], modules: list[ModuleType]
) -> tuple[tuple | None, dict[Any, float]]:
    """The fastest of `rows` for the job, and the time of each that runs. The table is left as it was.

    Args:
        job: what to time.
        rows: the candidates.
        time: times a function, in ms.
        modules: those whose cached plans depend on the table.

    Raises:
        RuntimeError: no candidate runs.
    """
    standing = job.table[job.key]
    times = {}
    try:
        for row in rows:
            job.table[job.key] = row
            forget(modules)
            try:
                times[row] = time(job.run)
            except Exception as error:  # too much shared memory, or a tile that Triton refuses
                print(f"  {row}: {type(error).__name__}", file=sys.stderr)
    finally:
        job.table[job.key] = standing
        forget(modules)
    if not times:
        raise RuntimeError(f"tune: of {job.name} not even the row that stands in the table runs here")
    return min(times, key=times.__getitem__), times


def jobs(width: int, batch: int, dtype: torch.dtype, device: str, *, backward: bool = True) -> Iterator[Job]:
    """The row-wise operators, forward and backward."""
    from . import _row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual
    from ._launch import architecture, kind_of
    from ._tiles import FEW_ROWS

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

    kind, arch, rows = kind_of(dtype), architecture(x), mean.numel()
    few = rows <= FEW_ROWS
    yield Job(
        "layer_norm_linear._TILES",
        layer_norm_linear._TILES,
        layer_norm_linear.tile_key(kind, arch, width, few),
        lambda: layer_norm_linear.forward(x, *norm, qkv, bias, 1e-5, ""),
    )
    stays = linear_residual.resident_key(kind, arch, width, width, rows)
    yield Job(
        "linear_residual._RESIDENT" if stays else "linear_residual._TILES",
        linear_residual._RESIDENT if stays else linear_residual._TILES,
        stays or linear_residual.tile_key(kind, arch, few),
        lambda: linear_residual.forward(x, proj, bias[:width], x),
    )
    yield Job(
        "layer_norm_mlp._TILES",
        layer_norm_mlp._TILES,
        layer_norm_mlp.tile_key(kind, arch, width, few),
        lambda: layer_norm_mlp.forward(x, *mlp, bias[:width], 1e-5),
    )
    if backward:
        yield Job(
            "layer_norm_mlp._HIDDEN_TILES",
            layer_norm_mlp._HIDDEN_TILES,
            kind,
            lambda: layer_norm_mlp.backward(x, x, mean, rstd, *mlp),
        )
        yield Job("_row_gradients._NORM_TILES", _row_gradients._NORM_TILES, kind, norm_backward)
        yield Job("_weight_gradients._WEIGHT_TILES", _weight_gradients._WEIGHT_TILES, kind, weight_gradients)


def main(argv: list[str] | None = None) -> int:
    command = "python -m mvit_kernels.backends.triton.tune"
    parser = argparse.ArgumentParser(prog=command, description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, choices=SIDES, nargs="*", default=(64, 144, 192, 240))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--search", action="store_true", help="variants of the rows that stand, too")
    arguments = parser.parse_args(argv)
    from ..contract import unavailable

    if why := unavailable("triton", "cuda"):
        print(f"tune: it measures on a GPU, and the Triton backend has none here: {'; '.join(why)}", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    from . import _row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual

    dtype = getattr(torch, arguments.dtype)
    modules = [_row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual]
    for width in arguments.width:
        for job in jobs(width, arguments.batch, dtype, "cuda", backward=not arguments.forward):
            row, times = best_row(job, candidates(job, arguments.search), do_bench, modules)
            before = times.get(job.table[job.key], float("nan"))
            took = f"d={width}: {1e3 * times[row]:.1f} µs, was {1e3 * before:.1f}"
            print(f"{job.name}: {job.key!r}: {row},  # {took}")
            if not arguments.search:
                for other, time in times.items():
                    print(f"    {1e3 * time:8.1f} µs  {other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
