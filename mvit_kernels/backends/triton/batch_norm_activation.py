# SPDX-License-Identifier: Apache-2.0
"""``batch_norm_activation`` in Triton, for channels-last maps: rows of C channels, one a pixel.

Two passes over the map forward and two backward, one of sums and one that writes, with a kernel of a few microseconds
between them that adds up the parts. A part is every `parts`-th tile of rows: the map is swept from its beginning to its
end by all programs together, and the pass that writes begins at its end, which the L2 cache still holds. A small map is
one part, and both passes are one launch.

What a part is follows from the shape alone, and parts are added up in one order, so bits do not depend on the GPU.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _batch_norm, _rows
from ._launch import Plan, ceil_div, dense, next_power_of_2, register

OP = "batch_norm_activation"

# ---------------------------------------------------------------------------------------------------------- statistics


@triton.jit(do_not_specialize=["N", "parts", "units"])
def _statistics(
    x,
    sums,
    N,
    parts,
    units,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    part, columns, C = tl.program_id(1), tl.program_id(0) * BC + tl.arange(0, BC), units * UNIT
    centre, middle, spread = _batch_norm.moments(x, part, parts, N, columns, C, BM, BC)
    sums += columns * parts + part
    tl.store(sums, centre, mask=columns < C)
    tl.store(sums + C * parts, middle, mask=columns < C)
    tl.store(sums + 2 * C * parts, spread, mask=columns < C)


@triton.jit(do_not_specialize=["N", "parts", "C"])
def _combine_statistics(
    sums,
    mean,
    rstd,
    variance,
    N,
    parts,
    C,
    eps,
    ROWS: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    """All parts of CB channels, by Chan et al. 1983, in float32: the means are taken as differences from a mean that is
    itself one of differences, so that neither a mean far from 0 nor a first value far from the mean costs digits."""
    channels, part = tl.program_id(0) * CB + tl.arange(0, CB), tl.arange(0, PB)
    inside = (channels < C)[:, None] & (part < parts)[None, :]
    at = channels[:, None] * parts + part[None, :]
    centre = tl.load(sums + at, mask=inside, other=0.0)
    rest = tl.load(sums + C * parts + at, mask=inside, other=0.0)
    spread = tl.load(sums + 2 * C * parts + at, mask=inside, other=0.0)
    # ROWS of each of the part's tiles, of which the map's last may have fewer.
    last = (N - 1) // ROWS
    counts = ((last - part) // parts + 1) * ROWS - tl.where(part == last % parts, (last + 1) * ROWS - N, 0)
    counts = tl.where(part < parts, counts, 0).to(tl.float32)[None, :]
    shares = tl.div_rn(counts, N.to(tl.float32))
    first = tl.load(sums + channels * parts, mask=channels < C, other=0.0)
    near = tl.where(inside, (centre - first[:, None]) + rest, 0.0)
    middle = first + tl.sum(_rows.rounded_product(near, shares), axis=1)
    near = tl.where(inside, (centre - middle[:, None]) + rest, 0.0)
    shift = tl.sum(_rows.rounded_product(near, shares), axis=1)
    between = tl.where(inside, near - shift[:, None], 0.0)
    total = tl.sum(spread + between * between * counts, axis=1)
    _batch_norm.store_statistics(middle, shift, total, mean, rstd, variance, channels, N, C, eps)


@triton.jit(do_not_specialize=["N", "units", "blocks"])
def _normalise(
    x,
    mean,
    rstd,
    weight,
    bias,
    out,
    N,
    units,
    blocks,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    C = units * UNIT
    first_row, columns = _batch_norm.tile_of_program(blocks, BM, BC)
    offset = first_row.to(tl.int64) * C
    slope = _batch_norm.vector(weight, columns, C) * _batch_norm.vector(rstd, columns, C)
    middle, base = _batch_norm.vector(mean, columns, C), _batch_norm.vector(bias, columns, C)
    _batch_norm.write_tile(x + offset, out + offset, middle, slope, base, columns, N - first_row, C, BM, SILU)


@triton.jit(do_not_specialize=["N", "units"])
def _forward(
    x,
    weight,
    bias,
    out,
    mean,
    rstd,
    variance,
    N,
    units,
    eps,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    """All of a small map: a program has its channels to itself, and reads them again from the cache."""
    columns, C = tl.program_id(0) * BC + tl.arange(0, BC), units * UNIT
    part = tl.program_id(1)  # 0, of one
    centre, shift, squares = _batch_norm.moments(x, part, part + 1, N, columns, C, BM, BC)
    middle, sigma = _batch_norm.store_statistics(centre, shift, squares, mean, rstd, variance, columns, N, C, eps)
    slope, base = _batch_norm.vector(weight, columns, C) * sigma, _batch_norm.vector(bias, columns, C)
    for first in range(0, N, BM):
        _batch_norm.write_tile(x, out, middle, slope, base, columns, N - first, C, BM, SILU)
        x += BM * C
        out += BM * C


# ------------------------------------------------------------------------------------------------------------ gradients


@triton.jit(do_not_specialize=["N", "parts", "units"])
def _sum_gradients(
    grad_out,
    x,
    mean,
    rstd,
    weight,
    bias,
    sums,
    N,
    parts,
    units,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    part, columns, C = tl.program_id(1), tl.program_id(0) * BC + tl.arange(0, BC), units * UNIT
    middle, sigma = _batch_norm.vector(mean, columns, C), _batch_norm.vector(rstd, columns, C)
    scale, base = _batch_norm.vector(weight, columns, C), _batch_norm.vector(bias, columns, C)
    plain, projected = _batch_norm.gradient_sums(
        grad_out, x, middle, sigma, scale, base, part, parts, N, columns, C, BM, BC, SILU
    )
    sums += columns * parts + part
    tl.store(sums, plain, mask=columns < C)
    tl.store(sums + C * parts, projected, mask=columns < C)


@triton.jit(do_not_specialize=["N", "parts", "C"])
def _combine_gradients(
    sums,
    means,
    grad_weight,
    grad_bias,
    N,
    parts,
    C,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    channels, part = tl.program_id(0) * CB + tl.arange(0, CB), tl.arange(0, PB)
    inside = (channels < C)[:, None] & (part < parts)[None, :]
    at = channels[:, None] * parts + part[None, :]
    plain = tl.sum(tl.load(sums + at, mask=inside, other=0.0), axis=1)
    projected = tl.sum(tl.load(sums + C * parts + at, mask=inside, other=0.0), axis=1)
    _batch_norm.store_gradients(plain, projected, grad_weight, grad_bias, channels, C)
    count = N.to(tl.float32)
    tl.store(means + channels, tl.div_rn(plain, count), mask=channels < C)
    tl.store(means + C + channels, tl.div_rn(projected, count), mask=channels < C)


@triton.jit(do_not_specialize=["N", "units", "blocks"])
def _gradient(
    grad_out,
    x,
    mean,
    rstd,
    weight,
    bias,
    means,
    grad_x,
    N,
    units,
    blocks,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    C = units * UNIT
    first_row, columns = _batch_norm.tile_of_program(blocks, BM, BC)
    offset = first_row.to(tl.int64) * C
    middle, sigma = _batch_norm.vector(mean, columns, C), _batch_norm.vector(rstd, columns, C)
    scale, base = _batch_norm.vector(weight, columns, C), _batch_norm.vector(bias, columns, C)
    _batch_norm.write_gradient(
        grad_out + offset,
        x + offset,
        grad_x + offset,
        middle,
        sigma,
        scale,
        base,
        _batch_norm.vector(means, columns, C),
        _batch_norm.vector(means + C, columns, C),
        columns,
        N - first_row,
        C,
        BM,
        SILU,
    )


@triton.jit(do_not_specialize=["N", "units"])
def _backward(
    grad_out,
    x,
    mean,
    rstd,
    weight,
    bias,
    grad_x,
    grad_weight,
    grad_bias,
    N,
    units,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    """All of a small map, like `_forward`."""
    columns, C = tl.program_id(0) * BC + tl.arange(0, BC), units * UNIT
    middle, sigma = _batch_norm.vector(mean, columns, C), _batch_norm.vector(rstd, columns, C)
    scale, base = _batch_norm.vector(weight, columns, C), _batch_norm.vector(bias, columns, C)
    part = tl.program_id(1)
    plain, projected = _batch_norm.gradient_sums(
        grad_out, x, middle, sigma, scale, base, part, part + 1, N, columns, C, BM, BC, SILU
    )
    _batch_norm.store_gradients(plain, projected, grad_weight, grad_bias, columns, C)
    plain, projected = tl.div_rn(plain, N.to(tl.float32)), tl.div_rn(projected, N.to(tl.float32))
    for first in range(0, N, BM):
        _batch_norm.write_gradient(
            grad_out, x, grad_x, middle, sigma, scale, base, plain, projected, columns, N - first, C, BM, SILU
        )
        grad_out += BM * C
        x += BM * C
        grad_x += BM * C


# ------------------------------------------------------------------------------------------------------------- launches

_TILE = 2048  # elements of a tile, in 4 warps: 4096 take 166 registers a thread instead of 96, and spill at odd widths
_WIDEST = 64  # channels of a tile: 128 bytes of bfloat16, a line of the L2 cache
# Programs that add up a map: five for each of 128 SMs, as many as 96 registers a thread let run at once; a constant, so
# that the same map gives the same bits everywhere.
_PROGRAMS = 640
_COMBINED = 4096  # numbers of each kind in a tile that adds up parts, in 8 warps: all parts of a channel are in one
# A map of at most so many pixels is one launch, in which a program has 16 channels and reads 256 pixels at once.
_SMALL, _SMALL_TILE = 1024, (256, 16)


class _Shape(NamedTuple):
    """How a map of N rows of C channels is divided."""

    unit: int
    units: int
    BM: int
    BC: int
    blocks: int  # of channels
    tiles: int  # of rows
    parts: int  # 1: the map is small


@lru_cache(maxsize=4096)
def _shape(N: int, C: int) -> _Shape:
    unit, small = math.gcd(C, 8), N <= _SMALL
    BC = _SMALL_TILE[1] if small else min(next_power_of_2(max(C, 16)), _WIDEST)
    BM = _SMALL_TILE[0] if small else _TILE // BC
    blocks, tiles = ceil_div(C, BC), ceil_div(N, BM)
    parts = 1 if small else min(tiles, max(_PROGRAMS // blocks, 1))
    return _Shape(unit, C // unit, BM, BC, blocks, tiles, parts)


@lru_cache(maxsize=4096)
def _plan(kernel, device, dtype, norm_dtype, constants):
    """For one kind of call. The tiles of small maps, and those that add up parts, have 8 warps."""
    wide = kernel in (_forward, _backward, _combine_statistics, _combine_gradients)
    return Plan(kernel, constants, num_warps=8 if wide else 4, num_stages=1)


@lru_cache(maxsize=4096)
def _combining(kernel, device, norm_dtype, C, parts, *constants):
    """The plan and the grid of the kernel that adds up parts: all of them in one tile, with as many channels as fit."""
    PB = next_power_of_2(parts)
    CB = max(_COMBINED // PB, 1)
    return _plan(kernel, device, None, norm_dtype, (*constants, CB, PB)), (ceil_div(C, CB),)


def _as_rows(x):
    """`x` in channels-last memory, itself if it is."""
    return x.contiguous(memory_format=torch.channels_last)


def _laid_out_like(x, rows, result):
    return result if rows is x else torch.empty_like(x).copy_(result)


@register(OP)
def forward(x, weight, bias, eps, activation):
    rows, C = _as_rows(x), x.shape[1]
    weight, bias = dense(weight, bias)
    out = torch.empty_like(rows)
    mean, rstd, variance = (x.new_empty(C, dtype=torch.float32) for _ in range(3))
    if not x.numel():
        return _laid_out_like(x, rows, out), mean.fill_(torch.nan), rstd.fill_(torch.nan), variance.fill_(torch.nan)
    N = x.numel() // C
    shape, device, silu = _shape(N, C), x.get_device(), activation != ""
    tile = shape.unit, shape.BM, shape.BC
    if shape.parts == 1:
        plan = _plan(_forward, device, x.dtype, weight.dtype, (*tile, silu))
        plan((shape.blocks, 1), (rows, weight, bias, out, mean, rstd, variance), (N, shape.units, eps))
        return _laid_out_like(x, rows, out), mean, rstd, variance
    sums = x.new_empty(3 * C * shape.parts, dtype=torch.float32)
    plan = _plan(_statistics, device, x.dtype, None, tile)
    plan((shape.blocks, shape.parts), (rows, sums), (N, shape.parts, shape.units))
    plan, grid = _combining(_combine_statistics, device, None, C, shape.parts, shape.BM)
    plan(grid, (sums, mean, rstd, variance), (N, shape.parts, C, eps))
    plan = _plan(_normalise, device, x.dtype, weight.dtype, (*tile, silu))
    plan((shape.tiles * shape.blocks,), (rows, mean, rstd, weight, bias, out), (N, shape.units, shape.blocks))
    return _laid_out_like(x, rows, out), mean, rstd, variance


@register(f"{OP}_backward")
def backward(grad_out, x, mean, rstd, weight, bias, activation):
    rows, grad_out, C = _as_rows(x), _as_rows(grad_out), x.shape[1]
    weight, bias = dense(weight, bias)
    grad_x, grad_weight, grad_bias = torch.empty_like(rows), torch.empty_like(weight), torch.empty_like(bias)
    if not x.numel():
        return _laid_out_like(x, rows, grad_x), grad_weight.zero_(), grad_bias.zero_()
    N = x.numel() // C
    shape, device, silu = _shape(N, C), x.get_device(), activation != ""
    constants, given = (shape.unit, shape.BM, shape.BC, silu), (grad_out, rows, mean, rstd, weight, bias)
    if shape.parts == 1:
        plan = _plan(_backward, device, x.dtype, weight.dtype, constants)
        plan((shape.blocks, 1), (*given, grad_x, grad_weight, grad_bias), (N, shape.units))
        return _laid_out_like(x, rows, grad_x), grad_weight, grad_bias
    sums, means = x.new_empty(2 * C * shape.parts, dtype=torch.float32), x.new_empty(2 * C, dtype=torch.float32)
    plan = _plan(_sum_gradients, device, x.dtype, weight.dtype, constants)
    plan((shape.blocks, shape.parts), (*given, sums), (N, shape.parts, shape.units))
    plan, grid = _combining(_combine_gradients, device, weight.dtype, C, shape.parts)
    plan(grid, (sums, means, grad_weight, grad_bias), (N, shape.parts, C))
    plan = _plan(_gradient, device, x.dtype, weight.dtype, constants)
    plan((shape.tiles * shape.blocks,), (*given, means, grad_x), (N, shape.units, shape.blocks))
    return _laid_out_like(x, rows, grad_x), grad_weight, grad_bias
