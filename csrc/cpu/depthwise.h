// SPDX-License-Identifier: Apache-2.0
// The depthwise 3×3 convolution of inverted_residual_kernel.cpp: for each arithmetic policy P, the layout of one row of
// one channel block (one vector of channels, [position][channel]), and the filter over three such rows. Every row has
// zeros on both sides, so no pixel is a special case at the left or right edge.
#pragma once

#include "panels.h"

namespace mvit {
namespace MVIT_ISA {

template <typename P>
struct Depthwise;

// float: one vector of channels per position.
template <typename T>
struct Depthwise<Plain<T>> {
  // Position of column 0 in a row.
  static MVIT_INLINE int64_t left(int64_t dilation) { return dilation; }

  template <int R, int V>
  static MVIT_INLINE void store_expanded(T* row, int64_t block_size, int64_t position, const Vec<T> (&tile)[R][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) store(row + v * block_size + (position + r) * Vec<T>::size, tile[r][v]);
  }

  // Packs weights [channel][tap] as [tap][channel].
  static MVIT_INLINE void pack(T* packed, const T* weight, int64_t channels) {
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t i = 0; i < Vec<T>::size; ++i)
        packed[tap * Vec<T>::size + i] = i < channels ? weight[i * 9 + tap] : 0;
  }

  // The weights of a channel block in registers. kStride and kDilation are compile-time values; 0 and 0 mean that both
  // are read at run time.
  template <int kStride, int kDilation>
  struct Filter {
    Vec<T> weight[9];
    int64_t stride, dilation;

    MVIT_INLINE Filter(const T* packed, int64_t any_stride, int64_t any_dilation)
        : stride(kStride > 0 ? kStride : any_stride), dilation(kDilation > 0 ? kDilation : any_dilation) {
#pragma GCC unroll 16
      for (int tap = 0; tap < 9; ++tap) weight[tap] = load(packed + tap * Vec<T>::size);
    }

    // sum[n] += the filter at output pixel `pixel + n`; the row pointers point at the start of their channel block.
    template <int N>
    MVIT_INLINE void add(Vec<T> (&sum)[N], const T* const (&row)[3], int64_t pixel) const {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const T* first = row[i] + pixel * stride * Vec<T>::size;
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j)
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            sum[n] = fma(load(first + (n * stride + j * dilation) * Vec<T>::size), weight[3 * i + j], sum[n]);
      }
    }
  };
};

#if defined(MVIT_BF16_PAIRS)
// bfloat16: pairs of adjacent positions, with column 0 in the lower half of its pair. The product of a pair of pixels
// and a pair of weights covers two taps, so three taps are two products: over the pixels (2i - 1 | 2i, 2i + 1) or
// (2i, 2i + 1 | 2i + 2). Six products replace nine, and nothing is converted. The fourth pixel is masked to zero: even
// with weight 0, a NaN or infinity there would give NaN.
template <>
struct Depthwise<Bf16Pairs> {
  static MVIT_INLINE int64_t left(int64_t dilation) { return round_up(dilation, 2); }

  template <int R, int V>
  static MVIT_INLINE void store_expanded(bf16x2* row, int64_t block_size, int64_t position,
                                         const Vec<float> (&tile)[R][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; r += 2)
        store_first(row + v * block_size + (position + r) / 2 * 16, tile[r][v],
                    r + 1 < R ? tile[r + 1][v] : Vec<float>(0.0f), 16);
  }

  static MVIT_INLINE void pack(bf16x2* packed, const bfloat16* weight, int64_t channels) {
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t i = 0; i < 16; ++i) packed[tap * 16 + i].bits = i < channels ? weight[i * 9 + tap].bits : 0;
  }

  static MVIT_INLINE NativeBits load_pairs(const bf16x2* p) {
    NativeBits pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }

  static constexpr __mmask32 kFirst = 0x55555555, kSecond = 0xaaaaaaaa;  // lower and upper half of each pair
  static MVIT_INLINE NativeBits load_one_of_pairs(const bf16x2* p, __mmask32 which) {
    look_at(p, 16);
    return NativeBits(_mm512_maskz_loadu_epi16(which, p));
  }

  static MVIT_INLINE Vec<float> add_product(Vec<float> sum, NativeBits a, NativeBits b) {
    return Vec<float>(_mm512_dpbf16_ps(sum.native, (__m512bh)a, (__m512bh)b));
  }

  template <int kStride, int kDilation>
  struct Filter {
    struct Row {
      NativeBits second_0, first_0_second_1, first_1_second_2, first_2;
    };
    Row row_weights[3];

    MVIT_INLINE Filter(const bf16x2* packed, int64_t, int64_t) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const NativeBits w0 = load_pairs(packed + (3 * i) * 16), w1 = load_pairs(packed + (3 * i + 1) * 16),
                         w2 = load_pairs(packed + (3 * i + 2) * 16);
        row_weights[i] = {w0 << 16, w0 | w1 << 16, w1 | w2 << 16, w2};
      }
    }

    template <int N>
    MVIT_INLINE void add(Vec<float> (&sum)[N], const bf16x2* const (&row)[3], int64_t pixel) const {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const Row& w = row_weights[i];
        const bf16x2* first = row[i] + pixel * kStride / 2 * 16;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const bf16x2* pairs = first + (n * kStride + 1) / 2 * 16;
          const bool even = n * kStride % 2 == 0;
          sum[n] = even ? add_product(sum[n], load_one_of_pairs(pairs, kSecond), w.second_0)
                        : add_product(sum[n], load_pairs(pairs), w.first_0_second_1);
          sum[n] = even ? add_product(sum[n], load_pairs(pairs + 16), w.first_1_second_2)
                        : add_product(sum[n], load_one_of_pairs(pairs + 16, kFirst), w.first_2);
        }
      }
    }
  };
};

template <>
struct Depthwise<Bf16Pairs>::Filter<0, 0> {  // any stride and dilation: one tap at a time
  NativeBits weight[9];
  int64_t stride, dilation;

  MVIT_INLINE Filter(const bf16x2* packed, int64_t any_stride, int64_t any_dilation)
      : stride(any_stride), dilation(any_dilation) {
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load_pairs(packed + tap * 16);
  }

  template <int N>
  MVIT_INLINE void add(Vec<float> (&sum)[N], const bf16x2* const (&row)[3], int64_t pixel) const {
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        for (int n = 0; n < N; ++n) {
          const int64_t position = (pixel + n) * stride + dilation % 2 + j * dilation;
          const NativeBits pairs = load_pairs(row[i] + position / 2 * 16);
          sum[n] = add_product(sum[n], position % 2 == 0 ? pairs & 0xffff : pairs >> 16, weight[3 * i + j]);
        }
  }
};
#endif

}  // namespace MVIT_ISA
}  // namespace mvit
