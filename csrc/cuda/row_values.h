// SPDX-License-Identifier: Apache-2.0
// Device functions shared by the row-wise operators (layer_norm_linear, linear_residual, layer_norm_mlp): eight adjacent
// 16-bit values of a row as floats, and SiLU. Widths are multiples of 8, so rows are read 16 bytes at a time.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace mvit {

template <typename T>
MVIT_DEVICE void unpack_eight(float (&values)[8], const Words4& words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  MVIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_low<T>(pairs[i]);
    values[2 * i + 1] = unpack_high<T>(pairs[i]);
  }
}

// x · sigmoid(x). bfloat16 uses tanh.approx, whose error of 2^-11 is an eighth of the rounding error.
template <typename T>
MVIT_DEVICE float silu(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return fmaf(0.5f * x, tanh_approximate(0.5f * x), 0.5f * x);
  } else {
    return x * reciprocal_approximate(1 + exp2_approximate(-1.44269504f * x));
  }
}

}  // namespace mvit
