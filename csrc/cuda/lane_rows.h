// SPDX-License-Identifier: Apache-2.0
// 16 rows of a warp in registers, and matrices that they are multiplied with, in an order in which a lane has adjacent
// columns: it reads and writes memory 16 bytes at a time, and the rows' order is that of the result's.
//
// Rows are TILES tiles of 16 columns. With g = lane / 4 and t = lane % 4, a lane has of rows g and g + 8
//   of two tiles 2i and 2i + 1: the eight columns from 32i + 8t on;
//   of a single tile k at the end: the four from 16k + 4t on.
// Two adjacent ones of these share a register. The order of columns in a product's sum is arbitrary, so a lane takes the
// same columns of the other matrix, also 16 bytes at a time, and needs no ldmatrix.
#pragma once

#include <type_traits>

#include "row_values.h"

namespace mvit {

template <int COUNT>  // a lane's columns of one row in COUNT tiles
using LanePart = std::conditional_t<COUNT == 2, Words4, Words2>;

template <int COUNT>
MVIT_DEVICE int lane_column(int tile) {
  return 16 * tile + 4 * COUNT * (lane_index() % 4);
}

// body(tile, count) for two tiles at a time, and for the last one of an odd number; both are constants.
template <int TILES, int TILE = 0, typename Body>
MVIT_DEVICE void for_parts(const Body& body) {
  if constexpr (TILE < TILES) {
    constexpr int kCount = TILE + 1 < TILES ? 2 : 1;
    body(std::integral_constant<int, TILE>{}, std::integral_constant<int, kCount>{});
    for_parts<TILES, TILE + kCount>(body);
  }
}
// The same in a loop, where `tile` is no constant.
template <int TILES, typename Body>
MVIT_DEVICE void for_parts_rolled(const Body& body) {
  MVIT_ROLLED
  for (int tile = 0; tile + 1 < TILES; tile += 2) body(tile, std::integral_constant<int, 2>{});
  if constexpr (TILES % 2 == 1) body(TILES - 1, std::integral_constant<int, 1>{});
}

// N values from value `first` of a vector in shared memory on.
template <int N>
MVIT_DEVICE void load_vector(float (&values)[N], Shared vector, int first) {
  MVIT_UNROLL
  for (int i = 0; i < N; i += 4) {
    const auto four = load_shared<Floats4>(vector + 4 * (first + i));
    values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
  }
}

// 16 rows of `channels` columns in shared memory, lane_row_bytes apart. A lane reads and writes only its own parts.
template <typename T, int TILES>
struct SharedLaneRows {
  Shared at;
  int channels;

  template <int COUNT>
  MVIT_DEVICE Shared place(int tile, int half) const {
    return at + (lane_index() / 4 + 8 * half) * lane_row_bytes(channels) + 2 * lane_column<COUNT>(tile);
  }
  template <int COUNT>
  MVIT_DEVICE bool exists(int tile) const {
    return lane_column<COUNT>(tile) < channels;
  }

