// SPDX-License-Identifier: Apache-2.0
// Backward of the row-wise operators: SiLU, LayerNorm and the gradients of vectors. Gradients of rows stay in token
// lanes; those of weights, sums over rows, are in weight_gradients.h.
#pragma once

#include "row_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// σ(x) and 1 - σ(x), at the accuracy that P needs (see silu_for). Cheaply, the second is e^-x σ(x): its error is
// relative to it, not to 1, since it is multiplied with x. Exponents are limited so that e^-x stays finite.
template <typename P>
struct Sigmoid {
  using T = typename P::Value;
  Vec<T> value, rest;

  explicit MVIT_INLINE Sigmoid(Vec<T> x) {
    const Vec<T> one(T(1));
#if defined(MVIT_BF16_PAIRS)
    if constexpr (sizeof(typename P::Weight) == 2) {
      const Vec<float> e = exp2_for<P>(minimum(Vec<float>(126.0f), x * Vec<float>(-1.44269504f)));
      value = Vec<float>(_mm512_maskz_rcp14_ps(-1, (one + e).native));
      rest = e * value;
      return;
    }
#endif
    value = one / (one + exp(-x));
    rest = one - value;
  }

  MVIT_INLINE Vec<T> silu_backward(Vec<T> grad, Vec<T> x) const { return grad * value * fma(x, rest, Vec<T>(T(1))); }
};

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// sums[c] = horizontal sum of value(c), for c in [0, channels). Transposes, so that all additions are between
// registers.
template <typename T, typename Value>
MVIT_INLINE void sum_lanes(T* sums, int64_t channels, const Value& value) {
  constexpr int size = Vec<T>::size;
  for (int64_t c0 = 0; c0 < channels; c0 += size) {
    Vec<T> row[size];
    for (int i = 0; i < size; ++i) row[i] = c0 + i < channels ? value(c0 + i) : Vec<T>(T(0));
    transpose(row);
#pragma GCC unroll 4
    for (int half = size / 2; half > 0; half /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < half; ++i) row[i] = row[i] + row[i + half];
    store_first(sums + c0, row[0], static_cast<int>(smaller(size, channels - c0)));
  }
}

// Sum of the vectors value(lane) over the first `lanes` lanes.
template <typename T, typename Value>
MVIT_INLINE Vec<T> sum_vectors(int64_t lanes, const Value& value) {
  Vec<T> sum(T(0));
  for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size) sum = sum + value(lane);
  return sum;
}

// Compensated sum: as accurate as its terms at any length. `rest` accumulates the rounding error of each addition.
template <typename T>
struct ExactSum {
  Vec<T> total, rest;

  MVIT_INLINE void add(Vec<T> x) {
    const Vec<T> sum = total + x, added = sum - total;
    rest = rest + ((total - (sum - added)) + (x - added));
    total = sum;
  }
  // For an infinite sum the compensation is NaN and is ignored.
  MVIT_INLINE Vec<T> value() const {
    return typename Vec<T>::Native(rest.native == rest.native ? total.native + rest.native : total.native);
  }
};

// ---- LayerNorm ------------------------------------------------------------------------------------------------------

// The Normaliser of each lane.
template <typename T>
struct RowNormalisers {
  T mean[kLanes], rstd[kLanes], shift[kLanes];

  MVIT_INLINE Vec<T> operator()(Vec<T> x, int64_t row) const {
    return Normaliser<T>{Vec<T>(mean[row]), Vec<T>(rstd[row]), Vec<T>(shift[row])}(x);
  }
};

// panel = the block's rows, normalised with the saved statistics; zero in lanes without a row. The rounding error of
// the mean is recomputed from the rows; for rows of equal values it is zero, as in forward.
template <typename E, typename T>
MVIT_INLINE void read_normalised(T* panel, RowNormalisers<T>& normalisers, const Rows& x, const void* means,
                                 const void* rstds, const Block<T>& block, int64_t channels) {
  read_block<E>(panel, x, block, channels);
  for (int64_t lane = 0; lane < block.lanes; lane += Vec<T>::size) {
    const int present = static_cast<int>(smaller(Vec<T>::size, block.count - lane));
    const Vec<T> m = load_first(static_cast<const T*>(means) + block.first + lane, present);
    const Vec<T> r = load_first(static_cast<const T*>(rstds) + block.first + lane, present);
    Vec<T> sum[1];
    sum_channels(sum, channels,
                 [&](int64_t c, auto& to, int) { to[0] = to[0] + (load(panel + c * kLanes + lane) - m); });
    const Normaliser<T> normalised{m, r, -(sum[0] / Vec<T>(static_cast<T>(channels)) * r)};
    store(normalisers.mean + lane, m);
    store(normalisers.rstd + lane, r);
    store(normalisers.shift + lane, normalised.shift);
    for (int64_t c = 0; c < channels; ++c)
      store(panel + c * kLanes + lane, normalised(load(panel + c * kLanes + lane)));
  }
}

