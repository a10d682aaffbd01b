// SPDX-License-Identifier: Apache-2.0
// The row-wise parts of a transformer layer (products, bias, SiLU, LayerNorm) with tokens in the lanes.
//
// A block of kLanes tokens is kept transposed, as a panel [channels][kLanes]. A product with weights as nn.Linear
// stores them, (out, in), is then out = W · panel, with the elements of W as the broadcast operand. No weight is packed
// and no width is padded (36, 60, 80, 120 or 144 channels are just that many rows); LayerNorm sums over rows of the
// panel instead of across lanes; and the output panel of one product is the operand of the next. Only the map's rows
// are transposed, once in each direction. With an 8 × 2 tile, a product reads 2 bytes of weights per cycle; on Zen 4 it
// runs at 99 % of the FMA rate at every width.
#pragma once

#include "exponential.h"
#include "microkernel.h"
#include "tile_weights.h"
#include "token_rows.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int64_t kLanes = 32;

// Arithmetic policies: the types that products work on. Value: accumulators and everything between products. Weight:
// elements of matrices in memory, row-major. Operand: an element of a panel that a product reads; such a panel has
// rows(channels) rows, in memory rows_in_memory(channels), of which the others must be finite (see clear_padding).
template <typename T>
struct Plain {
  using Value = T;
  using Weight = T;
  using Operand = T;
  static constexpr int64_t kStep = 1;  // channels per step of a product
  static constexpr int64_t rows(int64_t channels) { return channels; }
  static constexpr int64_t rows_in_memory(int64_t channels) { return channels; }
};

#if defined(MVIT_BF16_PAIRS)
struct Bf16Pairs {  // pairs of adjacent channels; even widths only, since a row of weights must start at a pair
  using Value = float;
  using Weight = bfloat16;
  using Operand = bf16x2;
  static constexpr int64_t kStep = 2;
  static constexpr int64_t rows(int64_t channels) { return (channels + 1) / 2; }
#if defined(MVIT_TILES)
  static constexpr int64_t rows_in_memory(int64_t channels) { return (channels + 31) / 32 * 16; }  // whole tiles
#else
  static constexpr int64_t rows_in_memory(int64_t channels) { return rows(channels); }
#endif
};
#endif

// Clears the rows of an operand panel after its last: they are multiplied with zeros, which must not give NaN.
template <typename P>
MVIT_INLINE void clear_padding(typename P::Operand* panel, int64_t channels) {
  const int64_t rows = P::rows(channels), padding = P::rows_in_memory(channels) - rows;
  if (padding > 0) std::memset(static_cast<void*>(panel + rows * kLanes), 0, sizeof(*panel) * padding * kLanes);
}

// Stores a tile as rows [row, row + R), lanes [lane, lane + count) of an operand panel. `row` is even; a last odd row
// is paired with zeros.
template <int R, int V, typename T>
MVIT_INLINE void store_operand(T* panel, int64_t ld, int64_t row, int64_t lane, int64_t count,
                               const Vec<T> (&tile)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t present = smaller(Vec<T>::size, count - v * Vec<T>::size);
      if (present > 0)
        store_first(panel + (row + r) * ld + lane + v * Vec<T>::size, tile[r][v], static_cast<int>(present));
    }
}

#if defined(MVIT_BF16_PAIRS)
template <int R, int V>
MVIT_INLINE void store_operand(bf16x2* panel, int64_t ld, int64_t row, int64_t lane, int64_t count,
                               const Vec<float> (&tile)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 2)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t present = smaller(Vec<float>::size, count - v * Vec<float>::size);
      if (present > 0)
        store_first(panel + (row + r) / 2 * ld + lane + v * Vec<float>::size, tile[r][v],
                    r + 1 < R ? tile[r + 1][v] : Vec<float>(0.0f), static_cast<int>(present));
    }
}
#endif

