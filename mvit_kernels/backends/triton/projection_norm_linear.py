# SPDX-License-Identifier: Apache-2.0
"""``linear_residual`` and the ``layer_norm_linear`` behind it in one launch, for frozen networks on few rows.

Example:
    >>> launch(attended, *proj, x, *norm2, *fc1, middle, hidden, eps, "silu").run()
    >>> launch(hidden, *fc2, middle, *next_norm1, *next_qkv, x, qkv, eps).run()         # and the next layer's beginning

`mvit_kernels.backends.triton.layer_norm_mlp` has all hidden columns of its rows in one program: for one image 16, 4 and
1 programs of 64 rows in the three stages of MobileViT-S, on 132 multiprocessors, each with twelve to fifteen turns one
after another. Here programs share the columns. What precedes the LayerNorm concerns whole rows, so that each of them
computes the first product again: for 1024 rows of 144 and the MLP that is five times 21 million multiply-adds, about a
microsecond on an H200, where a launch of its own costs two and reads the rows back.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._launch import Launch, Plan, architecture, ceil_div, is_small, next_power_of_2

NAME = "projection_norm_linear"


@triton.jit(do_not_specialize=["M"])
def _projected(
    x,
    proj_weight,
    proj_bias,
    residual,
    norm_weight,
    norm_bias,
    weight,
    bias,
    middle,
    out,
    M,
    eps,
    INNER: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    BN: tl.constexpr,
    SILU: tl.constexpr,
    GAP: tl.constexpr,
):
    """middle = residual + x · proj_weightᵀ + proj_bias, out = act(LN(middle) · weightᵀ + bias): BM rows and BN columns
    a program, of which those of the first columns write `middle`, if it is wanted. GAP: as in `layer_norm_linear`.

    What does not depend on the first product is loaded before it: behind it, every chunk of `weight` would have to be
    waited for.
    """
    first_row = tl.program_id(0) * BM
    offset = first_row.to(tl.int64)
    rows, end = tl.arange(0, BM), M - first_row
    hs = tl.program_id(1) * BN + tl.arange(0, BN)
    weights, residuals = (), ()
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        weights = weights + (_rows.load(weight, columns, hs, K, N, 1, K, (c + 1) * KC > K, N % BN != 0),)
        added = _rows.load(residual + offset * K, rows, columns, end, K, K, 1, True, (c + 1) * KC > K)
        residuals = residuals + (added,)
    x += offset * INNER
    sums = _rows.row_product(x, proj_weight, rows, end, 0, INNER, K, 1, INNER, BM, BK, KC, NC, "tf32")
    chunks = ()
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        y = sums[c] + _rows.load_vector(proj_bias, columns, K, (c + 1) * KC > K)[None, :] + residuals[c].to(tl.float32)
        rounded = y.to(out.dtype.element_ty)
        if middle is not None:
            if tl.program_id(1) == 0:
                _rows.store(middle + offset * K, rounded, rows, columns, end, K, K, (c + 1) * KC > K)
        chunks = chunks + (rounded,)
    is_first = (tl.arange(0, KC) == 0)[None, :]
    first_element = tl.sum(tl.where(is_first, chunks[0].to(tl.float32), 0.0), axis=1)
    mu, sigma = _rows.statistics_of_chunks(first_element, chunks, eps, K, KC, NC)
    y = tl.zeros([BM, BN], tl.float32)
    for c in tl.static_range(NC):
        columns = c * KC + tl.arange(0, KC)
        operand = _rows.normalized(chunks[c], mu, sigma, norm_weight, norm_bias, columns, K, (c + 1) * KC > K)
        y = _rows.add_product(operand, weights[c], y, "tf32")
    if bias is not None:
        y += _rows.load_vector(bias, hs, N, N % BN != 0)[None, :]
    if SILU:
        y = y * _rows.sigmoid(y)
    _rows.store(out + offset * (N + GAP), y, rows, hs, end, N, N + GAP, N % BN != 0)


# All widths are cut by 64: with a k step of 32, rows of 240 spill 24 bytes on 9.0. One image's rows in the stages of S
# are 160, 96 and 32 programs. In the first, 16 rows a program would make 320, and two of these fit a multiprocessor.
_WIDEST, _WARPS = 64, 4
_ROWS, _MOST_OF_16 = (16, 32), 512


@lru_cache(maxsize=4096)
def _plan(device, dtypes, arch, BM, INNER, K, N, silu, gap):
    BK, KC, BN = (min(_WIDEST, max(next_power_of_2(width), 16)) for width in (INNER, K, N))
    constants = (INNER, K, N, BM, BK, KC, ceil_div(K, KC), BN, silu, gap)
    # Three take 100 KB of shared memory above 192 columns, and a block of 8.6, 8.9 and 12.0 has 99.
    stages = 2 if K > 192 and is_small(arch) else 3
    return Plan(_projected, constants, num_warps=_WARPS, num_stages=stages), BN


def launch(
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    middle: Tensor | None,
    out: Tensor,
    eps: float,
    activation: str = "",
) -> Launch:
    """Prepare ``middle = residual + x Wpᵀ + bp`` and ``out = act(LN(middle) Wᵀ + b)`` of contiguous tensors, in
    bfloat16 or float16. The rows of `out` may lie further apart than they are long.

    Args:
        x: (..., inner).
        proj_weight, proj_bias: (K, inner), (K,).
        residual: (..., K).
        norm_weight, norm_bias: (K,), of LayerNorm.
        weight, bias: (N, K), (N,); `bias` may be None.
        middle, out: (..., K) and (..., N), written. `middle` is not `residual`, which other programs read; None if
            nobody reads it.
        eps: LayerNorm's epsilon.
        activation: "silu" or "".
    """
    (K, inner), N = proj_weight.shape, weight.shape[0]
    rows = x.numel() // inner
    BM = _ROWS[rows > _MOST_OF_16]
    vectors = (proj_bias, norm_weight, norm_bias, bias, middle)
    dtypes = (x.dtype, *(None if vector is None else vector.dtype for vector in vectors))
    gap = out.stride(-2) - N if rows > 1 else 0
    device = x.get_device()
    plan, BN = _plan(device, dtypes, architecture(x), BM, inner, K, N, activation == "silu", gap)
    tensors = (x, proj_weight, proj_bias, residual, norm_weight, norm_bias, weight, bias, middle, out)
    return Launch(plan, (ceil_div(rows, BM), ceil_div(N, BN)), tensors, (rows, eps))
