# SPDX-License-Identifier: Apache-2.0
"""Gradients of the weights of linear layers, and of the LayerNorms before them; for the row-wise operators.

They are sums over all rows. Rows are split into parts by their number alone (never by the number of SMs), the sum of
each part is stored, and a second kernel adds up the parts: the same bits every time, without atomics.

The LayerNorm's parameters need no pass over the rows of their own. Let x̂ be the rows before weight γ and bias β are
applied, and P = gᵀ x̂ and b = Σ g the sums that the gradient of the linear weight W needs anyway. Then dW = P·γ + b ⊗ β,
dγ = Σₙ W·P and dβ = Wᵀ b.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._launch import Plan, architecture, ceil_div, kind_of, next_power_of_2


@triton.jit
def on_16_bytes(count):
    """The next multiple of four float32 numbers."""
    return (count + 3) // 4 * 4


@triton.jit
def _product_part(
    tile,
    part,
    parts,
    sums,
    grad,
    x,
    mean,
    rstd,
    weight,
    norm_weight,
    norm_bias,
    M,
    part_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """If `tile` is one of this product's: gradᵀ · x of that tile over one part of the rows, and what follows from it
    (see above). `sums` has room for what `_sum_parts` adds up: parts of the gradients of the weight and of the bias,
    and with a LayerNorm those of its weight and bias, a row of K for each part and tile of n. Returns the tile's number
    and the place of the sums for the next product."""
    K_TILES: tl.constexpr = (K + BK - 1) // BK
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    bias_sums = sums + on_16_bytes(parts * (N * K))
    norm_weight_sums = bias_sums + on_16_bytes(parts * N)
    norm_bias_sums = norm_weight_sums + on_16_bytes(parts * (N_TILES * K))
    if (tile >= 0) & (tile < N_TILES * K_TILES):
        n_tile, k_tile = tile // K_TILES, tile % K_TILES
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
        grads = tl.zeros([BM, BN], tl.float32)  # summed over its rows once, after the loop
        TOGETHER: tl.constexpr = 32 * BM  # in float32: 20,000 rows are sums of 32, 32 of these added, 20 of those added
        if PRECISION == "ieee":
            recent = tl.zeros_like(product)
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
            if PRECISION == "ieee":
                recent = _rows.add_product(tl.trans(g), operand, recent, PRECISION)
                grads += g
                if m % TOGETHER == TOGETHER - BM:
                    product = product + recent
                    recent = tl.zeros_like(product)
            else:
                product = tl.dot(tl.trans(g), operand, product, input_precision=PRECISION)
                grads += g.to(tl.float32)
            grad += BM * N
            x += BM * K
        if PRECISION == "ieee":
            product = product + recent
        bias_sum = tl.sum(grads, axis=0)
        if k_tile == 0:
            tl.store(bias_sums + part.to(tl.int64) * N + ns, bias_sum, mask=ns < N)
        if NORM:
            w = _rows.load(weight, ns, ks, N, K, K, 1, CHECK_N, CHECK_K).to(tl.float32)
            at = (part.to(tl.int64) * N_TILES + n_tile) * K + ks
            ROUNDED: tl.constexpr = PRECISION == "ieee"
            tl.store(norm_weight_sums + at, tl.sum(_rows.addends(w, product, ROUNDED), axis=0), mask=ks < K)
            tl.store(norm_bias_sums + at, tl.sum(_rows.addends(w, bias_sum[:, None], ROUNDED), axis=0), mask=ks < K)
            gamma = _rows.load_vector(norm_weight, ks, K, CHECK_K)
            beta = _rows.load_vector(norm_bias, ks, K, CHECK_K)
            product = product * gamma[None, :] + bias_sum[:, None] * beta[None, :]
        _rows.store(sums + part.to(tl.int64) * (N * K), product, ns, ks, N, K, K, CHECK_K)
    after = norm_weight_sums
    if NORM:
        after = norm_bias_sums + on_16_bytes(parts * (N_TILES * K))
    return tile - N_TILES * K_TILES, after


@triton.jit(do_not_specialize=["M", "part_rows"])
def _weight_gradients(
    sums,
    grad0,
    x0,
    mean0,
    rstd0,
    weight0,
    norm_weight0,
    norm_bias0,
    grad1,
    x1,
    grad2,
    x2,
    mean2,
    rstd2,
    weight2,
    norm_weight2,
    norm_bias2,
    grad3,
    x3,
    M,
    part_rows,
    N0: tl.constexpr,
    K0: tl.constexpr,
    N1: tl.constexpr,
    K1: tl.constexpr,
    N2: tl.constexpr,
    K2: tl.constexpr,
    N3: tl.constexpr,
    K3: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to four products over the same rows, those of a whole layer; 0 and 2 are behind a LayerNorm. In one launch
    they fill a GPU with fewer parts of the rows, and so with fewer sums, than one after another."""
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1).to(tl.int64)
    if grad0 is not None:
        tile, sums = _product_part(
            tile, part, parts, sums, grad0, x0, mean0, rstd0, weight0, norm_weight0, norm_bias0,
            M, part_rows, N0, K0, BN, BK, BM, True, PRECISION,
        )  # fmt: skip
    if grad1 is not None:
        tile, sums = _product_part(
            tile, part, parts, sums, grad1, x1, None, None, None, None, None,
            M, part_rows, N1, K1, BN, BK, BM, False, PRECISION,
        )  # fmt: skip
    if grad2 is not None:
        tile, sums = _product_part(
            tile, part, parts, sums, grad2, x2, mean2, rstd2, weight2, norm_weight2, norm_bias2,
            M, part_rows, N2, K2, BN, BK, BM, True, PRECISION,
        )  # fmt: skip
    if grad3 is not None:
        tile, sums = _product_part(
            tile, part, parts, sums, grad3, x3, None, None, None, None, None,
            M, part_rows, N3, K3, BN, BK, BM, False, PRECISION,
        )  # fmt: skip


