// SPDX-License-Identifier: Apache-2.0
// Backward of the row-wise operators. Gradients of rows stay in token lanes; gradients of weights are sums over rows.
//
// dW = Σ_t left[·][t] · right[t][·], where `left` is a panel in token lanes, the form that row gradients have anyway,
// and `right` is rows as they lie in memory. Neither needs a transpose, and both are read from L1 and L2 (see
// add_weight_gradient).
#pragma once

#include "row_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// σ(x) and 1 - σ(x), at the accuracy that P needs (see silu_for). Cheaply, the second is e^-x σ(x): its error is relative
// to it, not to 1, since it is multiplied with x. Exponents are limited so that e^-x stays finite.
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

// ---- what the gradients of weights are made of ----------------------------------------------------------------------

template <typename P>
struct WeightGradient {
  using T = typename P::Value;
  int64_t rows, columns;       // of dW
  int64_t panel;               // elements of one block of `left`
  // Leading dimension of `right` and `sums`: an odd number of cache lines, so that the rows of a group use all L1 sets
  // (192 floats per row would use a quarter of them). On tiles it also covers whole blocks of 32 columns.
  int64_t ld;
  typename P::Weight* left;    // [block][round_up(rows, size)][kLanes]
  typename P::Operand* right;  // [P::rows(row within the step)][ld]
  T* sums;                     // [round_up(rows, size)][ld]
  T* bias_rest;                // [rows], the compensation of ExactSum

  WeightGradient(Pieces& pieces, int64_t rows, int64_t columns, int64_t capacity) : rows(rows), columns(columns) {
    panel = round_up(rows, Vec<T>::size) * kLanes;
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    ld = (round_up(columns, packs_weights<P> ? 32 : line) / line | 1) * line;
    left = pieces.take<typename P::Weight>(round_up(capacity, kLanes) / kLanes * panel);
    right = pieces.take<typename P::Operand>(P::rows(round_up(capacity, kLanes)) * ld);
    sums = pieces.take<T>(round_up(rows, Vec<T>::size) * ld);
    bias_rest = pieces.take<T>(rows);
  }

  // Where a block's panel of `left` is. On tiles it is multiplied whole, so lanes that no vector is stored to are zero.
  MVIT_INLINE typename P::Weight* left_of(int64_t index, const Block<T>& block) const {
    auto* const panel_of = left + index * panel;
    if (packs_weights<P> && block.lanes < kLanes) std::memset(static_cast<void*>(panel_of), 0, sizeof(*left) * panel);
    return panel_of;
  }
};

// A panel of gradients is needed in two forms, as `left` and as the operand of a product, and is first computed as
// values. With Plain arithmetic all three share the same memory.
template <typename P>
MVIT_INLINE typename P::Value* values_of_left(Pieces& pieces, typename P::Weight* left, int64_t channels) {
  if constexpr (P::kStep == 1)
    return left;
  else
    return pieces.template take<typename P::Value>(round_up(channels, Vec<typename P::Value>::size) * kLanes);
}

template <typename P>
MVIT_INLINE typename P::Operand* operand_of_left(Pieces& pieces, typename P::Weight* left, int64_t channels) {
  if constexpr (P::kStep == 1)
    return left;
  else
    return take_operand<P>(pieces, channels);
}

template <int R, int V, typename T>
MVIT_INLINE void store_left(T* left, int64_t row, int64_t lane, const Vec<T> (&tile)[R][V]) {
  store_tile(left + row * kLanes + lane, kLanes, tile);
}

#if defined(MVIT_BF16_PAIRS)
template <int R, int V>
MVIT_INLINE void store_left(bfloat16* left, int64_t row, int64_t lane, const Vec<float> (&tile)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      store_first(left + (row + r) * kLanes + lane + v * Vec<float>::size, tile[r][v], Vec<float>::size);
}
#endif

