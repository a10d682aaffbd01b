// SPDX-License-Identifier: Apache-2.0
// Gradients of weights, sums over rows: dW = Σ_t left[·][t] · right[t][·], where `left` is a panel in token lanes, the
// form that row gradients have anyway, and `right` is rows as they lie in memory. Neither needs a transpose, and both
// are read from L1 and L2 (see add_weight_gradient). On matrix tiles they are A and B as they are.
#pragma once

#include "row_gradients.h"

namespace mvit {
namespace MVIT_ISA {

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

// Adds the step's rows to one tile of dW, which the last step writes to `out`. If `bias` is not null, it receives the
// sum of `left` over all rows. Compiled in weight_gradients_kernel.cpp, once for all operators, of which it would be a
// third.
template <typename P, typename E, bool kTransposed = false>
void add_weight_gradient(const WeightGradient<P>& gradient, const RowStep& step, int64_t tile_index, E* out,
                         typename P::Value* bias = nullptr);

}  // namespace MVIT_ISA
}  // namespace mvit
