# SPDX-License-Identifier: Apache-2.0
"""Gradients of a linear layer, and of the LayerNorm before it, for the row-wise operators.

Everything is a product of tiles summed in a fixed order. Weights' gradients are sums over all rows: rows are split into
parts by their number alone (never by the number of SMs), each part's sum is kept, and one more kernel adds the parts
up: the same bits every time, without atomics.

The LayerNorm's parameters need no pass over the rows of their own. With x̂ the rows before weight γ and bias β are
applied, and P = gᵀ x̂ and b = Σ g the sums that the linear weight W needs anyway, dW = P·γ + b ⊗ β, dγ = Σₙ W·P and dβ
= Wᵀ b.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._launch import Plan, architecture, ceil_div, chunked, is_small, kind_of, next_power_of_2

# -------------------------------------------------------------------------------------------------- rows' gradients


@triton.jit(do_not_specialize=["M"])
def _norm_backward(
    grad,
    weight,
    x,
    mean,
    rstd,
    norm_weight,
    grad_residual,
    grad_x,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of x from that of LN(x) Wᵀ: whole rows of grad · W stay in registers until LayerNorm's sums over
    them are there."""
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
        scaled = products[c] * _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)[None, :]
        plain += scaled
        projected += scaled * xhat
    plain_mean = tl.sum(plain, axis=1) * (1.0 / K)
    projected_mean = tl.sum(projected, axis=1) * (1.0 / K)
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        xhat = (
            _rows.load(x, rows, columns, end, K, K, 1, True, (c + 1) * KC > K).to(tl.float32) - mu[:, None]
        ) * sigma[:, None]
        scaled = products[c] * _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)[None, :]
        dx = (scaled - plain_mean[:, None] - xhat * projected_mean[:, None]) * sigma[:, None]
        if grad_residual is not None:
            dx += _rows.load(grad_residual + offset * K, rows, columns, end, K, K, 1, True, (c + 1) * KC > K).to(
                tl.float32
            )
        _rows.store(grad_x + offset * K, dx, rows, columns, end, K, K, (c + 1) * KC > K)


# By kind: rows, n step, widest chunk of columns, warps, stages.
_NORM_TILES = {
    "half": (64, 32, 64, 8, 2),
    "tf32": (32, 16, 64, 8, 2),
    "ieee": (16, 16, 64, 8, 1),
}
_NORM_TILE_WIDE = (16, 16, 64, 8, 1)  # of more than 256 columns
_NORM_TILE_240 = (32, 32, 64, 8, 2)  # 64 rows of 256 columns spill 240 bytes where products are mma.sync's


@lru_cache(maxsize=4096)
def _norm_plan(device, dtype, norm_dtype, kind, arch, K, N, residual):
    BM, BN, widest, warps, stages = _NORM_TILES[kind]
    if K > 256:
        BM, BN, widest, warps, stages = _NORM_TILE_WIDE
    elif K > 192 and kind == "half" and is_small(arch):
        BM, BN, widest, warps, stages = _NORM_TILE_240
    constants = (K, N, BM, BN, *chunked(K, widest), "ieee" if kind == "ieee" else "tf32")
    return Plan(_norm_backward, constants, num_warps=warps, num_stages=stages), BM


def norm_backward(grad, weight, x, mean, rstd, norm_weight, grad_residual, grad_x) -> None:
    """grad_x = LayerNorm's backward of grad · weight, plus grad_residual if there is one; contiguous rows."""
    (N, K), rows = weight.shape, mean.numel()
    if not rows:
        return
    plan, BM = _norm_plan(
        x.get_device(),
        x.dtype,
        norm_weight.dtype,
        kind_of(x.dtype),
        architecture(x),
        K,
        N,
        grad_residual is not None,
    )
    plan((ceil_div(rows, BM),), (grad, weight, x, mean, rstd, norm_weight, grad_residual, grad_x), (rows,))


# ------------------------------------------------------------------------------------------------ weights' gradients


@triton.jit
def on_16_bytes(count):
    """The next multiple of four float32 numbers."""
    return (count + 3) // 4 * 4


