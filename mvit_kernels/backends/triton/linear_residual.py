# SPDX-License-Identifier: Apache-2.0
"""``linear_residual`` in Triton: a product over whole rows, with the bias and the residual added in the epilogue.

Backward is the same kernel with the weight not transposed, and the gradient of the weight.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _rows
from ._dropout import NOTHING, Dropped, element_factor, row_factor
from ._launch import Launch, architecture, ceil_div, chunked, dense, kind_of, next_power_of_2, register
from ._tiles import FEW_ROWS, Resident, Tile, tailed
from ._weight_gradients import Product, weight_gradients

OP = "linear_residual"


@triton.jit
def _finish(
    out,
    y,
    bias,
    residual,
    seed,
    first_row,
    first_column,
    rows,
    columns,
    end,
    kept,
    threshold,
    scale,
    N: tl.constexpr,
    CHECK: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of BN columns: y (+ bias), dropped if dropout is live, (+ residual, a loaded tile), stored."""
    if bias is not None:
        y += _rows.load_vector(bias, columns, N, CHECK)[None, :]
    if DROP:
        y *= element_factor(seed, first_row, first_column, threshold, scale, BRANCH, BM, BN)
    if PATH:
        y *= kept[:, None]
    if residual is not None:
        y += residual.to(tl.float32)
    _rows.store(out, y, rows, columns, end, N, N, CHECK)


@triton.jit(do_not_specialize=["M", "threshold", "path_threshold"])
def _product(
    x,
    weight,
    bias,
    residual,
    seed,
    out,
    M,
    threshold,
    scale,
    path_threshold,
    path_scale,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    NB: tl.constexpr,
    NC: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """out = x · weight (+ bias), dropped if dropout is live, (+ residual): BM rows and NC · NB columns a program. EARLY
    loads the residual before the product, and not behind it."""
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    first = tl.program_id(1) * (NC * NB)
    CHECK: tl.constexpr = N % (NC * NB) != 0
    if residual is not None:
        residual += offset * N
        loaded = ()
        for c in tl.static_range(NC if EARLY else 0):
            columns = first + c * NB + tl.arange(0, NB)
            loaded = loaded + (_rows.load(residual, rows, columns, end, N, N, 1, True, CHECK),)
    accumulators = _rows.row_product(
        x + offset * K, weight, rows, end, first, K, N, STRIDE_K, STRIDE_N, BM, BK, NB, NC, PRECISION
    )
    kept = None
    if PATH:
        kept = row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)
    for c in tl.static_range(NC):
        column = first + c * NB
        columns = column + tl.arange(0, NB)
        added = None
        if residual is not None:
            if EARLY:
                added = loaded[c]
            else:
                added = _rows.load(residual, rows, columns, end, N, N, 1, True, CHECK)
        _finish(
            out + offset * N,
            accumulators[c],
            bias,
            added,
            seed,
            first_row,
            column,
            rows,
            columns,
            end,
            kept,
            threshold,
            scale,
            N,
            CHECK,
            DROP,
            PATH,
            BRANCH,
            BM,
            NB,
        )


@triton.jit(do_not_specialize=["M", "threshold", "path_threshold"])
def _product_resident(
    x,
    weight,
    bias,
    residual,
    seed,
    out,
    M,
    threshold,
    scale,
    path_threshold,
    path_scale,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BM: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    KT: tl.constexpr,
    NB: tl.constexpr,
    NN: tl.constexpr,
    NT: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """The same with the whole weight in shared memory. The programs share the tiles of BM rows; the next tiles are on
    their way while one is multiplied."""
    LAST: tl.constexpr = NC if KT > 0 else NC - 1
    LAST_N: tl.constexpr = NN if NT > 0 else NN - 1
    RAGGED: tl.constexpr = NC * KC + KT > K
    RAGGED_N: tl.constexpr = NN * NB + NT > N
    weights = ()
    for n in tl.static_range(LAST_N + 1):
        columns = _rows.columns_of(n, NB, NN, NT)
        for c in tl.static_range(LAST + 1):
            ks = _rows.columns_of(c, KC, NC, KT)
            w = _rows.load(
                weight, ks, columns, K, N, STRIDE_K, STRIDE_N, RAGGED and c == LAST, RAGGED_N and n == LAST_N
            )
            weights = weights + (w,)
    rows = tl.arange(0, BM)
    for tile in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        first_row = tile * BM
        offset = first_row.to(tl.int64)
        end = M - first_row
        chunks = _rows.load_rows(x + offset * K, rows, end, K, KC, NC, KT)
        if residual is not None:
            added = _rows.load_rows(residual + offset * N, rows, end, N, NB, NN, NT)
        kept = None
        if PATH:
            kept = row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)
        for n in tl.static_range(LAST_N + 1):
            y = tl.zeros([BM, NB if n < NN else NT], tl.float32)
            for c in tl.static_range(LAST + 1):
                y = _rows.add_product(chunks[c], weights[n * (LAST + 1) + c], y, PRECISION)
            _finish(
                out + offset * N,
                y,
                bias,
                added[n] if residual is not None else None,
                seed,
                first_row,
                n * NB,
                rows,
                _rows.columns_of(n, NB, NN, NT),
                end,
                kept,
                threshold,
                scale,
                N,
                RAGGED_N and n == LAST_N,
                DROP,
                PATH,
                BRANCH,
                BM,
                NB if n < NN else NT,
            )


