// SPDX-License-Identifier: Apache-2.0
// The depthwise 3×3 convolution between the two products of tile_inverted_residual.h: float32 rows in, SiLU, bfloat16
// pixels out. Vector instructions bind it: nine multiply-adds, nine operations and a reciprocal for SiLU, half a
// conversion. So two pixels are converted by one instruction (0.27 ns a pixel instead of 0.45), vectors that several
// pixels read are loaded once, and eight pixels at a time keep both ports busy.
#pragma once

#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// GCC would rather make a memory operand of each use.
MVIT_INLINE Vec<float> in_register(Vec<float> v) {
  asm("" : "+v"(v.native));
  return v;
}

// One vector of channels of the convolution, its weights in registers. Rows are [position][channel]; kStride and
// kDilation are compile-time values, or 0 and 0 for both at run time.
template <int kStride, int kDilation>
struct TileDepthwise {
  static constexpr int64_t size = Vec<float>::size;
  Vec<float> weight[9], bias;
  const int64_t stride, dilation;

  // weights: [tap][channel]
  MVIT_INLINE TileDepthwise(const float* weights, const float* biases, int64_t any_stride, int64_t any_dilation)
      : bias(load(biases)),
        stride(kStride > 0 ? kStride : any_stride),
        dilation(kDilation > 0 ? kDilation : any_dilation) {
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load(weights + tap * size);
  }

  // to[i · to_ld] for `count` pixels, of which the first one's left taps are at row[0..2]. The last pixels are computed
  // together with some before them, if there are any, so that they, too, are four or eight.
  MVIT_INLINE void run(const float* const (&row)[3], int64_t count, bfloat16* to, int64_t to_ld) const {
    int64_t i = 0;
    for (; count - i > 4 && count >= 8; i += 8) pixels<8>(row, smaller(i, count - 8), to, to_ld);
    for (; i < count && count >= 4; i += 4) pixels<4>(row, smaller(i, count - 4), to, to_ld);
    for (; i < count; ++i) pixels<1>(row, i, to, to_ld);
  }

 private:
  template <int N>
  MVIT_INLINE void pixels(const float* const (&row)[3], int64_t pixel, bfloat16* to, int64_t to_ld) const {
    Vec<float> sum[N];
#pragma GCC unroll 8
    for (auto& s : sum) s = bias;
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const float* const first = row[i] + pixel * stride * size;
      if constexpr (kDilation == 1) {
#pragma GCC unroll 32
        for (int position = 0; position < (N - 1) * kStride + 3; ++position) {
          const Vec<float> value = in_register(load(first + position * size));
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            if (const int tap = position - n * kStride; tap >= 0 && tap < 3)
              sum[n] = fma(value, weight[3 * i + tap], sum[n]);
        }
      } else {
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap)
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            sum[n] = fma(load(first + (n * stride + tap * dilation) * size), weight[3 * i + tap], sum[n]);
      }
    }
    bfloat16* at = to + pixel * to_ld;
    if constexpr (N == 1) {
      store_first(at, silu_for<Bf16Pairs>(sum[0]), size);
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < N; n += 2, at += 2 * to_ld) {
        using Bits = long long __attribute__((vector_size(64)));
        const Vec<float> lower = silu_for<Bf16Pairs>(sum[n]), upper = silu_for<Bf16Pairs>(sum[n + 1]);
        const auto two = (Bits)_mm512_cvtne2ps_pbh(upper.native, lower.native);
        const auto first = __builtin_shufflevector(two, two, 0, 1, 2, 3);
        const auto second = __builtin_shufflevector(two, two, 4, 5, 6, 7);
        std::memcpy(at, &first, sizeof first);
        std::memcpy(at + to_ld, &second, sizeof second);
      }
    }
  }
};

}  // namespace MVIT_ISA
}  // namespace mvit