  // [2 · i + half]: pair i of row g + 8 · half; zero where there are no columns.
  template <int COUNT>
  MVIT_DEVICE void load(uint32_t (&part)[4 * COUNT], int tile) const {
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      LanePart<COUNT> words{};
      if (exists<COUNT>(tile)) words = load_shared<LanePart<COUNT>>(place<COUNT>(tile, half));
      part[half] = words.x, part[2 + half] = words.y;
      if constexpr (COUNT == 2) part[4 + half] = words.z, part[6 + half] = words.w;
    }
  }
  // 1 / σ of rows g and g + 8, which four lanes have, from their means. (The one-pass formula cancels where the mean is
  // large.)
  MVIT_DEVICE void deviations(float (&rstd)[2], const float (&mean)[2], float eps) const {
    float squares[2][2] = {};
    for_parts_rolled<TILES>([&](int tile, auto count) {
      uint32_t part[4 * count()];
      load<count()>(part, tile);
      if (!exists<count()>(tile)) return;
      MVIT_UNROLL
      for (int i = 0; i < 4 * count(); ++i) {
        const float low = unpack_low<T>(part[i]) - mean[i % 2], high = unpack_high<T>(part[i]) - mean[i % 2];
        squares[i % 2][0] = fmaf(low, low, squares[i % 2][0]);
        squares[i % 2][1] = fmaf(high, high, squares[i % 2][1]);
      }
    });
    const float one_of = 1.0f / static_cast<float>(channels);
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half)
      rstd[half] = rsqrt_approximate(sum_of_row(squares[half][0] + squares[half][1]) * one_of + eps);
  }

  // LayerNorm of this lane's part in COUNT tiles from `tile` on, in the order of left operands (a[i] is of tile i); its
  // weight and bias are in shared memory, in float32.
  template <int COUNT>
  MVIT_DEVICE void normalized(uint32_t (&a)[COUNT][4], int tile, Shared weights, Shared biases, const float (&mean)[2],
                              const float (&rstd)[2]) const {
    float weight[4 * COUNT], bias[4 * COUNT];
    load_vector(weight, weights, lane_column<COUNT>(tile));
    load_vector(bias, biases, lane_column<COUNT>(tile));
    uint32_t part[4 * COUNT];
    load<COUNT>(part, tile);
    MVIT_UNROLL
    for (int i = 0; i < 4 * COUNT; ++i) {
      const int c = i / 2 * 2, half = i % 2;
      a[i / 4][i % 4] = pack<T>((unpack_low<T>(part[i]) - mean[half]) * rstd[half] * weight[c] + bias[c],
                                (unpack_high<T>(part[i]) - mean[half]) * rstd[half] * weight[c + 1] + bias[c + 1]);
    }
  }

  // Left operands in the place of the parts that this lane has in COUNT tiles.
  template <int COUNT>
  MVIT_DEVICE void store_operands(const uint32_t (&a)[COUNT][4], int tile) const {
    if (!exists<COUNT>(tile)) return;
    if constexpr (COUNT == 2) {
      store_shared(place<2>(tile, 0), Words4{a[0][0], a[0][1], a[0][2], a[0][3]});
      store_shared(place<2>(tile, 1), Words4{a[1][0], a[1][1], a[1][2], a[1][3]});
    } else {
      store_shared(place<1>(tile, 0), Words2{a[0][0], a[0][1]});
      store_shared(place<1>(tile, 1), Words2{a[0][2], a[0][3]});
    }
  }
  // One of them; zero where there are no columns.
  MVIT_DEVICE void load_operand(uint32_t (&a)[4], int tile) const {
    if (TILES % 2 == 0 || tile + 1 < TILES) {
      Words4 words{};
      if (exists<2>(tile / 2 * 2)) words = load_shared<Words4>(place<2>(tile / 2 * 2, tile % 2));
      a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    } else {
      Words2 words[2] = {};
      MVIT_UNROLL
      for (int i = 0; i < 2; ++i)
        if (exists<1>(tile)) words[i] = load_shared<Words2>(place<1>(tile, i));
      a[0] = words[0].x, a[1] = words[0].y, a[2] = words[1].x, a[3] = words[1].y;
    }
  }
};

// Writes a product's result, 2 · TILES tiles of eight columns, as rows of `channels` columns; rows from valid_rows on
// are not written.
template <typename T, int TILES>
MVIT_DEVICE void store_rows(char* to, int channels, int64_t valid_rows, const float (&sums)[TILES][4]) {
  for_parts<TILES / 2>([&](auto tile, auto count) {
    const int column = lane_column<count()>(tile);
    if (column >= channels) return;
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = lane_index() / 4 + 8 * half;
      uint32_t pairs[4];
      MVIT_UNROLL
      for (int i = 0; i < 2 * count(); ++i)
        pairs[i] = pack<T>(sums[2 * tile + i][2 * half], sums[2 * tile + i][2 * half + 1]);
      if (row >= valid_rows) continue;
      char* const place = to + 2 * (static_cast<int64_t>(row) * channels + column);
      if constexpr (count() == 2)
        store_global(place, Words4{pairs[0], pairs[1], pairs[2], pairs[3]});
      else
        store_global(place, Words2{pairs[0], pairs[1]});
    }
  });
}

// The other matrix. Column g of tile n of a product's result, n = 0 to 3 (0 and 1 at the end), is its row lane_row() + 2n
// of 32 (16), so that a lane's results are adjacent columns.
template <int COUNT>
MVIT_DEVICE int lane_row() {
  return lane_index() / 8 * (4 * COUNT) + lane_index() / 4 % 2;
}

// In shared memory it lies in lines of 128 bytes, 32 columns of two adjacent rows each, and lines of 64 where 16 columns
// are left. Eight lanes that read 16 bytes each then read one line, whatever the width.
MVIT_DEVICE Shared in_lines(int row, int unit, int units) {  // the place of 16 bytes of a row of `units` such
  const int group = unit / 4 * 4, left = units - group < 4 ? units - group : 4;
  return row / 2 * line_pair_bytes(units) + 16 * (2 * group + row % 2 * left + unit - group);
}
// The place of this lane's part of row lane_row<ROW_COUNT>() of a matrix of 16 · `tiles` columns, in COUNT tiles from
// `tile` on. Two rows further down is line_pair_bytes(2 · tiles) further on.
template <int ROW_COUNT, int COUNT>
MVIT_DEVICE Shared lane_place(int tile, int tiles) {
  return in_lines(lane_row<ROW_COUNT>(), 2 * tile, 2 * tiles) + lane_index() % 4 * (8 * COUNT);
}

}  // namespace mvit