template <typename P, int R, int V>
MVIT_INLINE void store_left_and_operand(typename P::Weight* left, typename P::Operand* operand, int64_t row,
                                        int64_t lane, const Vec<typename P::Value> (&tile)[R][V]) {
  store_left(left, row, lane, tile);
  if constexpr (P::kStep > 1) store_operand(operand, kLanes, row, lane, kLanes - lane, tile);
}

// Reads the block's gradient rows in both forms; zero in lanes without a row.
template <typename P, typename E>
MVIT_INLINE void read_left_and_operand(typename P::Weight* left, typename P::Operand* operand, const Rows& rows,
                                       const Block<typename P::Value>& block, int64_t channels) {
  read_operand<P, E>(operand, rows, block, channels);
  if constexpr (P::kStep > 1) {
    for (int64_t lane = 0; lane < block.lanes; lane += Vec<float>::size)
      for (int64_t c = 0; c < channels; c += 2)
        store_halves(left + c * kLanes + lane, left + (c + 1) * kLanes + lane, operand + c / 2 * kLanes + lane);
  }
}

// Stores rows of `right` from row `row` of the step on: value(channels [c, c + size) of row i of the block, i, c,
// number of channels present).
template <typename P, typename E, typename Value>
MVIT_INLINE void store_right(const WeightGradient<P>& gradient, int64_t row, const Rows& rows,
                             const Block<typename P::Value>& block, const Value& value) {
  using T = typename P::Value;
  const E* from[kLanes];
  tokens_of<const E>(rows).for_each(block.first, block.count, [&](const E* p, int64_t i) { from[i] = p; });
  for (int64_t i = 0; i < block.count; i += P::kStep)
    for (int64_t c = 0; c < gradient.columns; c += Vec<T>::size) {
      const int width = static_cast<int>(smaller(Vec<T>::size, gradient.columns - c));
      const auto value_of = [&](int64_t i) { return value(load_first(from[i] + c, width), i, c, width); };
      auto* to = gradient.right + P::rows(row + i) * gradient.ld + c;
      if constexpr (P::kStep == 1)
        store(to, value_of(i));
      else
        store_first(to, value_of(i), i + 1 < block.count ? value_of(i + 1) : Vec<T>(T(0)), Vec<T>::size);
    }
  if constexpr (packs_weights<P>) {
    const int64_t present = P::rows(block.count);
    std::memset(static_cast<void*>(gradient.right + (P::rows(row) + present) * gradient.ld), 0,
                sizeof(*gradient.right) * (P::rows(kLanes) - present) * gradient.ld);
  }
}

// The same for LN(x), from the saved statistics.
template <typename P, typename E>
MVIT_INLINE void store_right_normalised(const WeightGradient<P>& gradient, int64_t row, const Rows& x,
                                        const Block<typename P::Value>& block,
                                        const RowNormalisers<typename P::Value>& normalisers,
                                        const typename P::Value* weight, const typename P::Value* bias) {
  using T = typename P::Value;
  store_right<P, E>(gradient, row, x, block, [&](Vec<T> v, int64_t i, int64_t c, int width) {
    return fma(normalisers(v, i), load_first(weight + c, width), load_first(bias + c, width));
  });
}

// ---- gradients of weights -------------------------------------------------------------------------------------------

// A tile of dW is kTileChannels rows by up to kTileVectors vectors. The columns of `right` in one group are then 24 KB,
// read from L2 once for all rows of the tile.
template <typename P>
constexpr int64_t kTileChannels = packs_weights<P> ? 32 : 48;
template <typename P>
constexpr int64_t group_rows = 128 * P::kStep;

// On tiles, where `left` and `right` are A and B as they are, it is 32 rows by all columns.
template <typename P>
MVIT_INLINE int64_t vectors_of(const WeightGradient<P>& gradient) {
  return round_up(gradient.columns, Vec<typename P::Value>::size) / Vec<typename P::Value>::size;
}

