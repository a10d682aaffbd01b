# SPDX-License-Identifier: Apache-2.0
"""What the row-wise kernels share: tiles of rows, LayerNorm's statistics, and a product over whole rows.

A row is held as a tuple of NC chunks of KC columns, and one of KT more unless KT is 0. Tiles must be powers of two
wide, and widths such as 144 = 128 + 16 are not: padded to 256, half of the work and of the registers would be wasted
(LayerNorm + linear: 215 registers a thread instead of 128; the whole MLP spills). Tuples can also be carried through a
loop, so accumulators have the same form. Only the last chunk can be wider than what is left of a row.

Why few and wide chunks, and not 9 · 16: with wgmma a product of one chunk is waited for before the next one begins, and
a warp's load of 16 columns is of 16 lines of the cache, one of 64 columns of 4.

Offsets inside a tile are 32 bits wide, and that of its first element is a 64-bit scalar: 64-bit tile offsets cost 10 to
22 instructions, 64-bit scalars none.
"""

import triton
import triton.language as tl


@triton.jit
def load(
    base,
    i,
    j,
    end_i,
    end_j,
    STRIDE_I: tl.constexpr,
    STRIDE_J: tl.constexpr,
    CHECK_I: tl.constexpr,
    CHECK_J: tl.constexpr,
):
    """The tile of elements (i, j); 0 outside those bounds that are checked."""
    pointers = base + i[:, None] * STRIDE_I + j[None, :] * STRIDE_J
    if CHECK_I and CHECK_J:
        return tl.load(pointers, mask=(i < end_i)[:, None] & (j < end_j)[None, :], other=0.0)
    elif CHECK_I:
        return tl.load(pointers, mask=(i < end_i)[:, None], other=0.0)
    elif CHECK_J:
        return tl.load(pointers, mask=(j < end_j)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store(base, tile, i, j, end_i, end_j, STRIDE_I: tl.constexpr, CHECK_J: tl.constexpr):
    """Store the tile, rounded to the element type of `base`, at the elements (i, j) within bounds; j is contiguous."""
    mask = (i < end_i)[:, None]
    if CHECK_J:
        mask = mask & (j < end_j)[None, :]
    tl.store(base + i[:, None] * STRIDE_I + j[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(base, i, end, CHECK: tl.constexpr):
    """A vector of parameters in float32; 0 outside."""
    if CHECK:
        return tl.load(base + i, mask=i < end, other=0.0).to(tl.float32)
    else:
        return tl.load(base + i).to(tl.float32)


@triton.jit
def columns_of(c: tl.constexpr, KC: tl.constexpr, NC: tl.constexpr, KT: tl.constexpr):
    """The columns of chunk c."""
    if c < NC:
        return c * KC + tl.arange(0, KC)
    else:
        return NC * KC + tl.arange(0, KT)


@triton.jit
def load_rows(base, rows, end, K: tl.constexpr, KC: tl.constexpr, NC: tl.constexpr, KT: tl.constexpr = 0):
    """Rows of K contiguous elements as a tuple of chunks."""
    chunks = ()
    for c in tl.static_range(NC):
        chunks = chunks + (load(base, rows, columns_of(c, KC, NC, KT), end, K, K, 1, True, (c + 1) * KC > K),)
    if KT > 0:
        chunks = chunks + (load(base, rows, columns_of(NC, KC, NC, KT), end, K, K, 1, True, NC * KC + KT > K),)
    return chunks


@triton.jit
def centred(x, middle, columns, K: tl.constexpr, CHECK: tl.constexpr):
    """x − middle in float32; 0 in padded columns, which would otherwise count as −middle each."""
    difference = x.to(tl.float32) - middle[:, None]
    if CHECK:
        difference = tl.where((columns < K)[None, :], difference, 0.0)
    return difference


@triton.jit
def mean_and_rstd(first, shift, squares, mean, eps, K: tl.constexpr):
    """`mean`, which is first + shift rounded, and 1/sqrt(variance + eps), with that rounding error taken out; `squares`
    are summed up."""
    error = shift - (mean - first)
    variance = squares * (1.0 / K) - error * error
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def statistics(base, chunks, rows, end, eps, K: tl.constexpr, KC: tl.constexpr, NC: tl.constexpr, KT: tl.constexpr = 0):
    """`statistics_of_chunks` of rows that lie at `base`."""
    first = tl.load(base + rows * K, mask=rows < end, other=0.0).to(tl.float32)
    return statistics_of_chunks(first, chunks, eps, K, KC, NC, KT)


@triton.jit
def statistics_of_chunks(first, chunks, eps, K: tl.constexpr, KC: tl.constexpr, NC: tl.constexpr, KT: tl.constexpr = 0):
    """Mean and 1/sqrt(variance + eps) of each row, in two passes over registers: E[x²] − E[x]² cancels where
    |mean| ≫ σ. The mean is taken of differences from the row's first element, so that the mean of equal values is that
    value exactly (the sum of 144 times 7.1, over 144, is not 7.1, and 1/σ makes 316 times as much of the difference).
    Chunks are added up before columns are, for a shorter sum."""
    total = centred(chunks[0], first, columns_of(0, KC, NC, KT), K, KC > K)
    for c in tl.static_range(1, NC):
        total += centred(chunks[c], first, columns_of(c, KC, NC, KT), K, (c + 1) * KC > K)
    total = tl.sum(total, axis=1)
    if KT > 0:
        total += tl.sum(centred(chunks[NC], first, columns_of(NC, KC, NC, KT), K, NC * KC + KT > K), axis=1)
    shift = total * (1.0 / K)
    mean = first + shift
    difference = centred(chunks[0], mean, columns_of(0, KC, NC, KT), K, KC > K)
    squares = difference * difference
    for c in tl.static_range(1, NC):
        difference = centred(chunks[c], mean, columns_of(c, KC, NC, KT), K, (c + 1) * KC > K)
        squares += difference * difference
    squares = tl.sum(squares, axis=1)
    if KT > 0:
        difference = centred(chunks[NC], mean, columns_of(NC, KC, NC, KT), K, NC * KC + KT > K)
        squares += tl.sum(difference * difference, axis=1)
    return mean_and_rstd(first, shift, squares, mean, eps, K)


@triton.jit
def statistics_of_long_rows(base, rows, end, eps, K: tl.constexpr, KC: tl.constexpr, BM: tl.constexpr):
    """`statistics` of rows that are read chunk by chunk, twice; the second time from the cache."""
    first = tl.load(base + rows * K, mask=rows < end, other=0.0).to(tl.float32)
    total = tl.zeros([BM, KC], tl.float32)
    for k in range(0, K, KC):
        columns = k + tl.arange(0, KC)
        x = load(base, rows, columns, end, K, K, 1, True, K % KC != 0)
        total += centred(x, first, columns, K, K % KC != 0)
    shift = tl.sum(total, axis=1) * (1.0 / K)
    mean = first + shift
    squares = tl.zeros([BM, KC], tl.float32)
    for k in range(0, K, KC):
        columns = k + tl.arange(0, KC)
        x = load(base, rows, columns, end, K, K, 1, True, K % KC != 0)
        difference = centred(x, mean, columns, K, K % KC != 0)
        squares += difference * difference
    return mean_and_rstd(first, shift, tl.sum(squares, axis=1), mean, eps, K)


@triton.jit
def normalized(x, mean, rstd, norm_weight, norm_bias, columns, K: tl.constexpr, CHECK: tl.constexpr):
    """LayerNorm of a chunk in its dtype, as the operand of a product. Padded columns become 0, since weight and bias
    are 0 there."""
    weight = load_vector(norm_weight, columns, K, CHECK)
    bias = load_vector(norm_bias, columns, K, CHECK)
    return ((x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]).to(x.dtype)


@triton.jit
def normalized_rows(
    chunks,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    K: tl.constexpr,
    KC: tl.constexpr,
    NC: tl.constexpr,
    KT: tl.constexpr = 0,
):
    """`normalized` for every chunk."""
    results = ()
    for c in tl.static_range(NC):
        columns = columns_of(c, KC, NC, KT)
        results = results + (normalized(chunks[c], mean, rstd, norm_weight, norm_bias, columns, K, (c + 1) * KC > K),)
    if KT > 0:
        columns = columns_of(NC, KC, NC, KT)
        last = normalized(chunks[NC], mean, rstd, norm_weight, norm_bias, columns, K, NC * KC + KT > K)
        results = results + (last,)
    return results


@triton.jit
def rounded_product(a, b):
    """a · b, always rounded. Where a plain product has its mean subtracted later, the compiler contracts it to
    fma(a, b, −mean), with the unrounded product: then the gradient of x in rows of one column, which is 0, came out as
    the rounding error of a · b over σ, 1e-5. Where lanes that hold one product each add them up, lane i gets fma(a, b,
    product of j) and lane j fma(a, b, product of i), which differ in rounding, and both store their sum to one place:
    which of them counts is the hardware's choice. An fma with 0 is the rounded product by definition, and is not
    contracted further."""
    return tl.fma(a, b, 0.0)


@triton.jit
def addends(a, b, ROUNDED: tl.constexpr):
    """a · b in float32, which lanes add up next: ROUNDED where a lane may hold one product of a sum. Tensor cores leave
    it several, and products of 16-bit numbers are exact."""
    if ROUNDED:
        product = rounded_product(a, b)
    else:
        product = a.to(tl.float32) * b.to(tl.float32)
    return product


@triton.jit
def row_mean(rows, K: tl.constexpr):
    """The mean of K columns, correctly rounded. A product with 1/K is not: x's gradient from Σ LN(x) would not be 0.
    The mean of ones is off at 74 of the widths up to 512 (61 · (1/61) < 1), that of other values at nearly every width
    that is not a power of two."""
    total = tl.sum(rows, axis=1)
    mean = total * (1.0 / K)
    return tl.fma(tl.fma(-mean, K, total), 1.0 / K, mean)


@triton.jit
def add_product(a, b, sums, PRECISION: tl.constexpr):
    """sums + a · b. In float32 the product is summed by itself and then added: for K terms in steps of 16, no chain is
    longer than 16 + K/16. A single chain, as from accumulating in tl.dot, has three times the error at K = 576: it
    grows with K, not with K^(3/4). The addition is an fma because Triton would fold a plain one into that chain. Tensor
    cores accumulate in steps of their own, and the rounding of their operands is far larger."""
    if PRECISION == "ieee":
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, sums)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def zero_rows(BM: tl.constexpr, KC: tl.constexpr, NC: tl.constexpr, KT: tl.constexpr = 0):
    """Accumulators for a tile of rows."""
    chunks = ()
    for _ in tl.static_range(NC):
        chunks = chunks + (tl.zeros([BM, KC], tl.float32),)
    if KT > 0:
        chunks = chunks + (tl.zeros([BM, KT], tl.float32),)
    return chunks


@triton.jit
def row_product(
    x,
    weight,
    rows,
    end,
    first,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    NB: tl.constexpr,
    NC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x · weight for the NC · NB output columns from `first` on, as a tuple: x is read once for all of them.

    x has rows of K elements. weight(k, n) is at ``k · STRIDE_K + n · STRIDE_N``, so that a matrix can be used as it is
    or transposed.
    """
    accumulators = zero_rows(BM, NB, NC)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        tile = load(x, rows, ks, end, K, K, 1, True, K % BK != 0)
        updated = ()
        for c in tl.static_range(NC):
            columns = first + c * NB + tl.arange(0, NB)
            w = load(weight, ks, columns, K, N, STRIDE_K, STRIDE_N, K % BK != 0, N % (NC * NB) != 0)
            updated = updated + (add_product(tile, w, accumulators[c], PRECISION),)
        accumulators = updated
    return accumulators


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), without overflow: exp is only taken of −|x|."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def silu(y):
    """y / (1 + exp(−y)) in six instructions instead of twelve. A quotient and `exp` check for operands that would be
    flushed to 0; `exp2` and `rsqrt` do not, and 1/d is rsqrt(d · d) for d ≥ 1. Where d · d overflows, from y = −44 on,
    the result is −0 instead of −3e-18."""
    d = 1.0 + tl.exp2(y * -1.4426950408889634)
    return y * tl.rsqrt(d * d)


@triton.jit
def silu_as(y, PRECISION: tl.constexpr):
    """SiLU behind a product of that precision: `silu`, whose reciprocal is off by up to a unit of float32, unless all
    else is in full float32."""
    if PRECISION == "ieee":
        return y * sigmoid(y)
    else:
        return silu(y)


@triton.jit
def silu_backward(grad, x):
    """The gradient before SiLU, from the gradient behind it and the value x before it."""
    s = sigmoid(x)
    return grad * s * (1.0 + x * (1.0 - s))
