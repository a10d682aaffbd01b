# SPDX-License-Identifier: Apache-2.0
"""A depthwise 3×3 convolution with bias and activation in one launch, for frozen networks.

Example:
    >>> launch(x, packed(weight), bias, out, stride=2, activation="silu").run()

A row of the map is cut into groups of VECTOR channels of one pixel, 16 bytes each, so that no width of MobileViT leaves
padding. A thread has one group and computes ROWS rows of it: an input row is loaded once for all rows of the result
that it is part of, three loads for each input row, and 18 for four rows of the result instead of 36.
"""

import math
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Plan, architecture, ceil_div, kind_of
from ._maps import (
    activated,
    check_activation,
    check_map,
    check_shape,
    device_key,
    in_units,
    is_wide,
    kernel_strides,
    out_size,
    vector_of,
)

NAME = "depthwise_convolution"
_SIZES = ["H", "W", "HEIGHT", "WIDTH", "XB", "XH", "XW", "OB", "OH", "OW"]


@triton.jit(do_not_specialize=_SIZES)
def _depthwise(
    x,
    weight,
    bias,
    out,
    H: tl.int32,
    W: tl.int32,
    HEIGHT: tl.int32,
    WIDTH: tl.int32,
    XB: tl.int64,
    XH: tl.int32,
    XW: tl.int32,
    OB: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    WC: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = act(x * weight + bias), for ROWS rows of GROUPS groups a program. x is of H × W pixels and out of HEIGHT ×
    WIDTH; their strides are in units of VECTOR elements."""
    PER_PIXEL: tl.constexpr = C // VECTOR
    blocks = (WIDTH * PER_PIXEL + GROUPS - 1) // GROUPS
    strips = (HEIGHT + ROWS - 1) // ROWS
    program = tl.program_id(0)
    above = program // blocks
    group = (program - above * blocks) * GROUPS + tl.arange(0, GROUPS)
    image = above // strips
    first_row = (above - image * strips) * ROWS
    column = group // PER_PIXEL
    channel = (group - column * PER_PIXEL) * VECTOR
    channels = channel[:, None] + tl.arange(0, VECTOR)[None, :]
    kept = column < WIDTH
    left = column * STRIDE - DILATION
    if WIDE:
        column = column.to(tl.int64)
        left = left.to(tl.int64)
    x += image.to(tl.int64) * XB * VECTOR
    out += image.to(tl.int64) * OB * VECTOR + first_row.to(tl.int64) * OH * VECTOR

    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([GROUPS, VECTOR], tl.float32),)
    top = first_row * STRIDE - DILATION
    for i in tl.static_range((ROWS - 1) * STRIDE + 3):  # with dilation, ROWS is 1 and i the filter's row
        ih = top + i * DILATION
        x_row = x + ih.to(tl.int64) * XH * VECTOR
        for kw in tl.static_range(3):
            iw = left + kw * DILATION
            inside = kept & (iw >= 0) & (iw < W) & (ih >= 0) & (ih < H)
            value = tl.load(x_row + (iw * (XW * VECTOR))[:, None] + channels, mask=inside[:, None], other=0.0)
            value = value.to(tl.float32)
            updated = ()
            for row in tl.static_range(ROWS):
                total = sums[row]
                if i - row * STRIDE >= 0 and i - row * STRIDE < 3:
                    w = tl.load(weight + channels * WC + ((i - row * STRIDE) * WH + kw * WW))
                    total = tl.fma(value, w.to(tl.float32), total)
                updated = updated + (total,)
            sums = updated

    steps = (column * (OW * VECTOR))[:, None] + channels
    for row in tl.static_range(ROWS):
        y = sums[row]
        if bias is not None:
            y += tl.load(bias + channels).to(tl.float32)
        y = activated(y, ACTIVATION)
        stored = kept[:, None] & (first_row + row < HEIGHT)
        tl.store(out + row * OH * VECTOR + steps, y.to(out.dtype.element_ty), mask=stored)


# (rows, groups, warps), from the largest tiles down; the first that gives every SM four programs is taken, else the
# last. A thread has one group: a warp's loads are then 512 consecutive bytes.
_TILES = ((4, 128, 4), (2, 128, 4), (1, 128, 4), (1, 64, 2), (1, 32, 1))
_PROGRAMS = 4 * 132


@lru_cache(maxsize=4096)
def _plan(key, arch, geometry, rows, groups, warps, activation):
    return Plan(_depthwise, (*geometry, rows, groups, activation), num_warps=warps, num_stages=1)


def packed(weight: Tensor) -> Tensor:
    """The weight (C, 1, 3, 3) in float32 with the channels of a tap adjacent in memory: 16 bytes of it can be loaded at
    once, and it is not converted by every thread."""
    return weight.float().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: str | None = None,
) -> Launch:
    """Prepare ``out = act(conv(x, weight, groups=C) + bias)``; ``run()`` of what is returned launches it. Products are
    summed in float32.

    Example:
        >>> step = launch(x, packed(weight), bias, out, stride=2, activation="silu")
        >>> step.run()

    Args:
        x: (B, H, W, C) float32, bfloat16 or float16, channels adjacent and other strides free.
        weight: (C, 1, 3, 3) of any dtype and strides; that of `packed` is read fastest.
        bias: (C,), of any dtype, or None.
        out: (B, ceil(H / stride), ceil(W / stride), C), channels adjacent; written.
        stride: of both axes, at least 1.
        dilation: of both axes, at least 1. x is padded with `dilation` zeros on each side.
        activation: "silu", "relu" or None.

    Raises:
        ValueError: shapes do not fit, channels are not adjacent, or the activation is unknown.
        TypeError: there are no kernels for the dtype.
    """
    check_map(NAME, "x", x)
    check_map(NAME, "out", out)
    B, H, W, C = x.shape
    check_shape(NAME, "weight", weight, (C, 1, 3, 3), "one 3 × 3 filter for each channel of x")
    check_shape(NAME, "bias", bias, (C,), "one value for each channel")
    check_activation(NAME, activation)
    height, width = out_size(H, stride), out_size(W, stride)
    check_shape(NAME, "out", out, (B, height, width, C), f"for x of {tuple(x.shape)} and stride {stride}")
    kind_of(x.dtype)

    vector = math.gcd(vector_of(x, out), C)
    for tile in _TILES:
        rows, groups = tile[0] if dilation == 1 else 1, tile[1]
        grid = B * ceil_div(height, rows) * ceil_div(width * (C // vector), groups)
        if grid >= _PROGRAMS:
            break
    wide = is_wide(groups, x, out)
    geometry = (C, stride, dilation, *kernel_strides(weight), wide, vector)
    tensors = (x, weight, bias, out)
    plan = _plan(device_key(*tensors), architecture(x), geometry, rows, groups, tile[2], activation or "")
    return Launch(plan, (grid,), tensors, (H, W, height, width, *in_units(x, vector), *in_units(out, vector)))