@triton.jit(do_not_specialize=["M", "part_rows", "start"])
def _weight_gradient(
    grad,
    x,
    mean,
    rstd,
    weight,
    norm_weight,
    norm_bias,
    sums,
    M,
    part_rows,
    start: tl.int64,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of gradᵀ · x over one part of the rows, and what follows from it (see above). Beginning at `start`,
    `sums` has room for what `_sum_parts` adds up: parts of the weight's gradient, of the bias's, and with a LayerNorm,
    a row of K for each part and tile of n, of its weight's and its bias's."""
    K_TILES: tl.constexpr = (K + BK - 1) // BK
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    n_tile, k_tile, part = tl.program_id(0) // K_TILES, tl.program_id(0) % K_TILES, tl.program_id(1)
    ns, ks = n_tile * BN + tl.arange(0, BN), k_tile * BK + tl.arange(0, BK)
    CHECK_N: tl.constexpr = N % BN != 0
    CHECK_K: tl.constexpr = K % BK != 0
    first = part * part_rows
    end = tl.minimum(part_rows, M - first)
    offset = first.to(tl.int64)
    grad += offset * N
    x += offset * K
    if NORM:
        mean += offset
        rstd += offset
    product = tl.zeros([BN, BK], tl.float32)
    grads = tl.zeros([BM, BN], tl.float32)  # added up over its rows once, after the loop
    for m in range(0, end, BM):
        rows = tl.arange(0, BM)
        left = end - m
        g = _rows.load(grad, rows, ns, left, N, N, 1, True, CHECK_N)
        operand = _rows.load(x, rows, ks, left, K, K, 1, True, CHECK_K)
        if NORM:
            mu = tl.load(mean + rows, mask=rows < left, other=0.0)
            sigma = tl.load(rstd + rows, mask=rows < left, other=0.0)
            operand = ((operand.to(tl.float32) - mu[:, None]) * sigma[:, None]).to(x.dtype.element_ty)
            mean += BM
            rstd += BM
        product = tl.dot(tl.trans(g), operand, product, input_precision=PRECISION)
        grads += g.to(tl.float32)
        grad += BM * N
        x += BM * K
    bias_sum = tl.sum(grads, axis=0)
    parts = tl.num_programs(1).to(tl.int64)
    sums += tl.multiple_of(start, 4)
    bias_sums = sums + on_16_bytes(parts * N * K)
    if k_tile == 0:
        tl.store(bias_sums + part * N + ns, bias_sum, mask=ns < N)
    if NORM:
        w = _rows.load(weight, ns, ks, N, K, K, 1, CHECK_N, CHECK_K).to(tl.float32)
        norm_weight_sums = bias_sums + on_16_bytes(parts * N)
        norm_bias_sums = norm_weight_sums + on_16_bytes(parts * N_TILES * K)
        at = (part * N_TILES + n_tile) * K + ks
        tl.store(norm_weight_sums + at, tl.sum(w * product, axis=0), mask=ks < K)
        tl.store(norm_bias_sums + at, tl.sum(w * bias_sum[:, None], axis=0), mask=ks < K)
        gamma = _rows.load_vector(norm_weight, ks, K, CHECK_K)
        beta = _rows.load_vector(norm_bias, ks, K, CHECK_K)
        product = product * gamma[None, :] + bias_sum[:, None] * beta[None, :]
    _rows.store(sums + part.to(tl.int64) * (N * K), product, ns, ks, N, K, K, CHECK_K)


@triton.jit
def _add_up(block, sums, out, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """If `block` is one of this result's: add its sums over the parts up. Returns the number of the block, and where
    the sums lie, for the next result."""
    AT_ONCE: tl.constexpr = 8
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    if (block >= 0) & (block < BLOCKS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
        for first in range(0, parts, AT_ONCE):
            which = first + tl.arange(0, AT_ONCE)
            total += _rows.load(sums, which, at, parts, SIZE, SIZE, 1, True, SIZE % BLOCK != 0)
        tl.store(out + at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=at < SIZE)
    return block - BLOCKS, sums + on_16_bytes(parts * SIZE)


@triton.jit(do_not_specialize=["parts0", "parts1", "parts2", "parts3", "parts4", "parts5"])
def _sum_parts(
    sums,
    out0,
    out1,
    out2,
    out3,
    out4,
    out5,
    parts0,
    parts1,
    parts2,
    parts3,
    parts4,
    parts5,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    SIZE3: tl.constexpr,
    SIZE4: tl.constexpr,
    SIZE5: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Up to six results at once, as launches cost more than the sums. `sums` has parts0 times SIZE0 numbers for the
    first, and so on, each on 16 bytes."""
    block, sums = _add_up(tl.program_id(0), sums, out0, parts0, SIZE0, BLOCK)
    block, sums = _add_up(block, sums, out1, parts1, SIZE1, BLOCK)
    if out2 is not None:
        block, sums = _add_up(block, sums, out2, parts2, SIZE2, BLOCK)
        block, sums = _add_up(block, sums, out3, parts3, SIZE3, BLOCK)
    if out4 is not None:
        block, sums = _add_up(block, sums, out4, parts4, SIZE4, BLOCK)
        block, sums = _add_up(block, sums, out5, parts5, SIZE5, BLOCK)


class Norm(NamedTuple):
    """The LayerNorm in front of a linear layer, and where its gradients go."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    linear_weight: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class Product(NamedTuple):
    """A linear layer: the gradient of its output rows, its input rows (before the LayerNorm, if it has one), and where
    its gradients go."""

    grad: Tensor
    x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    norm: Norm | None = None


# By kind: columns of grad, columns of x, rows at a time, warps, stages.
_WEIGHT_TILES = {
    "half": (64, 64, 64, 4, 2),
    "tf32": (64, 64, 32, 4, 2),
    "ieee": (32, 32, 32, 4, 1),
}
_NO_NORM = (None,) * 5
_PROGRAMS = 256  # about two for each SM of a large GPU; a constant, so that the same rows give the same bits everywhere
_BLOCK = 256


class _Schedule(NamedTuple):
    """What launches compute the weights' gradients of a call."""

    products: list[tuple[Plan, tuple[int, int], tuple[int, int, int]]]  # of each: plan, grid, scalars
    numbers: int  # float32 sums of parts
    sum_parts: Plan
    blocks: int
    parts: tuple[int, ...]


@lru_cache(maxsize=4096)
def _schedule(device, dtype, norm_dtype, kind, arch, rows, *shapes) -> _Schedule:
    """`shapes`: (N, K, whether there is a LayerNorm) of each product."""
    products, parts, sizes, start = [], [], [], 0
    precision = "ieee" if kind == "ieee" else "tf32"
    for N, K, norm in shapes:
        BN, BK, BM, warps, stages = _WEIGHT_TILES[kind]
        BN, BK = min(BN, max(next_power_of_2(N), 16)), min(BK, max(next_power_of_2(K), 16))
        n_tiles, k_tiles, blocks = ceil_div(N, BN), ceil_div(K, BK), ceil_div(rows, BM)
        part_rows = ceil_div(blocks, min(ceil_div(_PROGRAMS, n_tiles * k_tiles), blocks)) * BM
        count = ceil_div(rows, part_rows)
        plan = _weight_plan(device, dtype, norm_dtype, (N, K, BN, BK, BM, norm, precision), warps, stages)
        products.append((plan, (n_tiles * k_tiles, count), (rows, part_rows, start)))
        for number, size in [(count, N * K), (count, N), *[(count * n_tiles, K)] * (2 * norm)]:
            parts.append(number)
            sizes.append(size)
            start += ceil_div(number * size, 4) * 4
    missing = 6 - len(sizes)
    blocks = sum(ceil_div(size, _BLOCK) for size in sizes)
    sum_parts = _sum_plan(device, dtype, norm_dtype, (*sizes, *[0] * missing, _BLOCK))
    return _Schedule(products, start, sum_parts, blocks, (*parts, *[0] * missing))


@lru_cache(maxsize=1024)  # a plan for all numbers of rows
def _weight_plan(device, dtype, norm_dtype, constants, warps, stages):
    return Plan(_weight_gradient, constants, num_warps=warps, num_stages=stages)


@lru_cache(maxsize=1024)
def _sum_plan(device, dtype, norm_dtype, constants):
    return Plan(_sum_parts, constants, num_warps=4, num_stages=2)


def weight_gradients(rows: int, *products: Product) -> None:
    """Fill in the gradients of one or two linear layers over the same rows."""
    outs = [out for p in products for out in (p.grad_weight, p.grad_bias, *(p.norm[-2:] if p.norm else ()))]
    if not rows:
        for out in outs:
            out.zero_()
        return
    x, norm = products[0].x, products[0].norm
    schedule = _schedule(
        x.get_device(),
        x.dtype,
        norm and norm.weight.dtype,
        kind_of(x.dtype),
        architecture(x),
        rows,
        *[(*p.grad_weight.shape, p.norm is not None) for p in products],
    )
    sums = torch.empty(schedule.numbers, dtype=torch.float32, device=x.device)
    for p, (plan, grid, scalars) in zip(products, schedule.products, strict=True):
        norm = p.norm
        inputs = (norm.mean, norm.rstd, norm.linear_weight, norm.weight, norm.bias) if norm else _NO_NORM
        plan(grid, (p.grad, p.x, *inputs, sums), scalars)
    schedule.sum_parts((schedule.blocks,), (sums, *outs, *_NO_NORM[: 6 - len(outs)]), schedule.parts)
