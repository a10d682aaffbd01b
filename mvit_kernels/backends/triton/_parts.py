# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: the addresses of tokens, and head rows as one or two parts of columns.

Tiles are powers of two wide, but the heads of MobileViT-S are 36, 48 and 60. A head of 36 or 48 is held as 32 + 16
columns instead of 64: a quarter less work, and on compute capability 8.0 it keeps backward from spilling. A head of 60
is one part of 64.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, next_power_of_2
from ._rows import add_product, addends


class Geometry(NamedTuple):
    """The kernels' constants: heads, head dim, patch, patches down and across, and the map's strides. As constants
    they tell the compiler how addresses are aligned; with run-time strides every load would be of one element."""

    heads: int
    head_dim: int
    PH: int
    PW: int
    NH: int
    NW: int
    SB: int  # strides in elements, of an image, of a row of the map, and of a token
    SH: int
    SW: int
    WIDE: bool  # offsets inside one image need 64 bits


def geometry(qkv: Tensor, num_heads: int, PH: int, PW: int) -> Geometry:
    """The geometry of qkv (B, H, W, 3·inner), whose channels are adjacent, and of the patch PH × PW."""
    _, H, W, channels = qkv.shape
    SB, SH, SW = qkv.stride()[:3]
    wide = (H - 1) * abs(SH) + (W - 1) * abs(SW) + channels >= 2**31 or H * W * channels >= 2**31
    return Geometry(num_heads, channels // (3 * num_heads), PH, PW, H // PH, W // PW, SB, SH, SW, wide)


@functools.cache
def parts_of(head_dim: int) -> tuple[int, int]:
    """The powers of two, at least 16, that cover a head's columns; the second is 0 where one is enough.

    Example:
        >>> parts_of(36), parts_of(60), parts_of(20), parts_of(72)
        ((32, 16), (64, 0), (32, 0), (64, 16))
    """
    padded = ceil_div(head_dim, 16) * 16
    first = next_power_of_2(padded + 1) // 2
    rest = padded - first
    second = next_power_of_2(rest) if rest else 0
    return (2 * first, 0) if second == first else (first, second)


@triton.jit
def steps_of(n, NW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, WIDE: tl.constexpr):
    """The offsets of the tokens n of a sequence from its first, in elements."""
    if WIDE:
        n = n.to(tl.int64)
    return (n // NW) * STEP_H + (n % NW) * STEP_W


@triton.jit
def _load_part(base, steps, n, N, columns, D: tl.constexpr, CHECK_N: tl.constexpr, CHECK_D: tl.constexpr):
    pointers = base + steps[:, None] + columns[None, :]
    if CHECK_N and CHECK_D:
        return tl.load(pointers, mask=(n < N)[:, None] & (columns < D)[None, :], other=0.0)
    elif CHECK_N:
        return tl.load(pointers, mask=(n < N)[:, None], other=0.0)
    elif CHECK_D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_parts(base, steps, n, N, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHECK_N: tl.constexpr):
    """Rows of D elements of the tokens n, as one or two parts; 0 outside."""
    parts = (_load_part(base, steps, n, N, tl.arange(0, D0), D, CHECK_N, D0 > D),)
    if D1 > 0:
        parts = parts + (_load_part(base, steps, n, N, D0 + tl.arange(0, D1), D, CHECK_N, D0 + D1 > D),)
    return parts


@triton.jit
def _store_part(base, tile, steps, n, N, columns, D: tl.constexpr, CHECK_N: tl.constexpr, CHECK_D: tl.constexpr):
    pointers = base + steps[:, None] + columns[None, :]
    tile = tile.to(base.dtype.element_ty)
    if CHECK_N and CHECK_D:
        tl.store(pointers, tile, mask=(n < N)[:, None] & (columns < D)[None, :])
    elif CHECK_N:
        tl.store(pointers, tile, mask=(n < N)[:, None])
    elif CHECK_D:
        tl.store(pointers, tile, mask=(columns < D)[None, :])
    else:
        tl.store(pointers, tile)


@triton.jit
def store_parts(base, parts, steps, n, N, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHECK_N: tl.constexpr):
    """The inverse of `load_parts`; rounds to the element type of `base`."""
    _store_part(base, parts[0], steps, n, N, tl.arange(0, D0), D, CHECK_N, D0 > D)
    if D1 > 0:
        _store_part(base, parts[1], steps, n, N, D0 + tl.arange(0, D1), D, CHECK_N, D0 + D1 > D)


@triton.jit
def zero_parts(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Accumulators for ROWS rows of a head."""
    parts = (tl.zeros([ROWS, D0], tl.float32),)
    if D1 > 0:
        parts = parts + (tl.zeros([ROWS, D1], tl.float32),)
    return parts


@triton.jit
def product(a, b, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ, of rows with rows."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if D1 > 0:
        s = add_product(a[1], tl.trans(b[1]), s, PRECISION)
    return s


@triton.jit
def weigh(p, rows, sums, D1: tl.constexpr, PRECISION: tl.constexpr):
    """sums + p · rows, part by part."""
    results = (add_product(p, rows[0], sums[0], PRECISION),)
    if D1 > 0:
        results = results + (add_product(p, rows[1], sums[1], PRECISION),)
    return results


@triton.jit
def score_gradients(p, grad_p, delta, scale, N: tl.constexpr):
    """dS of the weights p, from their gradients and delta = Σ p · grad_p; exactly 0 for a sequence of one token. (Its
    weight is 1 whatever its score, but grad_p and delta are two sums of the same values.)"""
    ds = p * (grad_p - delta) * scale
    return ds * 0.0 if N == 1 else ds


@triton.jit
def row_dots(a, b, D1: tl.constexpr):
    """The dot products of the rows of a with those of b."""
    dots = tl.sum(addends(a[0], b[0], a[0].dtype == tl.float32), axis=1)
    if D1 > 0:
        dots += tl.sum(addends(a[1], b[1], a[1].dtype == tl.float32), axis=1)
    return dots