@triton.jit
def _add_up(block, sums, out, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """If `block` is one of this result's: add up its sums over the parts. Returns the block's number and the place of
    the sums for the next result."""
    AT_ONCE: tl.constexpr = 8
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    if (block >= 0) & (block < BLOCKS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
        for first in range(0, parts, AT_ONCE):
            which = first + tl.arange(0, AT_ONCE)
            total += _rows.load(sums, which, at, parts, SIZE, SIZE, 1, True, SIZE % BLOCK != 0)
        tl.store(out + at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=at < SIZE)
    return block - BLOCKS, sums + on_16_bytes(parts.to(tl.int64) * SIZE)


@triton.jit
def _add_up_linear(block, sums, weight, bias, parts, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    block, sums = _add_up(block, sums, weight, parts, N * K, BLOCK)
    block, sums = _add_up(block, sums, bias, parts, N, BLOCK)
    return block, sums


@triton.jit
def _add_up_norm(
    block, sums, weight, bias, parts, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr
):
    parts *= (N + BN - 1) // BN
    block, sums = _add_up(block, sums, weight, parts, K, BLOCK)
    block, sums = _add_up(block, sums, bias, parts, K, BLOCK)
    return block, sums


@triton.jit(do_not_specialize=["parts"])
def _sum_parts(
    sums,
    weight0,
    bias0,
    norm_weight0,
    norm_bias0,
    weight1,
    bias1,
    weight2,
    bias2,
    norm_weight2,
    norm_bias2,
    weight3,
    bias3,
    parts,
    N0: tl.constexpr,
    K0: tl.constexpr,
    N1: tl.constexpr,
    K1: tl.constexpr,
    N2: tl.constexpr,
    K2: tl.constexpr,
    N3: tl.constexpr,
    K3: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what `_weight_gradients` stored, in the same order."""
    block = tl.program_id(0)
    if weight0 is not None:
        block, sums = _add_up_linear(block, sums, weight0, bias0, parts, N0, K0, BLOCK)
        block, sums = _add_up_norm(block, sums, norm_weight0, norm_bias0, parts, N0, K0, BN, BLOCK)
    if weight1 is not None:
        block, sums = _add_up_linear(block, sums, weight1, bias1, parts, N1, K1, BLOCK)
    if weight2 is not None:
        block, sums = _add_up_linear(block, sums, weight2, bias2, parts, N2, K2, BLOCK)
        block, sums = _add_up_norm(block, sums, norm_weight2, norm_bias2, parts, N2, K2, BN, BLOCK)
    if weight3 is not None:
        block, sums = _add_up_linear(block, sums, weight3, bias3, parts, N3, K3, BLOCK)


class Norm(NamedTuple):
    """The LayerNorm before a linear layer."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor


class Product(NamedTuple):
    """A linear layer: the gradient of its output rows, its input rows (before the LayerNorm, if there is one) and its
    weight."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    norm: Norm | None = None


class Gradients(NamedTuple):
    """The gradients of a linear layer's weight and bias, and of the LayerNorm's before it."""

    of_linear: tuple[Tensor, Tensor]
    of_norm: tuple[Tensor, Tensor] | tuple[()]


# By kind: columns of grad, columns of x, rows per step, warps, stages.
_WEIGHT_TILES = {
    "half": (64, 64, 64, 4, 2),
    "tf32": (64, 64, 32, 4, 2),
    "ieee": (32, 32, 32, 4, 1),
}
_WEIGHT_WARPS_12 = 8  # 16-bit on 12.0: in 4 warps, 192 × 192 spills 8 bytes with Triton 3.8
_PROGRAMS = 256  # about two for each SM of a large GPU; a constant, so that the same rows give the same bits everywhere
_BLOCK = 256


class _Schedule(NamedTuple):
    """The two launches that compute the weight gradients of a call."""

    products: Plan
    grid: tuple[int, int]
    part_rows: int
    numbers: int  # float32 elements for the sums of all parts
    sum_parts: Plan
    blocks: int


@lru_cache(maxsize=4096)
def _schedule(device, dtype, norm_dtypes, kind, arch, rows, shapes) -> _Schedule:
    """`shapes`: (N, K) of each of the four products; (0, 0) for an absent one."""
    BN, BK, BM, warps, stages = _WEIGHT_TILES[kind]
    if kind == "half" and arch >= 120:
        warps = _WEIGHT_WARPS_12
    BN = min(BN, max(next_power_of_2(max(N for N, _ in shapes)), 16))
    BK = min(BK, max(next_power_of_2(max(K for _, K in shapes)), 16))
    tiles, blocks = sum(ceil_div(N, BN) * ceil_div(K, BK) for N, K in shapes), ceil_div(rows, BM)
    part_rows = ceil_div(blocks, min(ceil_div(_PROGRAMS, tiles), blocks)) * BM
    parts = ceil_div(rows, part_rows)
    numbers = sum_blocks = 0
    for slot, (N, K) in enumerate(shapes):
        n_tiles = ceil_div(N, BN)
        for number, size in [(parts, N * K), (parts, N), *[(parts * n_tiles, K)] * (2 * (slot % 2 == 0))]:
            numbers += ceil_div(number * size, 4) * 4
            sum_blocks += ceil_div(size, _BLOCK)
    flat = tuple(side for shape in shapes for side in shape)
    constants = (*flat, BN, BK, BM, "ieee" if kind == "ieee" else "tf32")
    products = _weight_plan(device, dtype, norm_dtypes, constants, warps, stages)
    sum_parts = _sum_plan(device, dtype, norm_dtypes, (*flat, BN, _BLOCK))
    return _Schedule(products, (tiles, parts), part_rows, numbers, sum_parts, sum_blocks)


@lru_cache(maxsize=1024)  # one plan for any number of rows
def _weight_plan(device, dtype, norm_dtypes, constants, warps, stages):
    return Plan(_weight_gradients, constants, num_warps=warps, num_stages=stages)


@lru_cache(maxsize=1024)
def _sum_plan(device, dtype, norm_dtypes, constants):
    return Plan(_sum_parts, constants, num_warps=4, num_stages=2)


def weight_gradients(rows: int, *products: Product) -> list[Gradients]:
    """The gradients of up to two linear layers behind a LayerNorm and two without one, over the same rows.

    Args:
        rows: their number; with none, all gradients are 0.
        products: contiguous tensors.

    Returns:
        One `Gradients` per product, in their order.
    """
    slots: list[Product | None] = [None] * 4
    for product in products:
        first = 0 if product.norm else 1
        slots[first if slots[first] is None else first + 2] = product
    results, inputs, outs, norm_dtypes = {}, [], [], []
    for slot, product in enumerate(slots):
        if product is None:
            inputs += [None] * (2 if slot % 2 else 7)
            outs += [None] * (2 if slot % 2 else 4)
            continue
        grad, x, weight, norm = product
        of_linear, of_norm = (torch.empty_like(weight), weight.new_empty(weight.shape[:1])), ()
        inputs += [grad, x]
        if norm:
            of_norm = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
            norm_dtypes += [slot, norm.weight.dtype, norm.bias.dtype]
            inputs += [norm.mean, norm.rstd, weight, norm.weight, norm.bias]
        outs += [*of_linear, *of_norm]
        results[id(product)] = Gradients(of_linear, of_norm)
    if rows:
        x = products[0].x
        shapes = tuple((0, 0) if p is None else tuple(p.weight.shape) for p in slots)
        schedule = _schedule(
            x.get_device(), x.dtype, tuple(norm_dtypes), kind_of(x.dtype), architecture(x), rows, shapes
        )
        sums = torch.empty(schedule.numbers, dtype=torch.float32, device=x.device)
        schedule.products(schedule.grid, (sums, *inputs), (rows, schedule.part_rows))
        schedule.sum_parts((schedule.blocks,), (sums, *outs), (schedule.grid[1],))
    else:
        for out in outs:
            if out is not None:
                out.zero_()
    return [results[id(product)] for product in products]


def add_columns(sums: Tensor, parts: int, *outs: Tensor) -> None:
    """outs[0] and outs[1], of K elements each, from sums[0] and sums[1], each `parts` rows of K padded to 16 bytes.

    This is one more launch of the kernel above, for which a column of K elements is the bias of a linear layer, or the
    weight of one with a single input.
    """
    K = outs[0].numel()
    plan = _sum_plan(sums.get_device(), None, tuple(out.dtype for out in outs), (0, 0, K, 1, 0, 0, 0, 0, 1, _BLOCK))
    plan((2 * ceil_div(K, _BLOCK),), (sums, *[None] * 4, *outs, *[None] * 6), (parts,))
