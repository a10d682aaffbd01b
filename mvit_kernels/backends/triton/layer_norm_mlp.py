# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_mlp`` in Triton: a fused forward kernel, with hidden activations a chunk at a time and never in memory.

Backward writes them and their gradients once: with both weight-gradient products in one program, accumulators of
2 · chunk · d spill kilobytes with every tile from d = 144 on. The rest is a linear layer behind a LayerNorm and one
without (`_row_gradients`, `_weight_gradients`).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _rows
from ._dropout import NOTHING, Dropped, element_factor, row_factor
from ._launch import Launch, Plan, architecture, ceil_div, chunked, dense, is_small, kind_of, next_power_of_2, register
from ._row_gradients import norm_backward
from ._tiles import FEW_ROWS, Tile, tailed
from ._weight_gradients import Norm, Product, weight_gradients

OP = "layer_norm_mlp"


@triton.jit(do_not_specialize=["M", "threshold", "path_threshold"])
def _mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    seed,
    out,
    mean,
    rstd,
    M,
    eps,
    threshold,
    scale,
    path_threshold,
    path_scale,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    KT: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    PATH: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """out = x + fc2(silu(fc1(LN(x)))): fc1's accumulator, after SiLU, is fc2's operand. Live dropout is applied to
    fc2's rows."""
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    x += offset * K
    chunks = _rows.load_rows(x, rows, end, K, KC, NC, KT)
    mu, sigma = _rows.statistics(x, chunks, rows, end, eps, K, KC, NC, KT)
    tl.store(mean + offset + rows, mu, mask=rows < end)
    tl.store(rstd + offset + rows, sigma, mask=rows < end)
    operands = _rows.normalized_rows(chunks, mu, sigma, norm_weight, norm_bias, K, KC, NC, KT)
    CHECK_H: tl.constexpr = HIDDEN % BH != 0
    LAST: tl.constexpr = NC if KT > 0 else NC - 1
    RAGGED: tl.constexpr = NC * KC + KT > K
    accumulators = _rows.zero_rows(BM, KC, NC, KT)
    for h in range(0, HIDDEN, BH):
        hs = h + tl.arange(0, BH)
        hidden = tl.zeros([BM, BH], tl.float32)
        for c in tl.static_range(LAST + 1):
            ks = _rows.columns_of(c, KC, NC, KT)
            w = _rows.load(fc1_weight, ks, hs, K, HIDDEN, 1, K, RAGGED and c == LAST, CHECK_H)
            hidden = _rows.add_product(operands[c], w, hidden, PRECISION)
        hidden += _rows.load_vector(fc1_bias, hs, HIDDEN, CHECK_H)[None, :]
        active = _rows.silu_as(hidden, PRECISION).to(x.dtype.element_ty)
        updated = ()
        for c in tl.static_range(LAST + 1):
            ks = _rows.columns_of(c, KC, NC, KT)
            w = _rows.load(fc2_weight, hs, ks, HIDDEN, K, 1, HIDDEN, CHECK_H, RAGGED and c == LAST)
            updated = updated + (_rows.add_product(active, w, accumulators[c], PRECISION),)
        accumulators = updated
    if PATH:
        kept = row_factor(seed, first_row, path_threshold, path_scale, BRANCH, H, W, PH, PW, BM)
    for c in tl.static_range(LAST + 1):
        columns = _rows.columns_of(c, KC, NC, KT)
        y = accumulators[c] + _rows.load_vector(fc2_bias, columns, K, RAGGED and c == LAST)[None, :]
        if DROP:
            y *= element_factor(seed, first_row, c * KC, threshold, scale, BRANCH, BM, KC if c < NC else KT)
        if PATH:
            y *= kept[:, None]
        y += _rows.load(x, rows, columns, end, K, K, 1, True, RAGGED and c == LAST).to(tl.float32)
        _rows.store(out + offset * K, y, rows, columns, end, K, K, RAGGED and c == LAST)