// operand = normalised · weight + bias
template <typename P>
MVIT_INLINE void scale_and_shift(typename P::Operand* operand, const typename P::Value* normalised, int64_t channels,
                                 const typename P::Value* weight, const typename P::Value* bias, int64_t lanes) {
  using T = typename P::Value;
  for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size)
    fill_operand<P>(operand, channels, lane, [&](int64_t c) {
      return fma(load(normalised + c * kLanes + lane), Vec<T>(weight[c]), Vec<T>(bias[c]));
    });
}

// out = the gradient of x, from `grad`, that of LN(x), which is overwritten; plus `residual`, a panel, if it is not null.
// A Plain `out` may be `grad`. Also computes the block's sums for the gradients of LN's weight and bias. `grad` must be
// zero in lanes without a row. The mean is clamped between the smallest and the largest value: the mean of equal values
// is then exactly that value, and the gradient of x is exactly 0 where it should be, e.g. for rows of one column.
template <typename P, typename T = typename P::Value>
MVIT_INLINE void layer_norm_backward(typename P::Operand* out, T* grad, const T* residual, const T* normalised,
                                     const T* rstd, int64_t channels, const T* weight, int64_t lanes, T* weight_sums,
                                     T* bias_sums) {
  constexpr int size = Vec<T>::size;
  const auto grad_of = [&](int64_t c, int64_t lane) { return load(grad + c * kLanes + lane); };
  const auto normalised_of = [&](int64_t c, int64_t lane) { return load(normalised + c * kLanes + lane); };
  sum_lanes(weight_sums, channels, [&](int64_t c) {
    return sum_vectors<T>(lanes, [&](int64_t lane) { return grad_of(c, lane) * normalised_of(c, lane); });
  });
  sum_lanes(bias_sums, channels,
            [&](int64_t c) { return sum_vectors<T>(lanes, [&](int64_t lane) { return grad_of(c, lane); }); });
  const Vec<T> count(static_cast<T>(channels));
  for (int64_t lane = 0; lane < lanes; lane += size) {
    Vec<T> sums[2], least[kChains], greatest[kChains];
    for (auto& of_chain : least) of_chain = Vec<T>(T(__builtin_inf()));
    for (auto& of_chain : greatest) of_chain = Vec<T>(T(-__builtin_inf()));
    sum_channels(sums, channels, [&](int64_t c, auto& to, int i) {
      const Vec<T> g = grad_of(c, lane) * Vec<T>(weight[c]);
      store(grad + c * kLanes + lane, g);
      to[0] = to[0] + g;
      to[1] = fma(g, normalised_of(c, lane), to[1]);
      least[i] = minimum(least[i], g);
      greatest[i] = maximum(greatest[i], g);
    });
    for (int i = 1; i < kChains; ++i) {
      least[0] = minimum(least[0], least[i]);
      greatest[0] = maximum(greatest[0], greatest[i]);
    }
    const Vec<T> mean = minimum(greatest[0], maximum(least[0], sums[0] / count)), slope = sums[1] / count;
    const Vec<T> r = load(rstd + lane);
    const auto value = [&](int64_t c) { return (grad_of(c, lane) - mean - normalised_of(c, lane) * slope) * r; };
    if (residual == nullptr)
      fill_operand<P>(out, channels, lane, value);
    else
      fill_operand<P>(out, channels, lane, [&](int64_t c) { return value(c) + load(residual + c * kLanes + lane); });
  }
}

// ---- gradients of vectors that each block sums up -------------------------------------------------------------------

// For each block of a step, `vectors` vectors of `channels` sums.
template <typename T>
struct BlockSums {
  int64_t channels, ld, vectors;
  T *sums, *rest;  // [block][vector][ld], [vector][ld] of ExactSum

  BlockSums(Pieces& pieces, int64_t channels, int64_t vectors, int64_t capacity)
      : channels(channels), ld(round_up(channels, Vec<T>::size)), vectors(vectors) {
    sums = pieces.take<T>(round_up(capacity, kLanes) / kLanes * vectors * ld);
    rest = pieces.take<T>(vectors * ld);
  }
  MVIT_INLINE T* of(int64_t block, int64_t vector) const { return sums + (block * vectors + vector) * ld; }

  // out += the sums of all blocks of the step, in order.
  MVIT_INLINE void add_to(void* out_memory, int64_t vector, const RowStep& step) const {
    T* out = static_cast<T*>(out_memory);
    for (int64_t c = 0; c < channels; c += Vec<T>::size) {
      const int width = static_cast<int>(smaller(Vec<T>::size, channels - c));
      T* rest_of = rest + vector * ld + c;
      ExactSum<T> sum{Vec<T>(T(0)), Vec<T>(T(0))};
      if (!step.first) sum = {load_first(out + c, width), load(rest_of)};
      for (int64_t block = 0; block * kLanes < step.rows; ++block) sum.add(load(of(block, vector) + c));
      store_first(out + c, step.last ? sum.value() : sum.total, width);
      store(rest_of, sum.rest);
    }
  }
};

}  // namespace MVIT_ISA
}  // namespace mvit
