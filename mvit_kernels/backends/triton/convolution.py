# SPDX-License-Identifier: Apache-2.0
"""A dense convolution with bias, activation and residual in one launch, for frozen networks.

Example:
    >>> launch(x, weight, bias, None, out, stride=2, activation="silu").run()

A convolution is a product of (pixels, k · k · in) by (k · k · in, out) whose first operand is never built: each step
takes a chunk of the channels under one tap of the filter, so that a tile is as easily loaded as in a 1×1 convolution,
and what lies outside the map is a row of zeros. The stem has too few channels for that. There one step takes all taps,
27 columns of 32, element by element; so it reads an image of any layout.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._launch import Launch, Plan, architecture, ceil_div, kind_of, next_power_of_2
from ._maps import (
    activated,
    check_activation,
    check_map,
    check_shape,
    device_key,
    flat,
    in_units,
    is_wide,
    kernel_strides,
    out_size,
    pixel_stride,
    places,
    vector_of,
)
from ._parts import parts_of, zero_parts

NAME = "convolution"
_STRIDES = ["M", "XB", "XH", "XW", "XC", "OB", "OH", "OW", "RB", "RH", "RW"]


@triton.jit
def _write(out, residual, y, bias, steps, kept, columns, kept_columns, rows_of_residual, ACTIVATION: tl.constexpr):
    """One part of the epilogue."""
    mask = kept[:, None] & kept_columns[None, :]
    if bias is not None:
        y += tl.load(bias + columns, mask=kept_columns, other=0.0).to(tl.float32)[None, :]
    y = activated(y, ACTIVATION)
    if residual is not None:
        y += tl.load(residual + rows_of_residual[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + steps[:, None] + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_STRIDES)
def _convolution(
    x,
    weight,
    bias,
    residual,
    out,
    M,
    XB: tl.int64,
    XH: tl.int32,
    XW: tl.int32,
    XC: tl.int32,
    OB: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    RB: tl.int64,
    RH: tl.int32,
    RW: tl.int32,
    C: tl.constexpr,
    N: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WN: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEM: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = act(x * weight + bias) + residual, for BM pixels and N0 + N1 channels a program.

    x is of H × W pixels and out of HEIGHT × WIDTH, both 0 if FLAT: then there is no filter, and pixels are equally far
    apart. The strides of x (image, row, column, channel), out and residual are in units of VECTOR elements, but x's in
    the stem, where they are in elements.
    """
    program = tl.program_id(0)
    tile = program // TILES  # the tiles of one set of pixels are neighbours, and x comes from the cache for all but one
    first_column = (program - tile * TILES) * (N0 + N1)
    first = tile * BM
    columns0 = first_column + tl.arange(0, N0)
    columns1 = first_column + N0 + tl.arange(0, N1 if N1 > 0 else N0)
    kept = tl.arange(0, BM) < M - first
    if FLAT:
        pixels = tl.arange(0, BM)
        if WIDE:
            pixels = pixels.to(tl.int64)
        start = first.to(tl.int64)
        x += start * XW * VECTOR
        out += start * OW * VECTOR
        x_steps, out_steps, residual_steps = pixels * XW * VECTOR, pixels * OW * VECTOR, pixels * RW * VECTOR
        if residual is not None:
            residual += start * RW * VECTOR
        top, left = pixels, pixels
    else:
        image, further, row, column = places(first, BM, HEIGHT, WIDTH, WIDE)
        start = image.to(tl.int64)
        top = row * STRIDE - (KERNEL // 2) * DILATION
        left = column * STRIDE - (KERNEL // 2) * DILATION
        UNIT: tl.constexpr = 1 if STEM else VECTOR
        x += start * XB * UNIT
        out += start * OB * VECTOR
        x_steps = (further * XB.to(further.dtype) + top * XH + left * XW) * UNIT
        out_steps = (further * OB.to(further.dtype) + row * OH + column * OW) * VECTOR
        residual_steps = out_steps
        if residual is not None:
            residual += start * RB * VECTOR
            residual_steps = (further * RB.to(further.dtype) + row * RH + column * RW) * VECTOR

    sums = zero_parts(BM, N0, N1)
    if STEM:
        # Taps × pixels, so that the threads of a warp are neighbouring pixels, which lie together in every layout, and
        # a thread has one pixel and taps that are known when it is compiled: half of the instructions.
        TAPS: tl.constexpr = KERNEL * KERNEL * C
        k = tl.arange(0, BK)
        tap = k // C
        kh, kw = tap // KERNEL, tap % KERNEL
        ih = top[None, :] + (kh * DILATION)[:, None]
        iw = left[None, :] + (kw * DILATION)[:, None]
        inside = kept[None, :] & (k < TAPS)[:, None] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        k_steps = kh * DILATION * XH + kw * DILATION * XW + (k - tap * C).to(x_steps.dtype) * XC
        taps = tl.load(x + k_steps[:, None] + x_steps[None, :], mask=inside, other=0.0)
        a = tl.trans(taps.to(weight.dtype.element_ty))
        w_steps = kh * WH + kw * WW + (k - tap * C)
        w = _filter(weight, w_steps, columns0, k < TAPS, N, WN, True, N % (N0 + N1) != 0)
        sums_new = (_rows.add_product(a, w, sums[0], PRECISION),)
        if N1 > 0:
            w = _filter(weight, w_steps, columns1, k < TAPS, N, WN, True, N % (N0 + N1) != 0)
            sums_new = sums_new + (_rows.add_product(a, w, sums[1], PRECISION),)
        sums = sums_new
    else:
        CHUNKS: tl.constexpr = (C + BK - 1) // BK
        for step in range(0, KERNEL * KERNEL * CHUNKS):
            tap = step // CHUNKS
            k = (step - tap * CHUNKS) * BK + tl.arange(0, BK)
            if KERNEL == 1:
                inside = kept
                pointers = x + x_steps[:, None] + k[None, :]
                w_start = weight
            else:
                kh = tap // KERNEL
                kw = tap - kh * KERNEL
                ih = top + kh * DILATION
                iw = left + kw * DILATION
                inside = kept & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
                pointers = x + (x_steps + (kh * XH + kw * XW) * (DILATION * VECTOR))[:, None] + k[None, :]
                w_start = weight + kh * WH + kw * WW
            if C % BK != 0:
                a = tl.load(pointers, mask=inside[:, None] & (k < C)[None, :], other=0.0)
            else:
                a = tl.load(pointers, mask=inside[:, None], other=0.0)
            w = _filter(w_start, k, columns0, k < C, N, WN, C % BK != 0, N % (N0 + N1) != 0)
            sums_new = (_rows.add_product(a, w, sums[0], PRECISION),)
            if N1 > 0:
                w = _filter(w_start, k, columns1, k < C, N, WN, C % BK != 0, N % (N0 + N1) != 0)
                sums_new = sums_new + (_rows.add_product(a, w, sums[1], PRECISION),)
            sums = sums_new

    _write(out, residual, sums[0], bias, out_steps, kept, columns0, columns0 < N, residual_steps, ACTIVATION)
    if N1 > 0:
        _write(out, residual, sums[1], bias, out_steps, kept, columns1, columns1 < N, residual_steps, ACTIVATION)


@triton.jit
def _filter(weight, k, columns, inside, N, WN: tl.constexpr, CHECK_K: tl.constexpr, CHECK_N: tl.constexpr):
    """The tile (k, columns) of a weight whose rows are output channels, WN elements apart."""
    pointers = weight + k[:, None] + columns[None, :] * WN
    if CHECK_K and CHECK_N:
        return tl.load(pointers, mask=inside[:, None] & (columns < N)[None, :], other=0.0)
    elif CHECK_K:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif CHECK_N:
        return tl.load(pointers, mask=(columns < N)[None, :], other=0.0)
    else:
        return tl.load(pointers)


# By kind, for 1×1 and for larger filters: (pixels, most columns, most channels a step, what a step costs, warps,
# stages), from the largest tiles down. The first row that gives every SM a program is taken, else the last: a map of
# 8 × 8 of one image is four tiles of 16 pixels. A step's barriers cost about as much as 16 more channels; with few
# programs nothing hides them, and long steps are better even where they are padded.
# 1×1 convolutions are bound by memory: tiles of 64 pixels, of which five are under way on an SM. In larger filters a
# tile's weights are up to 900 KB, read from the second cache, and serve 128 pixels.
_TILES = {
    ("half", False): (
        (64, 160, 64, 16, 4, 3),
        (64, 80, 64, 16, 4, 3),
        (32, 32, 128, 64, 4, 4),
        (16, 32, 128, 64, 2, 4),
    ),
    ("half", True): (
        (128, 160, 64, 16, 8, 3),
        (64, 80, 64, 16, 4, 4),
        (32, 32, 128, 64, 4, 4),
        (16, 32, 128, 64, 2, 4),
    ),
    ("tf32", False): ((64, 80, 32, 16, 4, 3), (32, 32, 32, 16, 4, 3), (16, 16, 64, 64, 2, 3)),
    ("tf32", True): ((64, 80, 32, 16, 4, 3), (32, 32, 32, 16, 4, 3), (16, 16, 64, 64, 2, 3)),
    # FFMA: all operands of a tile go through registers; sums are of steps, and longer ones would be less exact
    ("ieee", False): ((32, 32, 16, 16, 4, 2), (16, 16, 16, 16, 2, 2)),
    ("ieee", True): ((32, 32, 16, 16, 4, 2), (16, 16, 16, 16, 2, 2)),
}
_PROGRAMS = 132  # the SMs of an H100 or H200; an A100 has 108
# Of the stem, by kind: pixels (a thread has one), most columns, warps.
_STEM_TILES = {"half": (128, 64, 4), "tf32": (128, 64, 4), "ieee": (32, 32, 1)}
_STEM_TAPS = 64  # at most so many columns, of which fewer than half are padding, are loaded element by element


@lru_cache(maxsize=4096)
def columns_of(N: int, most: int) -> tuple[int, int, int]:
    """(first part, second part, tiles): the fewest equal tiles of at most `most` columns, 7 % of them padding at most,
    in parts as heads are (`parts_of`).

    Example:
        >>> columns_of(144, 160), columns_of(240, 160), columns_of(640, 160), columns_of(24, 160)
        ((128, 16, 1), (128, 0, 2), (128, 32, 4), (32, 0, 1))
    """
    best = None
    for tiles in range(ceil_div(N, most), ceil_div(N, 16) + 1):
        parts = parts_of(ceil_div(N, tiles))
        padded = tiles * sum(parts)
        if sum(parts) <= most and (best is None or padded * 107 < best[0] * 100):
            best = padded, (*parts, tiles)
            if padded * 100 <= N * 107:
                break
    return best[1]


@lru_cache(maxsize=4096)
def step_of(C: int, most: int, cost: int) -> int:
    """Channels a step, a power of two from 16 to `most`: the fewest computed, padding and `cost` for each step
    included.

    Example:
        >>> step_of(144, 64, 16), step_of(80, 64, 16), step_of(64, 64, 16), step_of(320, 128, 64)
        (32, 32, 64, 128)
    """
    sizes = [size for size in (16, 32, 64, 128) if size <= most]
    return min(sizes, key=lambda size: (ceil_div(C, size) * (size + cost), size))


def tile_of(
    kind: str, kernel: int, stem: bool, pixels: int, C: int, N: int
) -> tuple[int, int, int, int, int, int, int]:
    """(pixels, channels a step, first part and second part of columns, tiles of columns, warps, stages) for this many
    pixels, and C channels in and N out."""
    if stem:
        BM, most, warps = _STEM_TILES[kind]
        return BM, next_power_of_2(max(kernel * kernel * C, 16)), *columns_of(N, most), warps, 1
    for BM, most, step, cost, warps, stages in _TILES[kind, kernel > 1]:
        N0, N1, tiles = columns_of(N, most)
        tile = BM, step_of(C, step, cost), N0, N1, tiles, warps, stages
        if ceil_div(pixels, BM) * tiles >= _PROGRAMS:
            break
    return tile


@lru_cache(maxsize=4096)
def _plan(key, arch, kind, tile, geometry, activation):
    BM, BK, N0, N1, tiles, warps, stages = tile
    constants = (*geometry, BM, BK, N0, N1, tiles, "ieee" if kind == "ieee" else "tf32", activation)
    return Plan(_convolution, constants, num_warps=warps, num_stages=stages)


def packed(weight: Tensor) -> Tensor:
    """The weight (out, in, k, k) as the kernel wants it: channels-last, as `FrozenConv2d` keeps it."""
    return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: str | None = None,
) -> Launch:
    """Prepare ``out = act(conv(x, weight) + bias) + residual``; ``run()`` of what is returned launches it.

    Example:
        >>> step = launch(x, packed(weight), bias, None, out, activation="silu")
        >>> step.run()

    Args:
        x: (B, H, W, in), channels adjacent and other strides free. Where k · k · in is at most 64 and ``in`` at most 7
            (the stem), the stride of channels is free too, and the dtype may differ from the weight's.
        weight: (out, in, k, k), k odd, of float32, bfloat16 or float16, and in memory as `packed` returns it.
        bias: (out,), of any dtype, or None.
        residual: as out, or None.
        out: (B, ceil(H / stride), ceil(W / stride), out), channels adjacent; written. It may be a range of channels of
            a wider map.
        stride: of both axes, at least 1.
        dilation: of both axes, at least 1. x is padded with ``dilation · (k // 2)`` zeros on each side.
        activation: "silu", "relu" or None.

    Raises:
        ValueError: shapes do not fit, channels are not adjacent, or the activation is unknown.
        TypeError: there are no kernels for the dtype.
    """
    check_map(NAME, "x", x, adjacent=False)
    N, C, kernel, width = weight.shape
    B, H, W, channels = x.shape
    stem = kernel * width * C <= _STEM_TAPS and C < 8 and (kernel > 1 or x.stride(3) != 1)
    check_map(NAME, "x", x, adjacent=not stem)
    check_map(NAME, "out", out)
    if channels != C or kernel != width or kernel % 2 == 0:
        raise ValueError(
            f"{NAME}: weight has shape {tuple(weight.shape)}; (out, {channels}, k, k) with an odd k is wanted, for x "
            f"of {channels} channels"
        )
    if C > 1 and weight.stride(1) != 1:
        raise ValueError(f"{NAME}: weight is not channels-last in memory; give packed(weight)")
    check_activation(NAME, activation)
    shape = (B, out_size(H, stride), out_size(W, stride), N)
    check_shape(NAME, "out", out, shape, f"for x of {tuple(x.shape)}, {N} output channels and stride {stride}")
    check_shape(NAME, "bias", bias, (N,), "one value for each output channel")
    check_shape(NAME, "residual", residual, shape, "as out")
    if residual is not None:
        check_map(NAME, "residual", residual)

    kind, pixels = kind_of(weight.dtype), B * shape[1] * shape[2]
    tile = tile_of(kind, kernel, stem, pixels, C, N)
    is_flat = kernel == 1 and stride == 1 and not stem and flat(x, out, residual)
    vector = vector_of(None if stem else x, residual, out)
    wide = is_wide(tile[0], x, out, residual) or C * x.stride(3) >= 2**31
    sides = (0, 0, 0, 0) if is_flat else (H, W, *shape[1:3])
    geometry = (C, N, kernel, stride, dilation, *sides, *kernel_strides(weight), is_flat, wide, vector, stem)
    if is_flat:
        strides = [(0, 0, 0 if t is None else pixel_stride(t) // vector) for t in (x, out, residual)]
    else:
        strides = [in_units(x, 1 if stem else vector), in_units(out, vector), in_units(residual, vector)]
    tensors = (x, weight, bias, residual, out)
    plan = _plan(device_key(*tensors), architecture(x), kind, tile, geometry, activation or "")
    scalars = (pixels, *strides[0], x.stride(3) if stem else 0, *strides[1], *strides[2])
    return Launch(plan, (ceil_div(pixels, tile[0]) * tile[4],), tensors, scalars)
