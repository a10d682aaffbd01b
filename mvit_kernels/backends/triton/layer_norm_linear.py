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
from ._launch import Launch, architecture, ceil_div, chunked, dense, is_small, kind_of, next_power_of_2, register
from ._row_gradients import norm_backward
from ._tiles import FEW_ROWS, Tile, tailed
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
    KT: tl.constexpr,
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
        chunks = _rows.load_rows(x, rows, end, K, KC, NC, KT)
    if grad_out is not None:
        mu = tl.load(mean + offset + rows, mask=rows < end, other=0.0)
        sigma = tl.load(rstd + offset + rows, mask=rows < end, other=0.0)
    else:
        if RESIDENT:
            mu, sigma = _rows.statistics(x, chunks, rows, end, eps, K, KC, NC, KT)
        else:
            mu, sigma = _rows.statistics_of_long_rows(x, rows, end, eps, K, KC, BM)
        if tl.program_id(1) == 0:
            tl.store(mean + offset + rows, mu, mask=rows < end)
            tl.store(rstd + offset + rows, sigma, mask=rows < end)
    LAST: tl.constexpr = NC if KT > 0 else NC - 1
    if RESIDENT:
        operands = _rows.normalized_rows(chunks, mu, sigma, norm_weight, norm_bias, K, KC, NC, KT)
    for n in range(tl.program_id(1) * BN, N, tl.num_programs(1) * BN):
        columns = n + tl.arange(0, BN)
        y = tl.zeros([BM, BN], tl.float32)
        if RESIDENT:
            for c in tl.static_range(LAST + 1):
                ks = _rows.columns_of(c, KC, NC, KT)
                w = _rows.load(weight, ks, columns, K, N, 1, K, c == LAST and NC * KC + KT > K, N % BN != 0)
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
            y = _rows.silu_as(y, PRECISION)
        _rows.store(out + offset * (N + GAP), y, rows, columns, end, N, N + GAP, N % BN != 0)


# Columns are those of a turn. Up to _RESIDENT columns, rows of 16 bits stay on chip.
#
# On 9.0 (wgmma): the weights' copies are three stages deep, for with two a turn begins by waiting for what the turn
# before began last. 128 rows share a tile of weights; 128 registers a thread leave room for two programs an SM.
_TILES = {
    "wgmma 160": Tile(128, 64, 64, 8, 3, 128),  # up to 160 columns: 106 KB at 144
    "wgmma 160 tight": Tile(128, 64, 32, 8, 3, 128),  # where chunks of 64 spill 8 bytes, see `_plan`
    "wgmma 192": Tile(128, 32, 64, 8, 3, 128),  # 92 KB; with 64 columns 136, and one program
    "wgmma 192 tight": Tile(128, 32, 32, 8, 3, 128),  # where chunks of 64 spill 16 bytes; predicted 5 % slower
    "wgmma 256": Tile(64, 32, 64, 4, 3),  # 84 KB; 128 rows spill within 128 registers
    "wgmma few": Tile(64, 64, 64, 4, 3),  # up to FEW_ROWS rows of 192 columns; 104 KB at 192
    "half": Tile(64, 64, 64, 4, 2),
    "half 256": Tile(64, 64, 64, 4, 1),  # above 192 columns two stages take 104 KB, and 8.6, 8.9 and 12.0 have 99
    "tf32": Tile(64, 64, 32, 4, 2),
    "ieee": Tile(32, 32, 16, 4, 2),  # chunks of 32 spill 8 to 24 bytes
}
_RESIDENT = 256
_PROGRAMS = 264  # two for each SM of a large GPU: with fewer tiles of rows, programs share the columns


def tile_key(kind: str, arch: int, K: int, few: bool) -> str:
    """Which row of `_TILES` serves rows of K columns."""
    if kind != "half":
        return kind
    if arch != 90 or K > _RESIDENT:
        return "half 256" if is_small(arch) and K > 192 else "half"
    return "wgmma few" if few and K <= 192 else f"wgmma {next(most for most in (160, 192, 256) if K <= most)}"


@lru_cache(maxsize=4096)
def _plan(device, dtype, vectors, kind, arch, K, N, few, activation, backward, gap):
    key = tile_key(kind, arch, K, few)
    # 8 and 16 bytes of stack with Triton 3.8, and with 3.6.
    if key == "wgmma 160" and (dtype == torch.float16 or activation):
        key = "wgmma 160 tight"
    elif key == "wgmma 192" and dtype == torch.float16 and N < K:
        key = "wgmma 192 tight"
    tile, resident = _TILES[key], kind == "half" and K <= _RESIDENT
    BN = min(tile.columns, max(next_power_of_2(N), 16))
    if key.startswith("wgmma"):
        chunks = tailed(K, tile.chunk)
    else:
        chunks = (*chunked(K, tile.chunk if resident else min(tile.chunk, 32)), 0)
    precision = "ieee" if kind == "ieee" else "tf32"
    constants = (K, N, tile.rows, BN, *chunks, resident, activation == "silu", precision, gap)
    plan = tile.plan(_normed_product, constants)
    return plan, tile.rows, ceil_div(N, BN)


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
        rows <= FEW_ROWS,
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