// At least one: the first column block also computes the sums of `left`.
template <typename P>
MVIT_INLINE int64_t column_blocks(const WeightGradient<P>& gradient) {
  return packs_weights<P> || gradient.columns == 0 ? 1 : (vectors_of(gradient) + kTileVectors - 1) / kTileVectors;
}

template <typename P>
MVIT_INLINE int64_t tiles_of(const WeightGradient<P>& gradient) {
  return column_blocks(gradient) * ((gradient.rows + kTileChannels<P> - 1) / kTileChannels<P>);
}

// Writes a tile at (row, column) to out (rows, columns), or to its transpose.
template <bool kTransposed, typename E, int R, int V, typename T>
MVIT_INLINE void write_gradient(E* out, int64_t rows, int64_t columns, int64_t row, int64_t column,
                                const Vec<T> (&tile)[R][V]) {
  constexpr int64_t size = Vec<T>::size;
  if constexpr (kTransposed) {
    T panel[(R + size - 1) / size * size * V * size] = {};
    store_tile(panel, V * size, tile);
    write_columns(TokenRows<E>{out + row, 0, rows, INT64_MAX}, column, smaller(V * size, columns - column), R, panel,
                  V * size);
  } else {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t present = smaller(size, columns - column - v * size);
        if (present > 0)
          store_first(out + (row + r) * columns + column + v * size, tile[r][v], static_cast<int>(present));
      }
  }
}

#if defined(MVIT_TILES)
// Two rows of a tile of dW, written as they are.
template <typename E>
struct GradientPiece {
  E* out;
  int64_t columns;
  int first, second;  // columns of either vector that exist

  MVIT_INLINE void advance(int rows) { out += rows * columns; }
  template <int N>
  MVIT_INLINE void operator()(const Vec<float> (&tile)[kPieceRows][N], int row) const {
    for (int r = 0; r < kPieceRows; ++r) {
      store_first(out + (row + r) * columns, tile[r][0], first);
      if (N > 1 && second > 0) store_first(out + (row + r) * columns + kTile, tile[r][N - 1], second);
    }
  }
};

// Adds the step's rows to rows [begin, begin + count) of dW, count up to 32, which the last step writes to `out`.
template <typename P, typename E, bool kTransposed>
__attribute__((noinline)) void add_weight_gradient_on_tiles(const WeightGradient<P>& gradient, const RowStep& step,
                                                            int64_t begin, int64_t count, E* out) {
  const int64_t steps = round_up(step.rows, kLanes) / kLanes, ld_bytes = 4 * gradient.ld;
  const TileOperand a{reinterpret_cast<const char*>(gradient.left + begin * kLanes), kTile * 64, 2 * gradient.panel, 64};
  TileResults<2> results;
  TileProducts<2, GradientPiece<E>> products(results);
  const auto in_columns = [&](int64_t column, const auto& start) {
    const TileOperand b{reinterpret_cast<const char*>(gradient.right + column), 64, kTile * ld_bytes, ld_bytes};
    float* const sums = gradient.sums + begin * gradient.ld + column;
    const auto multiply = [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      if (kTransposed || !step.last) return products.template block_to<M>(a, b, steps, start, sums, gradient.ld);
      const int64_t present = smaller(kBlockSide, gradient.columns - column);
      products.template block<M>(a, b, steps, start,
                                 GradientPiece<E>{out + begin * gradient.columns + column, gradient.columns,
                                                  static_cast<int>(smaller(kTile, present)),
                                                  static_cast<int>(present - kTile)},
                                 static_cast<int>(count));
    };
    if (count > kTile)
      multiply(std::integral_constant<int, 2>{});
    else
      multiply(std::integral_constant<int, 1>{});
  };
  for (int64_t column = 0; column < gradient.columns; column += kBlockSide) {
    if (step.first)
      in_columns(column, StartAtZero{});
    else
      in_columns(column, StartAt{gradient.sums + begin * gradient.ld + column, ld_bytes});
  }
  products.finish();
  if (!kTransposed || !step.last) return;
  for (int64_t row = 0; row < count; row += kTile)
    write_columns(TokenRows<E>{out + begin + row, 0, gradient.rows, INT64_MAX}, 0, gradient.columns,
                  smaller(kTile, count - row), gradient.sums + (begin + row) * gradient.ld, gradient.ld);
}
#endif

