# SPDX-License-Identifier: Apache-2.0
"""What the kernels of ``batch_norm_activation`` share: sums over parts of a channels-last map, and tiles of results.

A map is N rows of C channels, one a pixel. A tile is BM rows of BC channels; a part is every `parts`-th tile of rows.
C is a number of units whose size is known to the compiler, so that one kernel serves all widths with loads of 16 bytes.
"""

import triton
import triton.language as tl

from . import _rows


@triton.jit
def vector(base, columns, C):
    return tl.load(base + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def moments(x, part, parts, N, columns, C, BM: tl.constexpr, BC: tl.constexpr):
    """Of a part's values, for each channel: the first one, the mean of the differences from it, and the sum of squared
    differences from the mean.

    Welford's recurrence, of which each of the BM rows of a tile has its own: E[x²] − E[x]² cancels where |mean| ≫ σ,
    and so would the recurrence's own mean if it were not one of differences. Equal values are their mean exactly, and
    nothing overflows but squares."""
    rows = tl.arange(0, BM)
    here = (columns < C)[None, :]
    x += (part * BM).to(tl.int64) * C
    step = (parts * BM).to(tl.int64) * C
    centre = vector(x, columns, C)
    mean, squares = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    seen = tl.zeros([1, 1], tl.float32)
    for first in range(part * BM, N, parts * BM):
        inside = (rows < N - first)[:, None] & here
        value = tl.load(x + rows[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        difference = value - centre[None, :]
        seen += 1.0
        change = tl.where(inside, difference - mean, 0.0)
        mean += change * tl.div_rn(1.0, seen)
        squares += change * (difference - mean)
        x += step
    counts = (tl.maximum(N - part * BM - rows, 0) + parts * BM - 1) // (parts * BM)
    counts = counts.to(tl.float32)
    middle = tl.sum(mean * tl.div_rn(counts, tl.sum(counts, axis=0))[:, None], axis=0)
    # A row of the tile that lay outside has no mean; its square might be infinite, and 0 times that is not 0.
    between = tl.where(counts[:, None] > 0, mean - middle[None, :], 0.0)
    return centre, middle, tl.sum(squares + between * between * counts[:, None], axis=0)


@triton.jit
def store_statistics(centre, shift, squares, mean, rstd, variance, channels, N, C, eps):
    """Mean, 1/σ and unbiased variance, from the mean as centre + shift and the sum of squared differences from it."""
    inside, count = channels < C, N.to(tl.float32)
    middle, sigma = centre + shift, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))
    tl.store(mean + channels, middle, mask=inside)
    tl.store(rstd + channels, sigma, mask=inside)
    tl.store(variance + channels, tl.div_rn(squares, count - 1.0), mask=inside)
    return middle, sigma


@triton.jit
def write_tile(x, out, middle, slope, bias, columns, left, C, BM: tl.constexpr, SILU: tl.constexpr):
    """The result for the first BM rows at x, of which `left` are there."""
    at = tl.arange(0, BM)[:, None] * C + columns[None, :]
    inside = (tl.arange(0, BM) < left)[:, None] & (columns < C)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = (value - middle[None, :]) * slope[None, :] + bias[None, :]
    if SILU:
        y *= _rows.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_gradient(grad_out, x, middle, sigma, scale, bias, columns, left, C, BM: tl.constexpr, SILU: tl.constexpr):
    """The gradient before SiLU and the normalised value of the first BM rows at x; both are 0 where no row is.

    The gradient is a rounded product: both passes then have the same one, and the sums of the first cancel in the
    second (`_rows.rounded_product`)."""
    at = tl.arange(0, BM)[:, None] * C + columns[None, :]
    inside = (tl.arange(0, BM) < left)[:, None] & (columns < C)[None, :]
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    normalised = tl.where(inside, (value - middle[None, :]) * sigma[None, :], 0.0)
    if SILU:
        y = normalised * scale[None, :] + bias[None, :]
        s = _rows.sigmoid(y)
        grad = _rows.rounded_product(grad, s * (1.0 + y * (1.0 - s)))
    return grad, normalised


@triton.jit
def gradient_sums(
    grad_out,
    x,
    middle,
    sigma,
    scale,
    bias,
    part,
    parts,
    N,
    columns,
    C,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
):
    """A part's sums of the gradient and of its product with the normalised value."""
    begin, step = (part * BM).to(tl.int64) * C, (parts * BM).to(tl.int64) * C
    grad_out += begin
    x += begin
    plain, projected = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for first in range(part * BM, N, parts * BM):
        grad, normalised = tile_gradient(grad_out, x, middle, sigma, scale, bias, columns, N - first, C, BM, SILU)
        plain += grad
        projected += grad * normalised
        grad_out += step
        x += step
    return tl.sum(plain, axis=0), tl.sum(projected, axis=0)


@triton.jit
def store_gradients(plain, projected, grad_weight, grad_bias, channels, C):
    tl.store(grad_weight + channels, projected.to(grad_weight.dtype.element_ty), mask=channels < C)
    tl.store(grad_bias + channels, plain.to(grad_bias.dtype.element_ty), mask=channels < C)


@triton.jit
def write_gradient(
    grad_out,
    x,
    grad_x,
    middle,
    sigma,
    scale,
    bias,
    plain_mean,
    projected_mean,
    columns,
    left,
    C,
    BM: tl.constexpr,
    SILU: tl.constexpr,
):
    """x's gradient for the first BM rows at x."""
    grad, normalised = tile_gradient(grad_out, x, middle, sigma, scale, bias, columns, left, C, BM, SILU)
    result = (grad - plain_mean[None, :] - normalised * projected_mean[None, :]) * (scale * sigma)[None, :]
    at = tl.arange(0, BM)[:, None] * C + columns[None, :]
    inside = (tl.arange(0, BM) < left)[:, None] & (columns < C)[None, :]
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def tile_of_program(blocks, BM: tl.constexpr, BC: tl.constexpr):
    """The first row and the columns of a program that writes one tile; the last rows come first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program // blocks * BM, program % blocks * BC + tl.arange(0, BC)
