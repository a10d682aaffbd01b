# SPDX-License-Identifier: Apache-2.0
"""``layer_norm`` in Triton: rows as tuples of chunks, read once forward and once backward.

A program of backward takes one part of the rows, split by their number alone, and stores its sums of the parameters'
gradients. The kernel that adds up weight gradients adds these up too.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _rows
from ._launch import Launch, Plan, ceil_div, chunked, dense, register
from ._weight_gradients import add_columns

OP = "layer_norm"


@triton.jit(do_not_specialize=["M"])
def _forward(
    x,
    norm_weight,
    norm_bias,
    out,
    mean,
    rstd,
    M,
    eps,
    K: tl.constexpr,
    BM: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
):
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    x += offset * K
    chunks = _rows.load_rows(x, rows, end, K, KC, NC)
    mu, sigma = _rows.statistics(x, chunks, rows, end, eps, K, KC, NC)
    tl.store(mean + offset + rows, mu, mask=rows < end)
    tl.store(rstd + offset + rows, sigma, mask=rows < end)
    results = _rows.normalized_rows(chunks, mu, sigma, norm_weight, norm_bias, K, KC, NC)
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        _rows.store(out + offset * K, results[c], rows, columns, end, K, K, (c + 1) * KC > K)


@triton.jit(do_not_specialize=["M", "part_rows"])
def _backward(
    grad_out,
    x,
    mean,
    rstd,
    norm_weight,
    grad_x,
    weight_sums,
    bias_sums,
    M,
    part_rows,
    K: tl.constexpr,
    BM: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
):
    part = tl.program_id(0)
    first_row = part * part_rows
    end = tl.minimum(part_rows, M - first_row)
    offset = first_row.to(tl.int64)
    grad_out += offset * K
    x += offset * K
    grad_x += offset * K
    mean += offset
    rstd += offset
    weight_totals, bias_totals = (), ()
    for _ in tl.static_range(NC):
        weight_totals = weight_totals + (tl.zeros([KC], tl.float32),)
        bias_totals = bias_totals + (tl.zeros([KC], tl.float32),)
    rows = tl.arange(0, BM)
    for m in range(0, end, BM):
        left = end - m
        grads = _rows.load_rows(grad_out, rows, left, K, KC, NC)
        chunks = _rows.load_rows(x, rows, left, K, KC, NC)
        mu = tl.load(mean + rows, mask=rows < left, other=0.0)
        sigma = tl.load(rstd + rows, mask=rows < left, other=0.0)
        plain, projected = tl.zeros([BM, KC], tl.float32), tl.zeros([BM, KC], tl.float32)
        more_weight, more_bias = (), ()
        for c in tl.static_range(NC):
            columns = c * KC + tl.arange(0, KC)
            g = grads[c].to(tl.float32)
            xhat = (chunks[c].to(tl.float32) - mu[:, None]) * sigma[:, None]
            weight = _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)
            scaled = _rows.rounded_product(g, weight[None, :])
            plain += scaled
            projected += scaled * xhat
            more_weight = more_weight + (weight_totals[c] + tl.sum(_rows.rounded_product(g, xhat), axis=0),)
            more_bias = more_bias + (bias_totals[c] + tl.sum(g, axis=0),)
        weight_totals, bias_totals = more_weight, more_bias
        plain_mean, projected_mean = _rows.row_mean(plain, K), _rows.row_mean(projected, K)
        for c in tl.static_range(NC):
            columns = c * KC + tl.arange(0, KC)
            xhat = (chunks[c].to(tl.float32) - mu[:, None]) * sigma[:, None]
            weight = _rows.load_vector(norm_weight, columns, K, (c + 1) * KC > K)
            scaled = _rows.rounded_product(grads[c].to(tl.float32), weight[None, :])
            dx = (scaled - plain_mean[:, None] - xhat * projected_mean[:, None]) * sigma[:, None]
            _rows.store(grad_x, dx, rows, columns, left, K, K, (c + 1) * KC > K)
        grad_out += BM * K
        x += BM * K
        grad_x += BM * K
        mean += BM
        rstd += BM
    at = part.to(tl.int64) * K
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        tl.store(weight_sums + at + columns, weight_totals[c], mask=columns < K)
        tl.store(bias_sums + at + columns, bias_totals[c], mask=columns < K)


_TILE = (16, 64, 8)  # rows, widest chunk of columns, warps; 32 rows spill 8 to 72 bytes from 144 columns on
# Above 192 columns: 16 rows of 240 spill 8 bytes on 10.0, and 8 rows as many with Triton 3.8.
_TILE_240 = (4, 64, 4)
_PARTS = 264  # two for each SM of a large GPU; a constant, so that the same rows give the same bits everywhere


@lru_cache(maxsize=4096)
def _plan(kernel, device, dtype, norm_dtype, K):
    BM, widest, warps = _TILE_240 if K > 192 else _TILE
    return Plan(kernel, (K, BM, *chunked(K, widest)), num_warps=warps, num_stages=1), BM


def launch(x, norm_weight, norm_bias, out, mean, rstd, eps) -> Launch:
    """Prepare ``out = LN(x)`` with its `mean` and `rstd`, of contiguous tensors; `out` may be x itself."""
    plan, BM = _plan(_forward, x.get_device(), x.dtype, (norm_weight.dtype, norm_bias.dtype), x.shape[-1])
    rows = mean.numel()
    return Launch(plan, (ceil_div(rows, BM),), (x, norm_weight, norm_bias, out, mean, rstd), (rows, eps))


@register(OP)
def forward(x, norm_weight, norm_bias, eps):
    x, norm_weight, norm_bias = dense(x, norm_weight, norm_bias)
    out = torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    launch(x, norm_weight, norm_bias, out, mean, rstd, eps).run()
    return out, mean, rstd


@register(f"{OP}_backward")
def backward(grad_out, x, mean, rstd, norm_weight):
    grad_out, x, norm_weight = dense(grad_out, x, norm_weight)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(norm_weight), torch.empty_like(norm_weight)
    rows, K = mean.numel(), x.shape[-1]
    if not rows:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    plan, BM = _plan(_backward, x.get_device(), x.dtype, norm_weight.dtype, K)
    blocks = ceil_div(rows, BM)
    part_rows = ceil_div(blocks, min(_PARTS, blocks)) * BM
    parts = ceil_div(rows, part_rows)
    sums = torch.empty((2, ceil_div(parts * K, 4) * 4), dtype=torch.float32, device=x.device)
    plan((parts,), (grad_out, x, mean, rstd, norm_weight, grad_x, *sums.unbind()), (rows, part_rows))
    add_columns(sums, parts, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