// Adds the step's rows to one tile of dW, which the last step writes to `out`. If `bias` is not null, it receives the
// sum of `left` over all rows.
template <typename P, typename E, bool kTransposed = false>
MVIT_INLINE void add_weight_gradient(const WeightGradient<P>& gradient, const RowStep& step, int64_t tile_index, E* out,
                                     typename P::Value* bias = nullptr) {
  using T = typename P::Value;
  constexpr int64_t size = Vec<T>::size;
  const int64_t vectors = vectors_of(gradient), blocks = column_blocks(gradient);
  const int64_t column_block = tile_index % blocks, begin = tile_index / blocks * kTileChannels<P>;
  const int64_t first_vector = column_block * vectors / blocks;
  const int64_t width = (column_block + 1) * vectors / blocks - first_vector, column = first_vector * size;
  const int64_t count = smaller(kTileChannels<P>, gradient.rows - begin);
#if defined(MVIT_TILES)
  if constexpr (packs_weights<P>) add_weight_gradient_on_tiles<P, E, kTransposed>(gradient, step, begin, count, out);
#endif

  for (int64_t group = 0; group < step.rows; group += group_rows<P>) {
    const int64_t end = smaller(group + group_rows<P>, step.rows);
    const bool first = step.first && group == 0, last = step.last && end == step.rows;
    if constexpr (!packs_weights<P>) {
      with_constant<kTileVectors>(width, [&](auto constant) {
        constexpr int V = decltype(constant)::value;
        in_steps<kTileRows>(count, [&](auto rows, int64_t row) {
          constexpr int R = decltype(rows)::value;
          Vec<T> tile[R][V];
          clear(tile);
          for (int64_t t = group; t < end; t += kLanes)
            multiply_add<R, V, Operand::row_major>(
                tile, gradient.left + t / kLanes * gradient.panel + (begin + row) * kLanes, kLanes,
                gradient.right + P::rows(t) * gradient.ld + column, gradient.ld, P::rows(smaller(kLanes, end - t)));
          T* sums = gradient.sums + (begin + row) * gradient.ld + column;
          if (!first) add_tile(tile, sums, gradient.ld);
          if (!last) return store_tile(sums, gradient.ld, tile);
          write_gradient<kTransposed>(out, gradient.rows, gradient.columns, begin + row, column, tile);
        });
      });
    }
    if (bias == nullptr || column_block != 0) continue;
    T sums[kTileChannels<P>];
    sum_lanes(sums, count, [&](int64_t row) {
      Vec<T> sum(T(0));
      for (int64_t t = group; t < end; t += kLanes) {
        const auto* left = gradient.left + t / kLanes * gradient.panel + (begin + row) * kLanes;
        sum = sum + sum_vectors<T>(round_up(smaller(kLanes, end - t), size),
                                   [&](int64_t lane) { return load_first(left + lane, size); });
      }
      return sum;
    });
    for (int64_t row = 0; row < count; row += size) {
      const int width = static_cast<int>(smaller(size, count - row));
      T *total = bias + begin + row, *rest = gradient.bias_rest + begin + row;
      ExactSum<T> sum{Vec<T>(T(0)), Vec<T>(T(0))};
      if (!first) sum = {load_first(total, width), load_first(rest, width)};
      sum.add(load_first(sums + row, width));
      store_first(total, last ? sum.value() : sum.total, width);
      store_first(rest, sum.rest, width);
    }
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
