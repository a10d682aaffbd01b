# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing of a map in one launch, for frozen networks.

Example:
    >>> launch(x, out).run()
"""

import math
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Plan, architecture, ceil_div, kind_of
from ._maps import check_map, check_shape, device_key, in_units, is_wide, vector_of

NAME = "resize"


@triton.jit
def _between(i, scale, size):
    """The two neighbours of pixel i of the result among `size` pixels, and the second's weight, by PyTorch's rule for
    ``align_corners=False``."""
    place = tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    before = tl.minimum(place.to(tl.int32), size - 1)
    return before, tl.minimum(before + 1, size - 1), place - before.to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "HEIGHT", "WIDTH", "down", "across", "XB", "XH", "XW", "OB", "OH", "OW"])
def _resize(
    x,
    out,
    H: tl.int32,
    W: tl.int32,
    HEIGHT: tl.int32,
    WIDTH: tl.int32,
    down,
    across,
    XB: tl.int64,
    XH: tl.int32,
    XW: tl.int32,
    OB: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One row of the result a program, GROUPS groups of VECTOR channels of it. x is of H × W pixels and out of HEIGHT ×
    WIDTH; their strides are in units of VECTOR elements."""
    PER_PIXEL: tl.constexpr = C // VECTOR
    blocks = (WIDTH * PER_PIXEL + GROUPS - 1) // GROUPS
    program = tl.program_id(0)
    above = program // blocks
    group = (program - above * blocks) * GROUPS + tl.arange(0, GROUPS)
    image = above // HEIGHT
    row = above - image * HEIGHT
    column = group // PER_PIXEL
    channels = ((group - column * PER_PIXEL) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    kept = (column < WIDTH)[:, None]
    upper, lower, low = _between(row, down, H)
    left, right, far = _between(column, across, W)
    if WIDE:
        left = left.to(tl.int64)
        right = right.to(tl.int64)
        column = column.to(tl.int64)
    x += image.to(tl.int64) * XB * VECTOR
    top = x + upper.to(tl.int64) * XH * VECTOR
    bottom = x + lower.to(tl.int64) * XH * VECTOR
    left_steps = (left * (XW * VECTOR))[:, None] + channels
    right_steps = (right * (XW * VECTOR))[:, None] + channels
    a = tl.load(top + left_steps, mask=kept, other=0.0).to(tl.float32)
    b = tl.load(top + right_steps, mask=kept, other=0.0).to(tl.float32)
    c = tl.load(bottom + left_steps, mask=kept, other=0.0).to(tl.float32)
    d = tl.load(bottom + right_steps, mask=kept, other=0.0).to(tl.float32)
    far = far[:, None]
    y = (1.0 - low) * ((1.0 - far) * a + far * b) + low * ((1.0 - far) * c + far * d)
    out += image.to(tl.int64) * OB * VECTOR + row.to(tl.int64) * OH * VECTOR
    tl.store(out + (column * (OW * VECTOR))[:, None] + channels, y.to(out.dtype.element_ty), mask=kept)


_TILE = (128, 4)  # groups and warps: a group of 16 bytes a thread


@lru_cache(maxsize=4096)
def _plan(key, arch, geometry):
    return Plan(_resize, geometry, num_warps=_TILE[1], num_stages=1)


def launch(x: Tensor, out: Tensor) -> Launch:
    """Prepare ``out = interpolate(x, size=out's, mode="bilinear", align_corners=False)``; ``run()`` of what is returned
    launches it. Weights are computed in float32, as PyTorch does.

    Example:
        >>> launch(x, x.new_empty(x.shape[0], 32, 32, x.shape[3])).run()

    Args:
        x: (B, H, W, C) float32, bfloat16 or float16, channels adjacent and other strides free.
        out: (B, H', W', C), channels adjacent; written.

    Raises:
        ValueError: shapes do not fit, a map is empty, or channels are not adjacent.
        TypeError: there are no kernels for the dtype.
    """
    check_map(NAME, "x", x)
    check_map(NAME, "out", out)
    B, H, W, C = x.shape
    height, width = out.shape[1:3]
    check_shape(NAME, "out", out, (B, height, width, C), "as many images and channels as x")
    if not (H and W and height and width):
        raise ValueError(f"{NAME}: {H} × {W} to {height} × {width} pixels; at least one is wanted in both maps")
    kind_of(x.dtype)
    vector = math.gcd(vector_of(x, out), C)
    groups, _ = _TILE
    geometry = (C, is_wide(1, x, out), vector, groups)
    plan = _plan(device_key(x, out), architecture(x), geometry)
    grid = (B * height * ceil_div(width * (C // vector), groups),)
    sizes = (H, W, height, width, H / height, W / width)
    return Launch(plan, grid, (x, out), (*sizes, *in_units(x, vector), *in_units(out, vector)))
