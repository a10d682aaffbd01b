# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_linear`` in Triton: rows are normalised in registers, where they are the operand of the product.

Backward recomputes the rows before the activation with the same kernel, then takes the gradients of a linear layer and
a LayerNorm (`_row_gradients`, `_weight_gradients`).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _rows
from ._launch import Launch, Plan, architecture, ceil_div, chunked, dense, is_small, kind_of, next_power_of_2, register
from ._row_gradients import norm_backward
from ._weight_gradients import Norm, Product, weight_gradients

OP = "layer_norm_linear"


@triton.jit(do_not_specialize=["M"])
def _normed_product(
    x,
    norm_weight,
    norm_bias,
    weight,
    bias,
    grad_out,
    out,
    mean,
    rstd,
    M,
    eps,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    RESIDENT: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    GAP: tl.constexpr,
):
    """out = act(LN(x) Wᵀ + b), mean and rstd; or, given grad_out with mean and rstd, the gradient before SiLU.

    GAP: elements between two rows of out, which are not its own.

    RESIDENT keeps the normalised rows in registers for all tiles of columns; otherwise they are read again for each,
    chunk by chunk. The programs of the grid's second axis share the columns.
    """
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    x += offset * K
    if RESIDENT:
        chunks = _rows.load_rows(x, rows, end, K, KC, NC)
    if grad_out is not None:
        mu = tl.load(mean + offset + rows, mask=rows < end, other=0.0)
        sigma = tl.load(rstd + offset + rows, mask=rows < end, other=0.0)
    else:
        if RESIDENT:
            mu, sigma = _rows.statistics(x, chunks, rows, end, eps, K, KC, NC)
        else:
            mu, sigma = _rows.statistics_of_long_rows(x, rows, end, eps, K, KC, BM)
        if tl.program_id(1) == 0:
            tl.store(mean + offset + rows, mu, mask=rows < end)
            tl.store(rstd + offset + rows, sigma, mask=rows < end)
    if RESIDENT:
        operands = _rows.normalized_rows(chunks, mu, sigma, norm_weight, norm_bias, K, KC, NC)
    for n in range(tl.program_id(1) * BN, N, tl.num_programs(1) * BN):
        columns = n + tl.arange(0, BN)
        y = tl.zeros([BM, BN], tl.float32)
        if RESIDENT:
            for c in tl.static_range(NC):
                ks = c * KC + tl.arange(0, KC)
                w = _rows.load(weight, ks, columns, K, N, 1, K, (c + 1) * KC > K, N % BN != 0)
                y = _rows.add_product(operands[c], w, y, PRECISION)
        else:
            for k in range(0, K, KC):
                ks = k + tl.arange(0, KC)
                chunk = _rows.load(x, rows, ks, end, K, K, 1, True, K % KC != 0)
                operand = _rows.normalized(chunk, mu, sigma, norm_weight, norm_bias, ks, K, K % KC != 0)
                w = _rows.load(weight, ks, columns, K, N, 1, K, K % KC != 0, N % BN != 0)
                y = _rows.add_product(operand, w, y, PRECISION)
        if bias is not None:
            y += _rows.load_vector(bias, columns, N, N % BN != 0)[None, :]
        if grad_out is not None:
            grad = _rows.load(grad_out + offset * N, rows, columns, end, N, N, 1, True, N % BN != 0)
            y = _rows.silu_backward(grad.to(tl.float32), y)
        elif SILU:
            y = y * _rows.sigmoid(y)
        _rows.store(out + offset * (N + GAP), y, rows, columns, end, N, N + GAP, N % BN != 0)


# By kind: rows, columns, widest chunk of k, warps, stages; RESIDENT up to this width.
_TILES = {
    "half": (64, 64, 64, 4, 2, 256),
    "tf32": (64, 64, 32, 4, 2, 0),
    "ieee": (32, 32, 16, 4, 2, 0),  # chunks of 32 spill 8 to 24 bytes
}
_PROGRAMS = 264  # two for each SM of a large GPU: with fewer tiles of rows, programs share the columns


@lru_cache(maxsize=4096)
def _plan(device, dtype, vectors, kind, arch, K, N, activation, backward, gap):
    BM, BN, widest, warps, stages, resident = _TILES[kind]
    BN = min(BN, max(next_power_of_2(N), 16))
    KC, NC = chunked(K, widest if K <= resident else min(widest, 32))
    if K > 192 and kind == "half" and is_small(arch):
        stages = 1  # two take 104 KB of shared memory, and a block of 8.6, 8.9 and 12.0 has 99
    constants = (K, N, BM, BN, KC, NC, K <= resident, activation == "silu", "ieee" if kind == "ieee" else "tf32", gap)
    return Plan(_normed_product, constants, num_warps=warps, num_stages=stages), BM, ceil_div(N, BN)


def launch(
    x, norm_weight, norm_bias, weight, bias, out, mean, rstd, eps, activation: str = "", grad_out=None
) -> Launch:
    """Prepare ``out = act(LN(x) Wᵀ + b)`` with its `mean` and `rstd` of contiguous tensors; or, given `grad_out` and
    these two, the gradient before the activation. The rows of `out` may lie further apart than they are long."""
    (N, K), rows = weight.shape, mean.numel()
    plan, BM, tiles = _plan(
        x.get_device(),
        x.dtype,
        (norm_weight.dtype, norm_bias.dtype, None if bias is None else bias.dtype),
        kind_of(x.dtype),
        architecture(x),
        K,
        N,
        activation,
        grad_out is not None,
        out.stride(-2) - N if rows > 1 else 0,
    )
    blocks = ceil_div(rows, BM)
    shares = min(tiles, max(_PROGRAMS // max(blocks, 1), 1))
    tensors = (x, norm_weight, norm_bias, weight, bias, grad_out, out, mean, rstd)
    return Launch(plan, (blocks, shares), tensors, (rows, eps))


@register(OP)
def forward(x, norm_weight, norm_bias, weight, bias, eps, activation):
    x, norm_weight, norm_bias, weight, bias = dense(x, norm_weight, norm_bias, weight, bias)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    launch(x, norm_weight, norm_bias, weight, bias, out, mean, rstd, eps, activation).run()
    return out, mean, rstd


@register(f"{OP}_backward")
def backward(grad_out, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation):
    grad, x, norm_weight, norm_bias, weight, bias = dense(grad_out, x, norm_weight, norm_bias, weight, bias)
    if activation:
        before = torch.empty_like(grad)
        launch(x, norm_weight, norm_bias, weight, bias, before, mean, rstd, 0.0, activation, grad).run()
        grad = before
    grad_x = torch.empty_like(x)
    norm_backward(grad, weight, x, mean, rstd, norm_weight, None, grad_x)
    product = Product(grad, x, weight, Norm(mean, rstd, norm_weight, norm_bias))
    (grads,) = weight_gradients(mean.numel(), product)
    return grad_x, *grads.of_norm, *grads.of_linear
