# SPDX-License-Identifier: Apache-2.0
"""Dropout and drop-path inside kernels: the factors of `mvit_kernels.dropout`, applied where rows are written.

Example:
    >>> drop = dropped(x, seed, ATTENTION_BRANCH, 0.1, 0.0, True, (2, 2))
    >>> plan = Plan(_kernel, (K, N, BM, *drop.constants), …)
    >>> plan(grid, (x, drop.seed, out), (rows, *drop.scalars))

One Philox call yields four numbers, for four adjacent channels, so that a tile needs a quarter of the calls. On sm_90 a
call takes about a hundred instructions; a call for every element takes 2.3 times as many in all. Drop-path takes one
call for a whole row: in the kernel it costs no launch and no memory, while each mask drawn by PyTorch costs two
launches.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import keep_scale, threshold
from . import _rows
from ._launch import Plan, ceil_div


class Dropped(NamedTuple):
    """What a kernel is passed: a tensor, scalars and constants."""

    seed: Tensor | None
    scalars: tuple[int, float, int, float]  # threshold and scale of dropout, then of drop-path
    constants: tuple[int, ...]  # DROP, PATH, BRANCH, H, W, PH, PW


NOTHING = Dropped(None, (0, 1.0, 0, 1.0), (0,) * 7)


def dropped(
    x: Tensor,
    seed: Tensor | None,
    branch: int,
    probability: float,
    path: float,
    path_scale: bool,
    patch_size: tuple[int, int],
) -> Dropped:
    """The arguments for the rows of x, a (B, H, W, d) map; `NOTHING` if both probabilities are 0.

    Args:
        x: (B, H, W, d).
        seed, branch, probability, path, path_scale, patch_size: as in `mvit_kernels.dropout.branch_factor`.
    """
    if not (probability or path):
        return NOTHING
    where = (*x.shape[1:3], *patch_size) if path else (0,) * 4  # with dropout alone, one variant serves all maps
    scalars = (
        _as_int32(threshold(probability)),
        keep_scale(probability),
        _as_int32(threshold(path)),
        keep_scale(path) if path_scale else 1.0,
    )
    return Dropped(seed, scalars, (int(probability > 0), int(path > 0), branch, *where))


def _as_int32(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


@triton.jit
def _numbers(seed, c0, c1):
    high = tl.load(seed + 1)
    c2, c3 = (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(tl.load(seed), c0, c1, c2, c3)


@triton.jit
def element_factor(
    seed, first_row, first_column, threshold, scale, BRANCH: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr
):
    """The factors that dropout applies to a tile."""
    fours = first_column // 4 + tl.arange(0, NB // 4) + BRANCH * 1073741824
    rows = first_row + tl.arange(0, BM)
    a, b, c, d = _numbers(seed, fours[None, :], rows[:, None])
    least = threshold.to(tl.uint32, bitcast=True)
    # One byte a decision: the tile goes through shared memory to reach the layout of the rows.
    evens = tl.join((a >= least).to(tl.int8), (c >= least).to(tl.int8))
    odds = tl.join((b >= least).to(tl.int8), (d >= least).to(tl.int8))
    keep = tl.reshape(tl.join(evens, odds), (BM, NB))
    return tl.where(keep != 0, scale, 0.0)


@triton.jit
def row_factor(
    seed,
    first_row,
    threshold,
    scale,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
):
    """The factors that drop-path applies to rows: one decision per (image, patch position) sequence."""
    rows = first_row + tl.arange(0, BM)
    sequences = (rows // (H * W) * PH + rows // W % PH) * PW + rows % PW  # PH divides H, and PW divides W
    number, _, _, _ = _numbers(seed, tl.full([BM], -2147483648 + BRANCH * 1073741824, tl.int32), sequences)
    return tl.where(number >= threshold.to(tl.uint32, bitcast=True), scale, 0.0)


@triton.jit(do_not_specialize=["M", "threshold", "path_threshold"])
def _drop(
    x,
    seed,
    out,
    M,
    threshold,
    scale,
    path_threshold,
    path_scale,
    N: tl.constexpr,
    BM: tl.constexpr,
    NB: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """out = x after dropout and drop-path."""
    first_row, first_column = tl.program_id(0) * BM, tl.program_id(1) * NB
    offset = first_row.to(tl.int64) * N
    rows, columns, end = tl.arange(0, BM), first_column + tl.arange(0, NB), M - first_row
    y = _rows.load(x + offset, rows, columns, end, N, N, 1, True, N % NB != 0).to(tl.float32)
    if DROP:
        y *= element_factor(seed, first_row, first_column, threshold, scale, BRANCH, BM, NB)
    if PATH:
        y *= row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)[:, None]
    _rows.store(out + offset, y, rows, columns, end, N, N, N % NB != 0)


_TILE = (32, 64, 4, 1)  # rows, columns, warps, stages


@lru_cache(maxsize=4096)
def _drop_plan(device, dtype, N, constants):
    BM, NB, warps, stages = _TILE
    return Plan(_drop, (N, BM, NB, *constants), num_warps=warps, num_stages=stages)


def drop_rows(x: Tensor, drop: Dropped) -> Tensor:
    """The contiguous rows of x after dropout and drop-path: the gradient of a branch, from that of the sum behind it.

    It is a kernel of its own for gradients that several kernels read: computing the mask in each costs more.
    """
    if drop is NOTHING:
        return x
    out, N = torch.empty_like(x), x.shape[-1]
    if rows := x.numel() // N:
        plan = _drop_plan(x.get_device(), x.dtype, N, drop.constants)
        BM, NB = _TILE[:2]
        plan((ceil_div(rows, BM), ceil_div(N, NB)), (x, drop.seed, out), (rows, *drop.scalars))
    return out
