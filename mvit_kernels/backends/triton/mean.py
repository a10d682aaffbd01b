# SPDX-License-Identifier: Apache-2.0
"""The mean over a map in one launch, for frozen networks.

Example:
    >>> launch(x, out).run()
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Plan, architecture, ceil_div, kind_of, next_power_of_2
from ._maps import check_map, check_shape, device_key, flat, in_units, is_wide, pixel_stride, vector_of

NAME = "mean"


@triton.jit(do_not_specialize=["PIXELS", "scale", "XB", "XH", "XW", "OB"])
def _mean(
    x,
    out,
    PIXELS: tl.int32,
    scale,
    XB: tl.int64,
    XH: tl.int32,
    XW: tl.int32,
    OB: tl.int64,
    C: tl.constexpr,
    W: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """out = the mean of PIXELS pixels, W a row, for BC channels of one image a program; strides in units of VECTOR
    elements. Each of BP partial sums takes every BP-th pixel: no sum in float32 has more than PIXELS / BP terms before
    they are added up in pairs."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    image = program // BLOCKS
    channels = (program - image * BLOCKS) * BC + tl.arange(0, BC)
    x += image.to(tl.int64) * XB * VECTOR
    totals = tl.zeros([BP, BC], tl.float32)
    for first in range(0, PIXELS, BP):
        pixel = first + tl.arange(0, BP)
        inside = (pixel < PIXELS)[:, None] & (channels < C)[None, :]
        if WIDE:
            pixel = pixel.to(tl.int64)
        if FLAT:
            steps = pixel * (XW * VECTOR)
        else:
            row = pixel // W
            steps = (row * XH + (pixel - row * W) * XW) * VECTOR
        totals += tl.load(x + steps[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(totals, axis=0) * scale
    tl.store(out + image.to(tl.int64) * OB * VECTOR + channels, mean.to(out.dtype.element_ty), mask=channels < C)


_TILE = (64, 64, 4)  # at most so many pixels and channels, and warps: a thread then has four loads under way


@lru_cache(maxsize=4096)
def _plan(key, arch, geometry):
    return Plan(_mean, geometry, num_warps=_TILE[2], num_stages=1)


def launch(x: Tensor, out: Tensor) -> Launch:
    """Prepare ``out = x.mean((1, 2), keepdim=True)``, summed in float32; ``run()`` of what is returned launches it.

    Example:
        >>> launch(x, x.new_empty(x.shape[0], 1, 1, x.shape[3])).run()

    Args:
        x: (B, H, W, C) float32, bfloat16 or float16, channels adjacent and other strides free. The mean of an empty map
            is NaN, as PyTorch's.
        out: (B, 1, 1, C), channels adjacent; written.

    Raises:
        ValueError: shapes do not fit, or channels are not adjacent.
        TypeError: there are no kernels for the dtype.
    """
    check_map(NAME, "x", x)
    check_map(NAME, "out", out)
    B, H, W, C = x.shape
    check_shape(NAME, "out", out, (B, 1, 1, C), "one value for each image and channel")
    kind_of(x.dtype)
    pixels = H * W
    is_flat, vector = flat(x[:1]), vector_of(x, out)
    BP, BC = min(_TILE[0], next_power_of_2(max(pixels, 1))), min(_TILE[1], next_power_of_2(max(C, 1)))
    geometry = (C, 0 if is_flat else W, is_flat, is_wide(1, x), vector, BP, BC)
    plan = _plan(device_key(x, out), architecture(x), geometry)
    XB, XH, XW = in_units(x, vector)
    if is_flat:
        XH, XW = 0, pixel_stride(x[:1]) // vector
    scale = 1.0 / pixels if pixels else float("nan")
    return Launch(plan, (B * ceil_div(C, BC),), (x, out), (pixels, scale, XB, XH, XW, in_units(out, vector)[0]))
