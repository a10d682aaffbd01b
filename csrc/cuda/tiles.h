// SPDX-License-Identifier: Apache-2.0
// Operand tiles of 16 rows in shared memory, loaded with ldmatrix, and tensor-core products on them.
#pragma once

#include "fragments.h"
#include "shared_rows.h"

namespace mvit {

// 16 rows × 8 · GROUPS columns as 8 × 8 matrices, ordered so that each product finds its operands in adjacent
// registers. Rows16, [group of columns][half of the rows], is the left operand of a product over the columns or, loaded
// transposed, the right operand of a product over the rows. RightRows16, [half][group], is the right operand of a
// product over the columns.
template <int GROUPS>
using Rows16 = uint32_t[GROUPS][2];
template <int GROUPS>
using RightRows16 = uint32_t[2][GROUPS];

// `at`: address of the tile's first element; `stride`: bytes from row to row.
template <bool TRANSPOSED, int GROUPS>
MVIT_DEVICE void load_tile(Rows16<GROUPS>& tile, Shared at, Shared stride) {
  const int lane = lane_index();
  const Shared row = at + (lane % 16) * stride;
  MVIT_UNROLL
  for (int group = 0; group + 1 < GROUPS; group += 2) {
    uint32_t r[4];
    const Shared place = row + 16 * (group + lane / 16);
    if constexpr (TRANSPOSED)
      load_matrices_transposed(r, place);
    else
      load_matrices(r, place);
    tile[group][0] = r[0], tile[group][1] = r[1], tile[group + 1][0] = r[2], tile[group + 1][1] = r[3];
  }
  if constexpr (GROUPS % 2 == 1) {
    if constexpr (TRANSPOSED)
      load_matrices_transposed(tile[GROUPS - 1], row + 16 * (GROUPS - 1));
    else
      load_matrices(tile[GROUPS - 1], row + 16 * (GROUPS - 1));
  }
}

template <int GROUPS>
MVIT_DEVICE void load_right(RightRows16<GROUPS>& tile, Shared at, Shared stride) {
  const int lane = lane_index();
  const Shared row = at + (lane % 8 + lane / 16 * 8) * stride + 16 * (lane / 8 % 2);
  MVIT_UNROLL
  for (int group = 0; group + 1 < GROUPS; group += 2) {
    uint32_t r[4];
    load_matrices(r, row + 16 * group);
    tile[0][group] = r[0], tile[0][group + 1] = r[1], tile[1][group] = r[2], tile[1][group + 1] = r[3];
  }
  if constexpr (GROUPS % 2 == 1) {
    uint32_t r[2];
    load_matrices(r, at + lane % 16 * stride + 16 * (GROUPS - 1));
    tile[0][GROUPS - 1] = r[0], tile[1][GROUPS - 1] = r[1];
  }
}

// sums (16 × 16, as two halves of 8 columns) += left · rightᵀ, over the columns of both.
template <typename T, int GROUPS>
MVIT_DEVICE void multiply(float (&sums)[2][4], const Rows16<GROUPS>& left, const RightRows16<GROUPS>& right) {
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    MVIT_UNROLL
    for (int g = 0; g + 1 < GROUPS; g += 2) {
      const uint32_t a[4] = {left[g][0], left[g][1], left[g + 1][0], left[g + 1][1]};
      const uint32_t b[2] = {right[half][g], right[half][g + 1]};
      mma<T>(sums[half], a, b);
    }
    if constexpr (GROUPS % 2 == 1) {
      const uint32_t a[2] = {left[GROUPS - 1][0], left[GROUPS - 1][1]}, b[1] = {right[half][GROUPS - 1]};
      mma<T>(sums[half], a, b);
    }
  }
}

// sums (16 × 8 · GROUPS) += left (16 × 16) · right (16 × 8 · GROUPS, loaded transposed).
template <typename T, int GROUPS>
MVIT_DEVICE void accumulate(float (&sums)[GROUPS][4], const uint32_t (&left)[4], const Rows16<GROUPS>& right) {
  MVIT_UNROLL
  for (int group = 0; group < GROUPS; ++group) mma<T>(sums[group], left, right[group]);
}

// Packs the result of a product as the left operand of the next one.
template <typename T>
MVIT_DEVICE void pack_tile(uint32_t (&packed)[4], const float (&values)[2][4]) {
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    packed[2 * half] = pack<T>(values[half][0], values[half][1]);
    packed[2 * half + 1] = pack<T>(values[half][2], values[half][3]);
  }
}

}  // namespace mvit
