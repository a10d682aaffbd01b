# SPDX-License-Identifier: Apache-2.0
"""The gradient of a linear layer's input rows, through the LayerNorm before it; for the row-wise operators."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._dropout import NOTHING, Dropped, element_factor, row_factor
from ._launch import Plan, architecture, ceil_div, chunked, is_small, kind_of


@triton.jit(do_not_specialize=["M", "threshold", "path_threshold"])
def _norm_backward(
    grad,
    weight,
    x,
    mean,
    rstd,
    norm_weight,
    grad_residual,
    seed,
    grad_x,
    grad_branch,
    M,
    threshold,
    scale,
    path_threshold,
    path_scale,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KC: tl.constexpr,
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
    """The gradient of x from that of LN(x) Wᵀ. Whole rows of grad · W stay in registers until LayerNorm's two sums over
    them are complete. If x is itself a residual plus a dropped branch, grad_branch is the gradient of that branch."""
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    products = _rows.row_product(grad + offset * N, weight, rows, end, 0, N, K, K, 1, BM, BN, KC, NC, PRECISION)
    mu = tl.load(mean + offset + rows, mask=rows < end, other=0.0)
    sigma = tl.load(rstd + offset + rows, mask=rows < end, other=0.0)
    x += offset * K
    plain, projected = tl.zeros([BM, KC], tl.float32), tl.zeros([BM, KC], tl.float32)
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        xhat = (
            _rows.load(x, rows, columns, end, K, K, 1, True, (c + 1) * KC > K).to(tl.float32) - mu[:, None]
        ) * sigma[:, None]
        gamma = _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)
        scaled = _rows.rounded_product(products[c], gamma[None, :])
        plain += scaled
        projected += scaled * xhat
    plain_mean, projected_mean = _rows.row_mean(plain, K), _rows.row_mean(projected, K)
    if PATH:
        kept = row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        xhat = (
            _rows.load(x, rows, columns, end, K, K, 1, True, (c + 1) * KC > K).to(tl.float32) - mu[:, None]
        ) * sigma[:, None]
        gamma = _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)
        scaled = _rows.rounded_product(products[c], gamma[None, :])
        dx = (scaled - plain_mean[:, None] - xhat * projected_mean[:, None]) * sigma[:, None]
        if grad_residual is not None:
            dx += _rows.load(grad_residual + offset * K, rows, columns, end, K, K, 1, True, (c + 1) * KC > K).to(
                tl.float32
            )
        _rows.store(grad_x + offset * K, dx, rows, columns, end, K, K, (c + 1) * KC > K)
        if DROP:
            dx *= element_factor(seed, first_row, c * KC, threshold, scale, BRANCH, BM, KC)
        if PATH:
            dx *= kept[:, None]
        if DROP or PATH:
            _rows.store(grad_branch + offset * K, dx, rows, columns, end, K, K, (c + 1) * KC > K)


# By kind: rows, n step, widest chunk of columns, warps, stages.
_NORM_TILES = {
    "half": (64, 32, 64, 8, 2),
    "tf32": (32, 16, 64, 8, 2),
    "ieee": (16, 16, 64, 8, 1),
}
_NORM_TILE_WIDE = (16, 16, 64, 8, 1)  # above 256 columns
_NORM_TILE_240 = (32, 32, 64, 8, 2)  # with mma.sync, 64 rows of 256 columns spill 240 bytes


@lru_cache(maxsize=4096)
def _norm_plan(device, dtype, norm_dtype, kind, arch, K, N, residual, drop):
    BM, BN, widest, warps, stages = _NORM_TILES[kind]
    if K > 256:
        BM, BN, widest, warps, stages = _NORM_TILE_WIDE
    elif K > 192 and kind == "half" and is_small(arch):
        BM, BN, widest, warps, stages = _NORM_TILE_240
    constants = (K, N, BM, BN, *chunked(K, widest), "ieee" if kind == "ieee" else "tf32", *drop)
    return Plan(_norm_backward, constants, num_warps=warps, num_stages=stages), BM


def norm_backward(grad, weight, x, mean, rstd, norm_weight, grad_residual, grad_x, drop: Dropped = NOTHING) -> Tensor:
    """grad_x = LayerNorm's backward of grad · weight, plus grad_residual unless it is None; of contiguous rows.

    Args:
        grad: (..., N), the gradient of the linear layer's output.
        weight: (N, K).
        x: (..., K), the input of the LayerNorm.
        mean, rstd: float32, of x's rows.
        norm_weight: (K,).
        grad_residual: (..., K), or None.
        grad_x: (..., K), written.
        drop: how the branch that was added into x was dropped.

    Returns:
        The gradient of that branch; grad_x where nothing of it was dropped.
    """
    (N, K), rows = weight.shape, mean.numel()
    grad_branch = grad_x if drop is NOTHING else torch.empty_like(grad_x)
    if not rows:
        return grad_branch
    plan, BM = _norm_plan(
        x.get_device(),
        x.dtype,
        norm_weight.dtype,
        kind_of(x.dtype),
        architecture(x),
        K,
        N,
        grad_residual is not None,
        drop.constants,
    )
    tensors = (grad, weight, x, mean, rstd, norm_weight, grad_residual, drop.seed, grad_x)
    plan((ceil_div(rows, BM),), (*tensors, None if drop is NOTHING else grad_branch), (rows, *drop.scalars))
    return grad_branch