// Computes W · panel tile by tile and calls epilogue(tile, row, lane) for rows [row, row + R) of n and lanes
// [lane, lane + V · size), for as many vectors as `lanes` needs. W is (n, channels) with leading dimension ldw, or its
// transpose for kOrder = column_major (see multiply_add); panel is [rows_in_memory(channels)][kLanes].
// Where matrix tiles multiply, W is packed (tile_weights.h; Wᵀ for column_major), the calling thread has a ProductUnit,
// and the epilogue should capture by value.
template <typename P, Operand kOrder = Operand::row_major, typename Epilogue>
MVIT_INLINE void product(const typename P::Weight* weights, int64_t ldw, const typename P::Operand* panel, int64_t n,
                         int64_t channels, int64_t lanes, const Epilogue& epilogue) {
  using T = typename P::Value;
  constexpr int64_t size = Vec<T>::size;
  if constexpr (packs_weights<P>) {
    if (lanes > size)
      multiply_on_tiles<2>(weights, ldw, panel, kLanes, n, channels, epilogue);
    else
      multiply_on_tiles<1>(weights, ldw, panel, kLanes, n, channels, epilogue);
  } else {
    const int64_t next_row = kOrder == Operand::row_major ? ldw : P::kStep;
    const int64_t depth = P::rows(channels), block = block_of<typename P::Weight>(depth);
    for (int64_t lane = 0; lane < lanes; lane += 2 * size)
      with_constant<2>(lanes - lane > size ? 2 : 1, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        in_steps<kTileRows>(n, [&](auto rows, int64_t row) {
          constexpr int R = decltype(rows)::value;
          Vec<T> tile[R][V];
          clear(tile);
          constexpr Next next = kOrder == Operand::row_major ? Next::rows : Next::unknown;
          multiply_add_in_blocks<R, V, kOrder, next>(tile, weights + row * next_row, ldw, panel + lane, kLanes, depth,
                                                     block);
          epilogue(tile, row, lane);
        });
      });
  }
}

// Adds the bias of the tile's rows; null means no bias.
template <int R, int V, typename T>
MVIT_INLINE void add_bias(Vec<T> (&tile)[R][V], const T* bias, int64_t row) {
  if (bias != nullptr) map_tile(tile, [&](Vec<T> x, int r, int) { return x + Vec<T>(bias[row + r]); });
}

// panel[row …][lane …] += tile
template <int R, int V, typename T>
MVIT_INLINE void add_to_panel(T* panel, int64_t row, int64_t lane, Vec<T> (&tile)[R][V]) {
  add_tile(tile, panel + row * kLanes + lane, kLanes);
  store_tile(panel + row * kLanes + lane, kLanes, tile);
}

// An epilogue that stores the results in a panel.
template <typename T>
MVIT_INLINE auto store_in(T* panel) {
  return [panel](auto& tile, int64_t row, int64_t lane) { store_tile(panel + row * kLanes + lane, kLanes, tile); };
}

template <typename T>
MVIT_INLINE Vec<T> silu(Vec<T> x) {
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return x * sigmoid(x);
#endif
  return x / (Vec<T>(T(1)) + exp(-x));
}

// 2^x and SiLU at the accuracy that P needs: a result that is rounded to bfloat16 next needs no more than 2^-13 (the
// cubic for 2^f on [0, 1) has 7.5e-5, the reciprocal 6e-5). SiLU then takes 7 cycles per vector on Zen 4.
template <typename P>
MVIT_INLINE Vec<typename P::Value> exp2_for(Vec<typename P::Value> x) {
#if defined(MVIT_BF16_PAIRS)
  if constexpr (sizeof(typename P::Weight) == 2) {
    const Vec<float> rest(_mm512_maskz_reduce_ps(-1, x.native, _MM_FROUND_TO_NEG_INF));  // 0 for infinity
    Vec<float> p(0.07802452f);
    p = fma(p, rest, Vec<float>(0.22606716f));
    p = fma(p, rest, Vec<float>(0.69583354f));
    p = fma(p, rest, Vec<float>(0.99992522f));
    return Vec<float>(_mm512_maskz_scalef_ps(-1, p.native, x.native));  // p · 2^floor(x)
  }
#endif
  return exp2(x);
}

template <typename P>
MVIT_INLINE Vec<typename P::Value> silu_for(Vec<typename P::Value> x) {
#if defined(MVIT_BF16_PAIRS)
  if constexpr (sizeof(typename P::Weight) == 2) {
    const Vec<float> e = exp2_for<P>(x * Vec<float>(-1.44269504f));
    return x * Vec<float>(_mm512_maskz_rcp14_ps(-1, (Vec<float>(1.0f) + e).native));
  }
#endif
  return silu(x);
}

