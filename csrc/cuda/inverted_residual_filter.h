// SPDX-License-Identifier: Apache-2.0
// Four channels of a pixel in the registers of the lane that filters them, in float32 or in float16: what the depthwise
// convolution of inverted_residual adds up, and the SiLU after it.
#pragma once

#include <type_traits>

#include "fragments.h"

namespace mvit {

// In float32, of values, taps and operands of T.
template <typename T>
struct FloatChannels {
  using Element = T;  // of the wide buffer, the taps and the left operand of the projection
  float of[4];

  static MVIT_DEVICE FloatChannels start(const Floats4& bias) { return {bias.x, bias.y, bias.z, bias.w}; }
  static MVIT_DEVICE FloatChannels unpacked(const Words2& words) {
    return {unpack_low<T>(words.x), unpack_high<T>(words.x), unpack_low<T>(words.y), unpack_high<T>(words.y)};
  }
  MVIT_DEVICE void add_product(const FloatChannels& value, const FloatChannels& tap) {
    MVIT_UNROLL
    for (int i = 0; i < 4; ++i) of[i] = fmaf(value.of[i], tap.of[i], of[i]);
  }
  // SiLU of twice the first (0) or second (1) two channels, packed.
  MVIT_DEVICE uint32_t silu_of_double_pair(int pair) const {
    return pack<T>(silu_of_double<T>(of[2 * pair]), silu_of_double<T>(of[2 * pair + 1]));
  }
};

// In float16, two channels an instruction, each product and sum rounded once. There is no conversion, neither of values
// nor of taps nor of what comes out. Sums and SiLU are bounded by 65504, beyond which they are infinite.
struct HalfChannels {
  using Element = Half;
  uint32_t of[2];

  static MVIT_DEVICE HalfChannels start(const Floats4& bias) {
    return {pack<Half>(bias.x, bias.y), pack<Half>(bias.z, bias.w)};
  }
  static MVIT_DEVICE HalfChannels unpacked(const Words2& words) { return {words.x, words.y}; }
  MVIT_DEVICE void add_product(const HalfChannels& value, const HalfChannels& tap) {
    MVIT_UNROLL
    for (int i = 0; i < 2; ++i) of[i] = fma_halves(value.of[i], tap.of[i], of[i]);
  }
  MVIT_DEVICE uint32_t silu_of_double_pair(int pair) const {
    return fma_halves(of[pair], tanh_halves(of[pair]), of[pair]);
  }
};

}  // namespace mvit
