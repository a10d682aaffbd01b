// SPDX-License-Identifier: Apache-2.0
// B fragments of tensor-core products in shared memory, stored in the order in which lanes hold them; and small helpers
// on accumulators.
//
// A fragment is what the 32 lanes of a warp hold of a 16 × 8 block of b: two registers each (one for 8 × 8). Fragments
// that are read together are stored in pairs, so that each lane reads 16 bytes; an odd fragment comes last.
#pragma once

#include <cmath>
#include <type_traits>

#include "simt.h"

namespace mvit {

struct alignas(8) Floats2 {
  float x, y;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};

constexpr int kFragmentBytes = 256;      // 16 × 8 elements
constexpr int kHalfFragmentBytes = 128;  // 8 × 8 elements

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

// An accumulator tile of 16 rows × 8 columns packed as part of an operand: [0] holds rows 0 to 7, [1] rows 8 to 15. Two
// adjacent tiles are the `a` operand of one m16n8k16 product, a single tile that of an m16n8k8.
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

// silu(2u) = u · (1 + tanh u), which takes a single special-function instruction. tanh.approx is accurate to 11 bits,
// which is enough for bfloat16 but not for float16.
template <typename T>
MVIT_DEVICE float silu_of_double(float u) {
  if constexpr (std::is_same_v<T, Half>)
    return 2 * u * reciprocal_approximate(1 + exp2_approximate(-2.8853900817779268f * u));  // 2 log2 e
  else
    return fmaf(u, tanh_approximate(u), u);
}

// sum / count, correctly rounded (one Newton step). With sum · (1 / count) alone, the mean of equal 16-bit values
// differs from that value for 16 of the multiples of 8 up to 512, among them 120 and 240 (for 158 of all widths up to
// 512), and 1 / σ amplifies the difference by a factor of 316. Not for sums of squares: infinity would become NaN.
MVIT_DEVICE float mean_of(float sum, float count) {
  const float one_of = 1.0f / count, mean = sum * one_of;
  return fmaf(fmaf(-mean, count, sum), one_of, mean);
}

// Sum and maximum over the four lanes that hold one row of an accumulator tile.
MVIT_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
MVIT_DEVICE float max_of_row(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

}  // namespace mvit