// N sums over the channels, in blocks of kChains independent chains each, since an addition has a latency of four
// cycles. add(c, sums, i) adds channel c to the sums of chain i.
constexpr int kChains = 4;
template <int N, typename T, typename Add>
MVIT_INLINE void sum_channels(Vec<T> (&sums)[N], int64_t channels, const Add& add) {
  constexpr int64_t block = 16 * kChains;
  for (auto& sum : sums) sum = Vec<T>(T(0));
  for (int64_t begin = 0; begin < channels; begin += block) {
    const int64_t end = smaller(begin + block, channels);
    Vec<T> chain[kChains][N];
    for (auto& of_chain : chain)
      for (auto& sum : of_chain) sum = Vec<T>(T(0));
    int64_t c = begin;
    for (; c + kChains <= end; c += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) add(c + i, chain[i], i);
    for (int i = 0; c + i < end; ++i) add(c + i, chain[i], i);
    for (int n = 0; n < N; ++n) sums[n] = sums[n] + ((chain[0][n] + chain[1][n]) + (chain[2][n] + chain[3][n]));
  }
}

// LayerNorm's normalisation: (x - mean - rest) · rstd. Where the mean is large it is close to all values, so the first
// difference is exact. `rest` is the rounding error of the mean itself: 1e-12 for doubles near 1e4.
template <typename T>
struct Normaliser {
  Vec<T> mean, rstd, shift;  // shift = -rest · rstd

  MVIT_INLINE Vec<T> operator()(Vec<T> x) const { return fma(x - mean, rstd, shift); }
};

// Statistics of `channels` values in each of `size` lanes of a panel; stores those that backward needs if mean_out is
// not null. The first pass sums differences from the first value, so that the mean of equal values is exactly that
// value and they normalise to exactly 0. The second pass corrects the mean.
template <typename T>
MVIT_INLINE Normaliser<T> normaliser_of(const T* panel, int64_t channels, T eps, T* mean_out = nullptr,
                                        T* rstd_out = nullptr) {
  const Vec<T> count(static_cast<T>(channels)), first = channels > 0 ? load(panel) : Vec<T>(T(0));
  Vec<T> sum[1], sums[2];
  sum_channels(sum, channels, [&](int64_t c, auto& to, int) { to[0] = to[0] + (load(panel + c * kLanes) - first); });
  const Vec<T> mean = first + sum[0] / count;
  sum_channels(sums, channels, [&](int64_t c, auto& to, int) {
    const Vec<T> centred = load(panel + c * kLanes) - mean;
    to[0] = to[0] + centred;
    to[1] = fma(centred, centred, to[1]);
  });
  const Vec<T> rest = sums[0] / count, variance = sums[1] / count - rest * rest;
  const Vec<T> rstd = Vec<T>(T(1)) / sqrt(maximum(variance, Vec<T>(T(0))) + Vec<T>(eps));
  if (mean_out != nullptr) {
    store(mean_out, mean + rest);
    store(rstd_out, rstd);
  }
  return {mean, rstd, -(rest * rstd)};
}

// operand[c] = value(c) for every channel; value returns the vector of lanes that starts at `lane`.
template <typename P, typename Value>
MVIT_INLINE void fill_operand(typename P::Operand* operand, int64_t channels, int64_t lane, const Value& value) {
  using T = typename P::Value;
  int64_t c = 0;
  for (; c + 2 <= channels; c += 2) {
    const Vec<T> tile[2][1] = {{value(c)}, {value(c + 1)}};
    store_operand(operand, kLanes, c, lane, Vec<T>::size, tile);
  }
  if (c < channels) {
    const Vec<T> tile[1][1] = {{value(c)}};
    store_operand(operand, kLanes, c, lane, Vec<T>::size, tile);
  }
}

// operand = LN(panel) in the first `lanes` lanes (whole vectors); mean and rstd of each lane if the pointers are not
// null. A Plain operand may alias the panel.
template <typename P>
MVIT_INLINE void layer_norm(typename P::Operand* operand, const typename P::Value* panel, int64_t channels,
                            const typename P::Value* weight, const typename P::Value* bias, typename P::Value eps,
                            int64_t lanes, typename P::Value* mean_out = nullptr,
                            typename P::Value* rstd_out = nullptr) {
  using T = typename P::Value;
  for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size) {
    const bool wanted = mean_out != nullptr;
    const Normaliser<T> normalised = normaliser_of(panel + lane, channels, eps, wanted ? mean_out + lane : nullptr,
                                                   wanted ? rstd_out + lane : nullptr);
    fill_operand<P>(operand, channels, lane, [&](int64_t c) {
      return fma(normalised(load(panel + c * kLanes + lane)), Vec<T>(weight[c]), Vec<T>(bias[c]));
    });
  }
}

}  // namespace MVIT_ISA
}  // namespace mvit
