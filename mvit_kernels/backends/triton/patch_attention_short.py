# SPDX-License-Identifier: Apache-2.0
"""``patch_attention`` for at most 16 tokens a sequence (stage 5 at 256 px): all heads of a sequence in one program.

The scores of a head are one 16 × 16 tile, so heads are the batch axis of three-dimensional products, with a warp each:
four heads cost as much as one, and whole rows of the map are read together.
"""

from functools import lru_cache

import triton
import triton.language as tl

from ._launch import Plan, next_power_of_2
from ._parts import Geometry, score_gradients, steps_of
from ._rows import addends

TOKENS = 16
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _first_token(qkv, SB: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """This program's sequence: the address of its first token, and its image, row and column inside the patch."""
    sequence = tl.program_id(0)
    image, i, j = (sequence // (PH * PW)).to(tl.int64), sequence // PW % PH, sequence % PW
    return qkv + image * SB + i.to(tl.int64) * SH + j * SW, image, i, j


@triton.jit
def _offsets(steps, HB: tl.constexpr, D: tl.constexpr, DB: tl.constexpr):
    """The offsets of the elements (head, token, column) from a sequence's first."""
    heads, columns = tl.arange(0, HB), tl.arange(0, DB)
    return steps[None, :, None] + heads[:, None, None] * D + columns[None, None, :]


@triton.jit
def _inside(
    N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, NB: tl.constexpr, DB: tl.constexpr
):
    heads, tokens, columns = tl.arange(0, HB), tl.arange(0, NB), tl.arange(0, DB)
    return (heads < HEADS)[:, None, None] & (tokens < N)[None, :, None] & (columns < D)[None, None, :]


@triton.jit
def forward(
    qkv,
    out,
    logsumexp,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NH: tl.constexpr,
    NW: tl.constexpr,
    SB: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    WIDE: tl.constexpr,
    HB: tl.constexpr,
    DB: tl.constexpr,
    NB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = NH * NW
    INNER: tl.constexpr = HEADS * D
    OUT_H: tl.constexpr = NW * PW * INNER
    tokens = tl.arange(0, NB)
    first, image, i, j = _first_token(qkv, SB, SH, SW, PH, PW)
    offsets = _offsets(steps_of(tokens, NW, PH * SH, PW * SW, WIDE), HB, D, DB)
    inside = _inside(N, HEADS, D, HB, NB, DB)
    q = tl.load(first + offsets, mask=inside, other=0.0)
    k = tl.load(first + INNER + offsets, mask=inside, other=0.0)
    v = tl.load(first + 2 * INNER + offsets, mask=inside, other=0.0)
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION) * scale
    if N < NB:
        scores = tl.where((tokens < N)[None, None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=2)
    p = tl.exp2((scores - largest[:, :, None]) * LOG2_E)
    total = tl.sum(p, axis=2)
    result = tl.dot(p.to(q.dtype), v, input_precision=PRECISION) / total[:, :, None]
    out += (image * (NH * PH) + i) * OUT_H + j * INNER
    out_offsets = _offsets(steps_of(tokens, NW, PH * OUT_H, PW * INNER, WIDE), HB, D, DB)
    tl.store(out + out_offsets, result.to(q.dtype), mask=inside)
    heads = tl.arange(0, HB)
    at = (tl.program_id(0).to(tl.int64) * HEADS + heads[:, None]) * N + tokens[None, :]
    mask = (heads < HEADS)[:, None] & (tokens < N)[None, :]
    tl.store(logsumexp + at, largest + tl.log2(total) * LN_2, mask=mask)


@triton.jit
def backward(
    grad_out,
    qkv,
    out,
    logsumexp,
    grad_qkv,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NH: tl.constexpr,
    NW: tl.constexpr,
    SB: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    WIDE: tl.constexpr,
    HB: tl.constexpr,
    DB: tl.constexpr,
    NB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = NH * NW
    INNER: tl.constexpr = HEADS * D
    OUT_H: tl.constexpr = NW * PW * INNER
    tokens, heads = tl.arange(0, NB), tl.arange(0, HB)
    first, image, i, j = _first_token(qkv, SB, SH, SW, PH, PW)
    offsets = _offsets(steps_of(tokens, NW, PH * SH, PW * SW, WIDE), HB, D, DB)
    inside = _inside(N, HEADS, D, HB, NB, DB)
    q = tl.load(first + offsets, mask=inside, other=0.0)
    k = tl.load(first + INNER + offsets, mask=inside, other=0.0)
    v = tl.load(first + 2 * INNER + offsets, mask=inside, other=0.0)
    start = (image * (NH * PH) + i) * OUT_H + j * INNER
    out_offsets = start + _offsets(steps_of(tokens, NW, PH * OUT_H, PW * INNER, WIDE), HB, D, DB)
    o = tl.load(out + out_offsets, mask=inside, other=0.0)
    g = tl.load(grad_out + out_offsets, mask=inside, other=0.0)
    delta = tl.sum(addends(o, g, o.dtype == tl.float32), axis=2)
    at = (tl.program_id(0).to(tl.int64) * HEADS + heads[:, None]) * N + tokens[None, :]
    mask = (heads < HEADS)[:, None] & (tokens < N)[None, :]
    lse = tl.load(logsumexp + at, mask=mask, other=0.0)
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION) * scale
    p = tl.exp2((scores - lse[:, :, None]) * LOG2_E)
    if N < NB:
        p = tl.where((tokens < N)[None, None, :], p, 0.0)
    grad_p = tl.dot(g, tl.permute(v, (0, 2, 1)), input_precision=PRECISION)
    ds = score_gradients(p, grad_p, delta[:, :, None], scale, N)
    p, ds = p.to(q.dtype), ds.to(q.dtype)
    grad_q = tl.dot(ds, k, input_precision=PRECISION)
    grad_k = tl.dot(tl.permute(ds, (0, 2, 1)), q, input_precision=PRECISION)
    grad_v = tl.dot(tl.permute(p, (0, 2, 1)), g, input_precision=PRECISION)
    into = grad_qkv + 3 * start + _offsets(steps_of(tokens, NW, PH * 3 * OUT_H, PW * 3 * INNER, WIDE), HB, D, DB)
    tl.store(into, grad_q.to(q.dtype), mask=inside)
    tl.store(into + INNER, grad_k.to(q.dtype), mask=inside)
    tl.store(into + 2 * INNER, grad_v.to(q.dtype), mask=inside)


# By kind: the most elements of a tile, (padded) heads · 16 · (padded) columns. 4 heads of 60 make 4096.
_LARGEST = {"half": 8192, "tf32": 4096, "ieee": 2048}


@lru_cache(maxsize=4096)
def plan(kernel, device, dtype, kind, arch, where: Geometry) -> Plan | None:
    """The plan of `kernel`, `forward` or `backward` above, one program per sequence.

    Returns:
        None where the sequences are longer than 16 tokens, or the tiles of all heads are too large.
    """
    HB, DB = next_power_of_2(where.heads), max(next_power_of_2(where.head_dim), 16)
    if where.NH * where.NW > TOKENS or HB * TOKENS * DB > _LARGEST[kind]:
        return None
    constants = (*where, HB, DB, TOKENS, "ieee" if kind == "ieee" else "tf32")
    return Plan(kernel, constants, num_warps=min(HB, 8), num_stages=1)
