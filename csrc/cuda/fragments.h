// SPDX-License-Identifier: Apache-2.0
// Operands of tensor-core products in the order in which lanes hold them.
//
// A *fragment* is what 32 lanes hold of a 16 × 8 block of b, two registers each (of 8 × 8, one). Fragments that are read
// together lie in pairs, so that a lane reads 16 bytes; an odd one comes last.
#pragma once

#include <cmath>

#include "simt.h"

namespace mvit {

struct alignas(8) Floats2 {
  float x, y;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};

constexpr int kFragmentBytes = 256;      // of 16 × 8
constexpr int kHalfFragmentBytes = 128;  // of 8 × 8

template <int COUNT>
MVIT_DEVICE void load_fragments(uint32_t (&b)[COUNT][2], Shared at) {
  const int lane = lane_index();
  MVIT_UNROLL
  for (int i = 0; i + 1 < COUNT; i += 2) {
    const auto w = load_shared<Words4>(at + i * kFragmentBytes + lane * 16);
    b[i][0] = w.x, b[i][1] = w.y, b[i + 1][0] = w.z, b[i + 1][1] = w.w;
  }
  if constexpr (COUNT % 2 == 1) {
    const auto w = load_shared<Words2>(at + (COUNT - 1) * kFragmentBytes + lane * 8);
    b[COUNT - 1][0] = w.x, b[COUNT - 1][1] = w.y;
  }
}

// What a tile of 16 rows × 8 columns of a product becomes as a part of an operand: [0] rows 0 to 7, [1] rows 8 to 15. Two
// tiles side by side are the a of one m16n8k16 product, a tile alone that of an m16n8k8.
using Tile = uint32_t[2];

template <typename T>
MVIT_DEVICE void pack_tile(Tile& tile, const float (&d)[4]) {
  tile[0] = pack<T>(d[0], d[1]);
  tile[1] = pack<T>(d[2], d[3]);
}

template <typename T>
MVIT_DEVICE void multiply(float (&d)[4], const Tile& left, const Tile& right, const uint32_t (&b)[2]) {
  const uint32_t a[4] = {left[0], left[1], right[0], right[1]};
  mma<T>(d, a, b);
}
template <typename T>
MVIT_DEVICE void multiply(float (&d)[4], const Tile& tile, uint32_t b) {
  const uint32_t half[1] = {b};
  mma<T>(d, tile, half);
}

// sum / count, rounded right. By 1 / count alone the mean of equal values is not that value in 16 of the widths up to 512,
// 120 and 240 among them, and 1 / σ makes 316 times as much of the difference. (Not for squares: of infinity it is NaN.)
MVIT_DEVICE float mean_of(float sum, float count) {
  const float one_of = 1.0f / count, mean = sum * one_of;
  return fmaf(fmaf(-mean, count, sum), one_of, mean);
}

// The sum, and the largest, of what the four lanes hold that share a row of a product.
MVIT_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
MVIT_DEVICE float max_of_row(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

}  // namespace mvit
