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
from ._launch import Launch, Plan, architecture, ceil_div, chunked, dense, kind_of, register
from ._weight_gradients import Product, weight_gradients

OP = "linear_residual"


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
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """out = x · weight (+ bias), dropped if dropout is live, (+ residual): BM rows and NC · NB columns a program."""
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    first = tl.program_id(1) * (NC * NB)
    accumulators = _rows.row_product(
        x + offset * K, weight, rows, end, first, K, N, STRIDE_K, STRIDE_N, BM, BK, NB, NC, PRECISION
    )
    CHECK: tl.constexpr = N % (NC * NB) != 0
    if PATH:
        kept = row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)
    for c in tl.static_range(NC):
        columns = first + c * NB + tl.arange(0, NB)
        y = accumulators[c]
        if bias is not None:
            y += _rows.load_vector(bias, columns, N, CHECK)[None, :]
        if DROP:
            y *= element_factor(seed, first_row, first + c * NB, threshold, scale, BRANCH, BM, NB)
        if PATH:
            y *= kept[:, None]
        if residual is not None:
            y += _rows.load(residual + offset * N, rows, columns, end, N, N, 1, True, CHECK).to(tl.float32)
        _rows.store(out + offset * N, y, rows, columns, end, N, N, CHECK)


# By kind: rows, k step, widest chunk of columns, most columns a program, warps, stages.
_TILES = {
    "half": (64, 32, 64, 256, 4, 2),
    "tf32": (64, 32, 32, 64, 4, 2),
    "ieee": (32, 16, 32, 32, 4, 2),  # FFMA: all operands of a tile go through registers
}
_FEW_ROWS = 8192  # at most one program of 64 rows for each of 128 SMs: programs then share the columns too


@lru_cache(maxsize=4096)
def _plan(device, dtype, kind, arch, K, N, transposed, few_rows, bias, residual, drop):
    BM, BK, widest, most, warps, stages = _TILES[kind]
    NB, NC = chunked(N, widest, 64 if few_rows else most)
    BK = min(BK, chunked(K, BK, BK)[0])
    strides = (1, K) if transposed else (N, 1)
    constants = (K, N, *strides, BM, BK, NB, NC, "ieee" if kind == "ieee" else "tf32", *drop)
    return Plan(_product, constants, num_warps=warps, num_stages=stages), BM, NB * NC


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
    plan, BM, columns = _plan(
        x.get_device(),
        x.dtype,
        kind_of(x.dtype),
        architecture(x),
        K,
        N,
        transposed,
        rows <= _FEW_ROWS,
        bias is not None,
        residual is not None,
        drop.constants,
    )
    grid = (ceil_div(rows, BM), ceil_div(N, columns))
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
