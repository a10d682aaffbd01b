// SPDX-License-Identifier: Apache-2.0
// add_weight_gradient of weight_gradients.h, for the row-wise operators, whose kernels call it once for a tile of dW.
#include "weight_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// A matrix of floats or doubles from row `begin` and column `column` on.
template <typename T>
struct Destination {
  T* at;
  int64_t ld;
};

// `to`, `count` rows by `width` vectors, = sums[begin …][column …] + left · right over rows [group, end) of the step;
// `first`: without the sums. It knows nothing of the elements of dW in memory, nor of its transpose, so that its 12 shapes
// of register tiles are compiled once for all of them.
template <typename P, typename T = typename P::Value>
void add_rows(const WeightGradient<P>& gradient, int64_t group, int64_t end, bool first, int64_t begin, int64_t count,
              int64_t column, int64_t width, Destination<T> to) {
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
      if (!first) add_tile(tile, gradient.sums + (begin + row) * gradient.ld + column, gradient.ld);
      store_tile(to.at + row * to.ld, to.ld, tile);
    });
  });
}

// Writes sums[begin …][column …], `count` rows by `width` vectors that lie in L1, to `out`, which is dW or its transpose.
template <bool kTransposed, typename P, typename E>
MVIT_INLINE void write_gradient(const WeightGradient<P>& gradient, E* out, int64_t begin, int64_t count, int64_t column,
                                int64_t width) {
  constexpr int64_t size = Vec<typename P::Value>::size;
  const auto* const sums = gradient.sums + begin * gradient.ld + column;
  const int64_t present = smaller(width * size, gradient.columns - column);
  if constexpr (kTransposed) {
    write_columns(TokenRows<E>{out + begin, 0, gradient.rows, INT64_MAX}, column, present, count, sums, gradient.ld);
  } else {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < present; c += size)
        store_first(out + (begin + row) * gradient.columns + column + c, load(sums + row * gradient.ld + c),
                    static_cast<int>(smaller(size, present - c)));
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
  const auto* const left = reinterpret_cast<const char*>(gradient.left + begin * kLanes);
  const TileOperand a{left, kTileBytes, 2 * gradient.panel, 64};
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

template <typename P, typename E, bool kTransposed>
void add_weight_gradient(const WeightGradient<P>& gradient, const RowStep& step, int64_t tile_index, E* out,
                         typename P::Value* bias) {
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
      Destination<T> to{gradient.sums + begin * gradient.ld + column, gradient.ld};
      bool in_place = false;  // straight into dW: with few rows a second pass over it is felt
      if constexpr (std::is_same_v<E, T> && !kTransposed) {
        in_place = last && width > 0 && column + width * size <= gradient.columns;
        if (in_place) to = {out + begin * gradient.columns + column, gradient.columns};
      }
      add_rows(gradient, group, end, first, begin, count, column, width, to);
      if (last && !in_place) write_gradient<kTransposed>(gradient, out, begin, count, column, width);
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

#define MVIT_INSTANTIATE(P, E, kTransposed)                                                                        \
  template void add_weight_gradient<P, E, kTransposed>(const WeightGradient<P>&, const RowStep&, int64_t, E*, \
                                                       P::Value*);
#define MVIT_BOTH_WAYS(P, E)     \
  MVIT_INSTANTIATE(P, E, false) \
  MVIT_INSTANTIATE(P, E, true)
#if defined(MVIT_BF16_PAIRS)
MVIT_BOTH_WAYS(Bf16Pairs, bfloat16)
#else
MVIT_BOTH_WAYS(Plain<float>, float)
MVIT_BOTH_WAYS(Plain<float>, bfloat16)
MVIT_BOTH_WAYS(Plain<double>, double)
#endif

}  // namespace MVIT_ISA
}  // namespace mvit
