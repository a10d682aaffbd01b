# SPDX-License-Identifier: Apache-2.0
"""``patch_attention`` in Triton: the grouping is in the addresses, and softmax runs block by block over the keys.

Token n of the sequence at position (i, j) of the patches is at row ``(n // NW) · ph + i`` and column ``(n % NW) · pw +
j`` of the map, where NW is the number of patches in a row. NW and N are constants of the kernel: a division by a
run-time NW costs 430 of 1389 instructions.

Forward is FlashAttention (arXiv:2205.14135, algorithm 1). Exponents are converted to base 2 only after the maximum is
subtracted: before, scores of a thousand would lose three more bits of their differences, and float32 gradients were
three times as far off as PyTorch's. Backward needs no atomics: a program owns a whole (sequence, head) where its
queries fit on chip (5 products), and otherwise one block of queries, then the same block of keys (7 products).
Sequences of up to 16 tokens have kernels of their own (`patch_attention_short`).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import patch_attention_short as short
from ._launch import Launch, Plan, architecture, ceil_div, dense, kind_of, next_power_of_2, register
from ._parts import (
    Geometry,
    geometry,
    load_parts,
    parts_of,
    product,
    row_dots,
    score_gradients,
    steps_of,
    store_parts,
    weigh,
    zero_parts,
)

OP = "patch_attention"
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(HEADS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """This program's image, row and column inside the patch, head, and index of sequence and head. Heads vary fastest,
    so that neighbouring programs read the same rows."""
    both = tl.program_id(0)
    head, sequence = both % HEADS, both // HEADS
    return sequence // (PH * PW), sequence // PW % PH, sequence % PW, head, both.to(tl.int64)


@triton.jit
def _forward(
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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries of one head of one sequence per program."""
    N: tl.constexpr = NH * NW
    INNER: tl.constexpr = HEADS * D
    OUT_H: tl.constexpr = NW * PW * INNER
    image, i, j, head, both = _place(HEADS, PH, PW)
    qkv += image.to(tl.int64) * SB + i.to(tl.int64) * SH + j * SW + head * D
    out += (image.to(tl.int64) * (NH * PH) + i) * OUT_H + j * INNER + head * D
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    CHECK_M: tl.constexpr = N % BM != 0
    CHECK_N: tl.constexpr = N % BN != 0
    q = load_parts(qkv, steps_of(ms, NW, PH * SH, PW * SW, WIDE), ms, N, D, D0, D1, CHECK_M)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = zero_parts(BM, D0, D1)
    for n in range(0, N, BN):
        ns = n + tl.arange(0, BN)
        steps = steps_of(ns, NW, PH * SH, PW * SW, WIDE)
        k = load_parts(qkv + INNER, steps, ns, N, D, D0, D1, CHECK_N)
        scores = product(q, k, D1, PRECISION) * scale
        if CHECK_N:
            scores = tl.where((ns < N)[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.exp2((scores - now[:, None]) * LOG2_E)
        shrink = tl.exp2((largest - now) * LOG2_E)
        total = total * shrink + tl.sum(p, axis=1)
        largest = now
        v = load_parts(qkv + 2 * INNER, steps, ns, N, D, D0, D1, CHECK_N)
        shrunk = ()
        for c in tl.static_range(1 + (D1 > 0)):
            shrunk = shrunk + (sums[c] * shrink[:, None],)
        sums = weigh(p.to(qkv.dtype.element_ty), v, shrunk, D1, PRECISION)
    results = ()
    for c in tl.static_range(1 + (D1 > 0)):
        results = results + (sums[c] / total[:, None],)
    store_parts(out, results, steps_of(ms, NW, PH * OUT_H, PW * INNER, WIDE), ms, N, D, D0, D1, CHECK_M)
    tl.store(logsumexp + both * N + ms, largest + tl.log2(total) * LN_2, mask=ms < N)


@triton.jit
def _backward_whole(
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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of one sequence per program: all queries stay on chip, keys pass in blocks of BN."""
    N: tl.constexpr = NH * NW
    INNER: tl.constexpr = HEADS * D
    OUT_H: tl.constexpr = NW * PW * INNER
    CHECK_M: tl.constexpr = N % BM != 0
    CHECK_N: tl.constexpr = N % BN != 0
    image, i, j, head, both = _place(HEADS, PH, PW)
    qkv += image.to(tl.int64) * SB + i.to(tl.int64) * SH + j * SW + head * D
    first = (image.to(tl.int64) * (NH * PH) + i) * OUT_H + j * INNER
    out += first + head * D
    grad_out += first + head * D
    grad_qkv += 3 * first + head * D
    ms = tl.arange(0, BM)
    q = load_parts(qkv, steps_of(ms, NW, PH * SH, PW * SW, WIDE), ms, N, D, D0, D1, CHECK_M)
    out_steps = steps_of(ms, NW, PH * OUT_H, PW * INNER, WIDE)
    o = load_parts(out, out_steps, ms, N, D, D0, D1, CHECK_M)
    g = load_parts(grad_out, out_steps, ms, N, D, D0, D1, CHECK_M)
    delta = row_dots(o, g, D1)
    lse = tl.load(logsumexp + both * N + ms, mask=ms < N, other=0.0)
    grad_q = zero_parts(BM, D0, D1)
    for n in range(0, N, BN):
        ns = n + tl.arange(0, BN)
        steps = steps_of(ns, NW, PH * SH, PW * SW, WIDE)
        k = load_parts(qkv + INNER, steps, ns, N, D, D0, D1, CHECK_N)
        v = load_parts(qkv + 2 * INNER, steps, ns, N, D, D0, D1, CHECK_N)
        p = tl.exp2((product(q, k, D1, PRECISION) * scale - lse[:, None]) * LOG2_E)
        if CHECK_N:
            p = tl.where((ns < N)[None, :], p, 0.0)
        ds = score_gradients(p, product(g, v, D1, PRECISION), delta[:, None], scale, N)
        p, ds = p.to(qkv.dtype.element_ty), ds.to(qkv.dtype.element_ty)
        grad_v = weigh(tl.trans(p), g, zero_parts(BN, D0, D1), D1, PRECISION)
        grad_k = weigh(tl.trans(ds), q, zero_parts(BN, D0, D1), D1, PRECISION)
        grad_q = weigh(ds, k, grad_q, D1, PRECISION)
        grad_steps = steps_of(ns, NW, PH * 3 * OUT_H, PW * 3 * INNER, WIDE)
        store_parts(grad_qkv + INNER, grad_k, grad_steps, ns, N, D, D0, D1, CHECK_N)
        store_parts(grad_qkv + 2 * INNER, grad_v, grad_steps, ns, N, D, D0, D1, CHECK_N)
    grad_steps = steps_of(ms, NW, PH * 3 * OUT_H, PW * 3 * INNER, WIDE)
    store_parts(grad_qkv, grad_q, grad_steps, ms, N, D, D0, D1, CHECK_M)


@triton.jit
def _backward_blocks(
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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of one head of one sequence per program: the gradient of BM queries over all keys, then those of the BM
    keys and values of the same tokens over all queries, BN at a time."""
    N: tl.constexpr = NH * NW
    INNER: tl.constexpr = HEADS * D
    OUT_H: tl.constexpr = NW * PW * INNER
    CHECK_M: tl.constexpr = N % BM != 0
    CHECK_N: tl.constexpr = N % BN != 0
    image, i, j, head, both = _place(HEADS, PH, PW)
    qkv += image.to(tl.int64) * SB + i.to(tl.int64) * SH + j * SW + head * D
    first = (image.to(tl.int64) * (NH * PH) + i) * OUT_H + j * INNER
    out += first + head * D
    grad_out += first + head * D
    grad_qkv += 3 * first + head * D
    logsumexp += both * N
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    steps = steps_of(ms, NW, PH * SH, PW * SW, WIDE)
    out_steps = steps_of(ms, NW, PH * OUT_H, PW * INNER, WIDE)
    grad_steps = steps_of(ms, NW, PH * 3 * OUT_H, PW * 3 * INNER, WIDE)

    q = load_parts(qkv, steps, ms, N, D, D0, D1, CHECK_M)
    g = load_parts(grad_out, out_steps, ms, N, D, D0, D1, CHECK_M)
    delta = row_dots(load_parts(out, out_steps, ms, N, D, D0, D1, CHECK_M), g, D1)
    lse = tl.load(logsumexp + ms, mask=ms < N, other=0.0)
    grad_q = zero_parts(BM, D0, D1)
    for n in range(0, N, BN):
        ns = n + tl.arange(0, BN)
        key_steps = steps_of(ns, NW, PH * SH, PW * SW, WIDE)
        k = load_parts(qkv + INNER, key_steps, ns, N, D, D0, D1, CHECK_N)
        v = load_parts(qkv + 2 * INNER, key_steps, ns, N, D, D0, D1, CHECK_N)
        p = tl.exp2((product(q, k, D1, PRECISION) * scale - lse[:, None]) * LOG2_E)
        if CHECK_N:
            p = tl.where((ns < N)[None, :], p, 0.0)
        ds = score_gradients(p, product(g, v, D1, PRECISION), delta[:, None], scale, N)
        grad_q = weigh(ds.to(qkv.dtype.element_ty), k, grad_q, D1, PRECISION)
    store_parts(grad_qkv, grad_q, grad_steps, ms, N, D, D0, D1, CHECK_M)

    keys = load_parts(qkv + INNER, steps, ms, N, D, D0, D1, CHECK_M)
    values = load_parts(qkv + 2 * INNER, steps, ms, N, D, D0, D1, CHECK_M)
    grad_k, grad_v = zero_parts(BM, D0, D1), zero_parts(BM, D0, D1)
    for n in range(0, N, BN):
        ns = n + tl.arange(0, BN)
        row_steps = steps_of(ns, NW, PH * OUT_H, PW * INNER, WIDE)
        queries = load_parts(qkv, steps_of(ns, NW, PH * SH, PW * SW, WIDE), ns, N, D, D0, D1, CHECK_N)
        grads = load_parts(grad_out, row_steps, ns, N, D, D0, D1, CHECK_N)
        deltas = row_dots(load_parts(out, row_steps, ns, N, D, D0, D1, CHECK_N), grads, D1)
        lses = tl.load(logsumexp + ns, mask=ns < N, other=0.0)
        # keys by queries: the transposes that the products need. Rows of keys past the end are never stored.
        p = tl.exp2((product(keys, queries, D1, PRECISION) * scale - lses[None, :]) * LOG2_E)
        ds = score_gradients(p, product(values, grads, D1, PRECISION), deltas[None, :], scale, N)
        grad_v = weigh(p.to(qkv.dtype.element_ty), grads, grad_v, D1, PRECISION)
        grad_k = weigh(ds.to(qkv.dtype.element_ty), queries, grad_k, D1, PRECISION)
    store_parts(grad_qkv + INNER, grad_k, grad_steps, ms, N, D, D0, D1, CHECK_M)
    store_parts(grad_qkv + 2 * INNER, grad_v, grad_steps, ms, N, D, D0, D1, CHECK_M)


# By kind and (padded) columns of a head: queries, keys per step, warps, stages.
_FORWARD = {
    "half": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
    "tf32": {64: (64, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    "ieee": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}
_LONG = (128, 64, 8, 2)  # 16-bit, from 128 tokens on, where there are many queries:
_MANY = 128 * 128  # enough for a program on each of 128 SMs
# 32 + 16 columns on 10.x, unless `_LONG`: 64 keys spill 24 bytes (Triton 3.9), 32 spill 8 (3.8), 16 none.
_FEW_BLACKWELL = 16
_FEW_12 = 32  # 32 columns on 12.0, unless `_LONG`: 64 keys spill 8 bytes with Triton 3.8
# Backward with all queries on chip, by columns: for up to 64 tokens, and up to 256; keys per step, warps, stages.
_WHOLE = {32: ((64, 4, 1), (32, 8, 1)), 64: ((64, 8, 1), (16, 8, 1))}
_WHOLE_AMPERE = 32  # 32 + 16 columns on 8.x: 16 keys spill 8 bytes there and 32 none; on 12.0 it is the other way round
# Backward by blocks, by kind and columns: tokens of the block, other tokens per step, warps, stages.
_BLOCKS = {
    "half": {64: (64, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    "tf32": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "ieee": {64: (16, 16, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}


def _row(table, columns):
    return next(row for widest, row in table.items() if columns <= widest)


@lru_cache(maxsize=4096)
def _plan(device, dtype, kind, arch, where: Geometry, many: bool):
    D0, D1 = parts_of(where.head_dim)
    N = where.NH * where.NW
    BM, BN, warps, stages = _row(_FORWARD[kind], D0 + D1)
    if many and kind == "half" and D0 + D1 <= 64 and N >= _LONG[0]:
        BM, BN, warps, stages = _LONG
    elif D1 and kind == "half" and 100 <= arch < 120:
        BN = _FEW_BLACKWELL
    elif D0 + D1 == 32 and kind == "half" and arch >= 120:
        BN = _FEW_12
    BM, BN = (min(block, max(next_power_of_2(N), 16)) for block in (BM, BN))
    constants = (*where, D0, D1, BM, BN, "ieee" if kind == "ieee" else "tf32")
    return Plan(_forward, constants, num_warps=warps, num_stages=stages), ceil_div(N, BM)


@lru_cache(maxsize=4096)
def _backward_plan(device, dtype, kind, arch, where: Geometry):
    D0, D1 = parts_of(where.head_dim)
    N = where.NH * where.NW
    precision = "ieee" if kind == "ieee" else "tf32"
    queries = max(next_power_of_2(N), 16)
    # Padding N to a power of two may cost a fifth. Beyond that, the two additional products of `_backward_blocks` cost
    # less.
    if kind == "half" and D0 + D1 <= 64 and N <= 256 and queries * 5 <= N * 6:
        BN, warps, stages = _row(_WHOLE, D0 + D1)[N > 64]
        if D1 and N > 64 and arch < 90:
            BN = _WHOLE_AMPERE
        constants = (*where, D0, D1, queries, min(BN, queries), precision)
        return Plan(_backward_whole, constants, num_warps=warps, num_stages=stages), 1
    BM, BN, warps, stages = _row(_BLOCKS[kind], D0 + D1)
    BM, BN = (min(block, queries) for block in (BM, BN))
    constants = (*where, D0, D1, BM, BN, precision)
    return Plan(_backward_blocks, constants, num_warps=warps, num_stages=stages), ceil_div(N, BM)


def _key(qkv, where: Geometry):
    return qkv.get_device(), qkv.dtype, kind_of(qkv.dtype), architecture(qkv), where


def launch(qkv, out, logsumexp, num_heads, patch_size, scale) -> Launch:
    """Prepare the attention of qkv (B, H, W, 3·inner), channels adjacent and no side 0, into contiguous `out` and
    `logsumexp`."""
    PH, PW = patch_size
    where = geometry(qkv, num_heads, PH, PW)
    key, sequences = _key(qkv, where), qkv.shape[0] * PH * PW
    tensors, scalars = (qkv, out, logsumexp), (scale,)
    if plan := short.plan(short.forward, *key):
        return Launch(plan, (sequences,), tensors, scalars)
    strands = sequences * num_heads
    plan, blocks = _plan(*key, strands * where.NH * where.NW >= _MANY)
    return Launch(plan, (strands, blocks), tensors, scalars)


@register(OP)
def forward(qkv, num_heads, patch_size, scale):
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    (B, H, W, channels), (PH, PW) = qkv.shape, patch_size
    out = qkv.new_empty((B, H, W, channels // 3))
    logsumexp = qkv.new_empty((B, PH * PW, num_heads, (H // PH) * (W // PW)), dtype=torch.float32)
    if out.numel():
        launch(qkv, out, logsumexp, num_heads, patch_size, scale).run()
    return out, logsumexp


@register(f"{OP}_backward")
def backward(grad_out, qkv, out, logsumexp, num_heads, patch_size, scale):
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    grad_out, out, logsumexp = dense(grad_out, out, logsumexp)
    grad_qkv = qkv.new_empty(qkv.shape)
    if grad_qkv.numel():
        PH, PW = patch_size
        key, sequences = _key(qkv, geometry(qkv, num_heads, PH, PW)), qkv.shape[0] * PH * PW
        tensors, scalars = (grad_out, qkv, out, logsumexp, grad_qkv), (scale,)
        if plan := short.plan(short.backward, *key):
            plan((sequences,), tensors, scalars)
        else:
            plan, blocks = _backward_plan(*key)
            plan((sequences * num_heads, blocks), tensors, scalars)
    return grad_qkv