# Columns are the most of a program, a chunk is a step of k.
_TILES = {
    "wgmma": Tile(64, 256, 32, 4, 3),  # 9.0, where the weight does not stay
    "wgmma few": Tile(64, 64, 64, 4, 3),  # up to FEW_ROWS rows: programs share the columns too
    "half": Tile(64, 256, 32, 4, 2),
    "half few": Tile(64, 64, 32, 4, 2),
    "tf32": Tile(64, 64, 32, 4, 2),
    "ieee": Tile(32, 32, 16, 4, 2),  # FFMA: all operands of a tile go through registers
}


# By the most columns of x and of the result; on 9.0, for more than FEW_ROWS rows of 16 bits. Tiles of x take 8 to 18 KB
# three times, and the weight 8 to 41 KB once. At 192 columns, 150 KB, one program an SM would be left.
_RESIDENT = {
    96: Resident(Tile(64, 64, 64, 4, 3), 3 * 132),  # 62 KB at 96
    160: Resident(Tile(64, 64, 64, 4, 3), 2 * 132),  # 103 KB at 144
}


def resident_key(kind: str, arch: int, K: int, N: int, rows: int) -> int | None:
    """Which row of `_RESIDENT` serves a product of so many rows; None where its weight does not stay."""
    if kind != "half" or arch != 90 or rows <= FEW_ROWS:
        return None
    return next((most for most in _RESIDENT if max(K, N) <= most), None)


def tile_key(kind: str, arch: int, few: bool) -> str:
    """Which row of `_TILES` serves a product whose weight does not stay."""
    if kind != "half":
        return kind
    return ("wgmma" if arch == 90 else "half") + (" few" if few else "")


@lru_cache(maxsize=4096)
def _plan(device, dtype, kind, arch, K, N, transposed, few, bias, residual, drop):
    key = tile_key(kind, arch, few)
    tile, early = _TILES[key], key.startswith("wgmma")
    widest = 64 if kind == "half" else 32
    if early:
        NB, BK = (min(most, next_power_of_2(max(size, 16))) for most, size in ((widest, N), (tile.chunk, K)))
        NC = min(ceil_div(N, NB), tile.columns // NB)
    else:
        NB, NC = chunked(N, widest, tile.columns)
        BK = min(tile.chunk, chunked(K, tile.chunk, tile.chunk)[0])
    strides = (1, K) if transposed else (N, 1)
    constants = (K, N, *strides, tile.rows, BK, NB, NC, early, "ieee" if kind == "ieee" else "tf32", *drop)
    plan = tile.plan(_product, constants)
    return plan, tile.rows, NB * NC


@lru_cache(maxsize=4096)
def _resident_plan(device, dtype, tile, K, N, transposed, bias, residual, drop):
    strides = (1, K) if transposed else (N, 1)
    chunks = (*tailed(K, tile.chunk), *tailed(N, tile.columns))
    constants = (K, N, *strides, tile.rows, *chunks, "tf32", *drop)
    return tile.plan(_product_resident, constants)


def product(x, weight, bias, residual, out, rows, *, transposed, drop: Dropped = NOTHING) -> Launch:
    """Prepare out = x · weight, or x · weightᵀ if `transposed`, (+ bias), dropped, (+ residual); of contiguous rows.

    Args:
        x: (..., K).
        weight: (K, N), or (N, K) if `transposed`.
        bias: (N,), or None.
        residual: (..., N), or None.
        out: (..., N), written.
        rows: their number.
        transposed: see above.
        drop: what is dropped before the residual is added.
    """
    K, N = x.shape[-1], out.shape[-1]
    device, kind, arch = x.get_device(), kind_of(x.dtype), architecture(x)
    variant = (K, N, transposed)
    given = (bias is not None, residual is not None, drop.constants)
    stays = _RESIDENT.get(resident_key(kind, arch, K, N, rows))
    if stays is None:
        plan, BM, columns = _plan(device, x.dtype, kind, arch, *variant, rows <= FEW_ROWS, *given)
        grid = (ceil_div(rows, BM), ceil_div(N, columns))
    else:
        plan = _resident_plan(device, x.dtype, stays.tile, *variant, *given)
        grid = (min(ceil_div(rows, stays.tile.rows), stays.programs), 1)
    return Launch(plan, grid, (x, weight, bias, residual, drop.seed, out), (rows, *drop.scalars))


def launch(x, weight, bias, residual, out, drop: Dropped = NOTHING) -> Launch:
    """Prepare ``out = residual + x Wᵀ + b`` of contiguous tensors."""
    return product(x, weight, bias, residual, out, out.numel() // weight.shape[0], transposed=True, drop=drop)


@register(OP)
def forward(x, weight, bias, residual, drop: Dropped = NOTHING):
    x, weight, bias, residual = dense(x, weight, bias, residual)
    out = torch.empty_like(residual)
    launch(x, weight, bias, residual, out, drop).run()
    return out


@register(f"{OP}_backward")
def backward(grad_out, x, weight):
    grad_out, x, weight = dense(grad_out, x, weight)
    grad_x, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    product(grad_out, weight, None, None, grad_x, rows, transposed=False).run()
    (grads,) = weight_gradients(rows, Product(grad_out, x, weight))
    return grad_x, *grads.of_linear