@triton.jit(do_not_specialize=["M"])
def _hidden(
    grad_out,
    x,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    hidden,
    grad_hidden,
    M,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    KC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden = silu(t) and grad_hidden, the gradient of t = fc1(LN(x)), tile by tile."""
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    x += offset * K
    grad_out += offset * K
    mu = tl.load(mean + offset + rows, mask=rows < end, other=0.0)
    sigma = tl.load(rstd + offset + rows, mask=rows < end, other=0.0)
    hs = tl.program_id(1) * BH + tl.arange(0, BH)
    CHECK_K: tl.constexpr = K % KC != 0
    CHECK_H: tl.constexpr = HIDDEN % BH != 0
    t = tl.zeros([BM, BH], tl.float32)
    grad = tl.zeros([BM, BH], tl.float32)
    for k in range(0, K, KC):
        ks = k + tl.arange(0, KC)
        chunk = _rows.load(x, rows, ks, end, K, K, 1, True, CHECK_K)
        operand = _rows.normalized(chunk, mu, sigma, norm_weight, norm_bias, ks, K, CHECK_K)
        w1 = _rows.load(fc1_weight, ks, hs, K, HIDDEN, 1, K, CHECK_K, CHECK_H)
        t = _rows.add_product(operand, w1, t, PRECISION)
        g = _rows.load(grad_out, rows, ks, end, K, K, 1, True, CHECK_K)
        w2 = _rows.load(fc2_weight, ks, hs, K, HIDDEN, HIDDEN, 1, CHECK_K, CHECK_H)
        grad = _rows.add_product(g, w2, grad, PRECISION)
    t += _rows.load_vector(fc1_bias, hs, HIDDEN, CHECK_H)[None, :]
    _rows.store(hidden + offset * HIDDEN, t * _rows.sigmoid(t), rows, hs, end, HIDDEN, HIDDEN, CHECK_H)
    _rows.store(grad_hidden + offset * HIDDEN, _rows.silu_backward(grad, t), rows, hs, end, HIDDEN, HIDDEN, CHECK_H)


# Columns are hidden ones, a turn's.
#
# On 9.0 (wgmma) four warps have whole rows: with eight for 64 rows a product is 16 or 8 columns wide, and what it
# costs to begin one counts. Three stages: with two, a turn begins by waiting for what the turn before began last.
_TILES = {
    "wgmma 160": Tile(64, 32, 64, 4, 3, 168),  # up to 160 columns: 72 KB at 144, three programs an SM
    "wgmma 192": Tile(64, 32, 64, 4, 3),  # 96 KB, two
    "wgmma 256": Tile(128, 32, 64, 8, 3),  # 160 KB: one, of 128 rows; two of 64 would have room for two stages
    "wgmma few": Tile(64, 32, 64, 4, 3),  # up to FEW_ROWS rows
    "half": Tile(64, 32, 64, 8, 2),
    "half 256": Tile(32, 32, 64, 8, 2),  # above 192 columns, 64 rows spill 112 bytes
    "tf32": Tile(32, 16, 64, 8, 2),
    "ieee": Tile(16, 16, 32, 8, 1),  # a chunk is also one of the partial sums of fc1, which must be short
    "wide": Tile(16, 16, 64, 8, 1),  # above 256 columns
}
# By kind: rows, hidden columns, k step, warps, stages.
_HIDDEN_TILES = {
    "half": (64, 64, 16, 4, 2),
    "tf32": (64, 32, 16, 4, 2),
    "ieee": (32, 16, 16, 4, 1),  # 32 columns spill 16 bytes
}


def tile_key(kind: str, arch: int, K: int, few: bool) -> str:
    """Which row of `_TILES` serves rows of K columns."""
    if K > 256:
        return "wide"
    if kind != "half":
        return kind
    if arch != 90:
        return "half 256" if is_small(arch) and K > 192 else "half"
    return "wgmma few" if few else f"wgmma {next(most for most in (160, 192, 256) if K <= most)}"


@lru_cache(maxsize=4096)
def _plan(device, dtype, norm_dtype, kind, arch, K, HIDDEN, few, drop):
    key = tile_key(kind, arch, K, few)
    tile = _TILES[key]
    chunks = tailed(K, tile.chunk) if key.startswith("wgmma") else (*chunked(K, tile.chunk), 0)
    constants = (K, HIDDEN, tile.rows, tile.columns, *chunks, "ieee" if kind == "ieee" else "tf32", *drop)
    plan = tile.plan(_mlp, constants)
    return plan, tile.rows


@lru_cache(maxsize=4096)
def _hidden_plan(device, dtype, norm_dtype, kind, arch, K, HIDDEN):
    BM, BH, KC, warps, stages = _HIDDEN_TILES[kind]
    BH = min(BH, max(next_power_of_2(HIDDEN), 16))
    plan = Plan(
        _hidden, (K, HIDDEN, BM, BH, KC, "ieee" if kind == "ieee" else "tf32"), num_warps=warps, num_stages=stages
    )
    return plan, BM, ceil_div(HIDDEN, BH)


def _key(x, norm_weight, norm_bias, fc1_weight):
    norm = norm_weight.dtype, norm_bias.dtype
    return x.get_device(), x.dtype, norm, kind_of(x.dtype), architecture(x), *reversed(fc1_weight.shape)


def launch(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, mean, rstd, eps, drop: Dropped = NOTHING
) -> Launch:
    """Prepare ``out = x + fc2(silu(fc1(LN(x))))`` with its `mean` and `rstd`, of contiguous tensors."""
    rows = mean.numel()
    plan, BM = _plan(*_key(x, norm_weight, norm_bias, fc1_weight), rows <= FEW_ROWS, drop.constants)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, drop.seed, out, mean, rstd)
    return Launch(plan, (ceil_div(rows, BM),), tensors, (rows, eps, *drop.scalars))


@register(OP)
def forward(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, drop: Dropped = NOTHING):
    inputs = dense(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    x = inputs[0]
    out = torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    launch(*inputs, out, mean, rstd, eps, drop).run()
    return out, mean, rstd


def hidden_gradient(grad, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight):
    """silu(fc1(LN(x))) and the gradient before SiLU, both (rows, hidden), from contiguous tensors.

    `grad` is the gradient of fc2's output; the other arguments are those of ``layer_norm_mlp_backward``.
    """
    rows = mean.numel()
    hidden = x.new_empty((rows, fc1_weight.shape[0]))
    grad_hidden = torch.empty_like(hidden)
    if rows:
        plan, BM, tiles = _hidden_plan(*_key(x, norm_weight, norm_bias, fc1_weight))
        inputs = (grad, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
        plan((ceil_div(rows, BM), tiles), (*inputs, hidden, grad_hidden), (rows,))
    return hidden, grad_hidden


@register(f"{OP}_backward")
def backward(grad_out, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight):
    grad_out, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight = dense(
        grad_out, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight
    )
    mlp = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    hidden, grad_hidden = hidden_gradient(grad_out, x, mean, rstd, *mlp)
    grad_x = torch.empty_like(x)
    norm_backward(grad_hidden, fc1_weight, x, mean, rstd, norm_weight, grad_out, grad_x)
    norm = Norm(mean, rstd, norm_weight, norm_bias)
    fc1 = Product(grad_hidden, x, fc1_weight, norm)
    fc2 = Product(grad_out, hidden, fc2_weight)
    grads1, grads2 = weight_gradients(mean.numel(), fc1, fc2)
    return grad_x, *grads1.of_norm, *grads1.of_linear, *grads2.of_linear
