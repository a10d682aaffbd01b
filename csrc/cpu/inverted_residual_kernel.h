// SPDX-License-Identifier: Apache-2.0
// MobileNetV2's block in one pass, the wide tensor never in memory: expanded rows live in a ring of as many as the
// depthwise convolution sees at once, which stays in L2; its output in a buffer of a few pixels, which stays in L1 and
// is projected at once.
//
// A row of the ring is [block of one vector of hidden channels][position][channel]: a block's pixels are one stream.
// Positions are columns with zeros on either side, so that the depthwise convolution has no left or right edge; above and
// below the map it reads a row of zeros.
#pragma once

#include "inverted_residual.h"
#include "panels.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int64_t kBufferPixels = 16;

// How the ring is laid out for the depthwise convolution, and what it makes of it. For float: a vector of channels for
// each position, nine weights.
template <typename P>
struct Depthwise {
  using T = typename P::Value;
  static constexpr int64_t kWeights = 9;  // vectors, for one block of channels
  static constexpr int kPixels = 4;       // at once

  static MVIT_INLINE int64_t left(int64_t dilation) { return dilation; }

  template <int R, int V>
  static MVIT_INLINE void store_expanded(T* row, int64_t block_size, int64_t position, const Vec<T> (&tile)[R][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) store(row + v * block_size + (position + r) * Vec<T>::size, tile[r][v]);
  }

  static MVIT_INLINE void pack(T* packed, const T* weight, int64_t channels) {
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t i = 0; i < Vec<T>::size; ++i) packed[tap * Vec<T>::size + i] = i < channels ? weight[i * 9 + tap] : 0;
  }

  // Stride and dilation as numbers, or 0 and 0 for any.
  template <int kStride, int kDilation>
  struct Filter {
    Vec<T> weight[9];
    int64_t stride, dilation;

    MVIT_INLINE Filter(const T* packed, int64_t any_stride, int64_t any_dilation)
        : stride(kStride > 0 ? kStride : any_stride), dilation(kDilation > 0 ? kDilation : any_dilation) {
#pragma GCC unroll 16
      for (int tap = 0; tap < 9; ++tap) weight[tap] = load(packed + tap * Vec<T>::size);
    }

    // sum[n] += the filter over output pixel `pixel + n`; rows begin at their block of channels.
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
// For bfloat16: pairs of adjacent positions, column 0 in the lower half of one. A pair's product with a pair of weights
// is two taps at once, and three taps are two products: of the pixels (2i - 1 | 2i, 2i + 1) or (2i, 2i + 1 | 2i + 2).
template <>
struct Depthwise<Bf16Pairs> {
  static constexpr int64_t kWeights = 9;
  static constexpr int kPixels = 4;

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
          sum[n] = add_product(sum[n], load_pairs(pairs), even ? w.second_0 : w.first_0_second_1);
          sum[n] = add_product(sum[n], load_pairs(pairs + 16), even ? w.first_1_second_2 : w.first_2);
        }
      }
    }
  };
};

template <>
struct Depthwise<Bf16Pairs>::Filter<0, 0> {  // tap by tap
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

template <typename P>
struct PackedInvertedResidual {
  using Operand = typename P::Operand;
  int64_t hidden;    // in whole vectors
  Operand* expand;   // panels of in_channels × hidden
  Operand* depthwise;  // [block of one vector][weights of it]
  Operand* project;    // panels of hidden × out_channels
  float *expand_bias, *depthwise_bias, *project_bias;  // in whole vectors
  std::size_t end;

  PackedInvertedResidual(const InvertedResidualShape& shape, const void* memory) {
    constexpr int64_t size = Vec<float>::size;
    hidden = round_up(shape.hidden, size);
    expand = static_cast<Operand*>(const_cast<void*>(memory));
    depthwise = expand + panels_size<P>(shape.hidden, shape.in_channels);
    project = depthwise + hidden * Depthwise<P>::kWeights;
    expand_bias = reinterpret_cast<float*>(project + panels_size<P>(shape.out_channels, shape.hidden));
    depthwise_bias = expand_bias + hidden;
    project_bias = depthwise_bias + hidden;
    end = reinterpret_cast<std::size_t>(project_bias + round_up(shape.out_channels, size));
  }
};

template <typename P>
std::size_t packed_inverted_residual_bytes(const InvertedResidualShape& shape) {
  return PackedInvertedResidual<P>(shape, nullptr).end;
}

template <typename P>
void pack_inverted_residual(const InvertedResidualShape& shape, const InvertedResidualWeights& weights, void* memory) {
  using Weight = typename P::Weight;
  constexpr int64_t size = Vec<float>::size;
  const PackedInvertedResidual<P> packed(shape, memory);
  const auto* expand = static_cast<const Weight*>(weights.expand);
  const auto* depthwise = static_cast<const Weight*>(weights.depthwise);
  const auto* project = static_cast<const Weight*>(weights.project);
  pack_panels<P>(packed.expand, shape.hidden, shape.in_channels,
                 [&](int64_t column, int64_t k) { return expand[column * shape.in_channels + k]; });
  for (int64_t c = 0; c < shape.hidden; c += size)
    Depthwise<P>::pack(packed.depthwise + c * Depthwise<P>::kWeights, depthwise + c * 9, smaller(size, shape.hidden - c));
  pack_panels<P>(packed.project, shape.out_channels, shape.hidden,
                 [&](int64_t column, int64_t k) { return project[column * shape.hidden + k]; });
  pack_bias(packed.expand_bias, weights.expand_bias, shape.hidden);
  pack_bias(packed.depthwise_bias, weights.depthwise_bias, shape.hidden);
  pack_bias(packed.project_bias, weights.project_bias, shape.out_channels);
}

template <typename P, typename E>
struct InvertedResidualScratch {
  using Operand = typename P::Operand;
  int64_t left;        // the position of column 0
  int64_t ring_rows;
  int64_t block_size;  // Operands of one block of channels in a row
  int64_t row_size;    // of a row
  int64_t row_ld;      // elements from one pixel to the next in `row`
  int64_t buffer_ld;   // and in `buffer`
  Operand* ring;       // [ring_rows][block][position][channel]
  Operand* zeros;      // [position][channel], for every block of a row that is not there
  typename P::Weight* buffer;  // [kBufferPixels][hidden]
  typename P::Weight* row;     // an input row in the arithmetic's type, where it comes in another
  std::size_t end;

  InvertedResidualScratch(const InvertedResidualShape& shape, void* memory) {
    constexpr int64_t size = Vec<float>::size;
    const int64_t hidden = round_up(shape.hidden, size);
    left = Depthwise<P>::left(shape.dilation);
    ring_rows = 2 * shape.dilation + 1;
    block_size = P::rows(left + shape.in_width + shape.dilation) * size;
    row_size = hidden / size * block_size;
    row_ld = sizeof(E) == sizeof(typename P::Weight) ? 0 : round_up(shape.in_channels, size);
    buffer_ld = hidden;
    ring = static_cast<Operand*>(memory);
    zeros = ring + ring_rows * row_size;
    buffer = reinterpret_cast<typename P::Weight*>(zeros + block_size);
    row = buffer + kBufferPixels * buffer_ld;
    end = reinterpret_cast<std::size_t>(row + shape.in_width * row_ld);
  }
};

template <typename P, typename E>
std::size_t inverted_residual_scratch_bytes(const InvertedResidualShape& shape) {
  return InvertedResidualScratch<P, E>(shape, nullptr).end;
}

template <typename P, typename E>
struct InvertedResidual {
  using Weight = typename P::Weight;
  static constexpr int64_t size = Vec<float>::size;
  const InvertedResidualArgs& args;
  const InvertedResidualShape& shape;
  const PackedInvertedResidual<P> packed;
  const InvertedResidualScratch<P, E> scratch;
  const E* in;
  E* out;

  InvertedResidual(const InvertedResidualArgs& arguments, int64_t image, void* memory)
      : args(arguments),
        shape(arguments.shape),
        packed(arguments.shape, arguments.packed),
        scratch(arguments.shape, memory),
        in(static_cast<const E*>(args.in.data) + image * args.in.image_stride),
        out(static_cast<E*>(args.out.data) + image * args.out.image_stride) {}

  typename P::Operand* ring_row(int64_t y) const { return scratch.ring + y % scratch.ring_rows * scratch.row_size; }

  // All of the ring, for its columns on either side.
  void clear_ring() const {
    std::memset(static_cast<void*>(scratch.ring), 0,
                reinterpret_cast<char*>(scratch.buffer) - reinterpret_cast<char*>(scratch.ring));
  }

  void expand(int64_t y) const {
    const Weight* a;
    int64_t lda;
    const E* row = in + y * args.in.row_stride;
    if constexpr (sizeof(E) == sizeof(Weight)) {
      a = row;
      lda = args.in.column_stride;
    } else {
      a = scratch.row;
      lda = scratch.row_ld;
      for (int64_t x = 0; x < shape.in_width; ++x)
        for (int64_t c = 0; c < shape.in_channels; c += size)
          store(scratch.row + x * lda + c, load_first(row + x * args.in.column_stride + c,
                                                      static_cast<int>(smaller(size, shape.in_channels - c))));
    }
    const int64_t depth = P::rows(shape.in_channels);
    in_lane_blocks<float>(0, packed.hidden, [&](auto vectors, int64_t column, int64_t) {
      constexpr int V = decltype(vectors)::value;
      const auto* weights = packed.expand + column * depth;
      auto* blocks = ring_row(y) + column / size * scratch.block_size;
      in_steps<kTileRows>(shape.in_width, [&](auto pixels, int64_t x) {
        constexpr int R = decltype(pixels)::value;
        Vec<float> tile[R][V];
        begin_with_bias(tile, packed.expand_bias + column);
        multiply_add<R, V, Operand::row_major>(tile, a + x * lda, lda, weights, V * size, depth);
        map_tile(tile, [](Vec<float> value, int, int) { return silu_for<P>(value); });
        Depthwise<P>::store_expanded(blocks, scratch.block_size, scratch.left + x, tile);
      });
    });
  }

  // buffer[i] = silu(depthwise) of output pixels (y, x + i), i < count
  template <int kStride, int kDilation>
  void filter(int64_t y, int64_t x, int64_t count) const {
    const typename P::Operand* row[3];
    int64_t step[3];
    for (int i = 0; i < 3; ++i) {
      const int64_t at = y * shape.stride + (i - 1) * shape.dilation;
      const bool inside = at >= 0 && at < shape.in_height;
      row[i] = inside ? ring_row(at) : scratch.zeros;
      step[i] = inside ? scratch.block_size : 0;
    }
    constexpr int N = Depthwise<P>::kPixels;
    for (int64_t c = 0; c < packed.hidden; c += size) {
      const typename Depthwise<P>::template Filter<kStride, kDilation> weights(
          packed.depthwise + c * Depthwise<P>::kWeights, shape.stride, shape.dilation);
      const Vec<float> bias = load(packed.depthwise_bias + c);
      const auto pixels = [&](auto n, int64_t i) {
        Vec<float> sum[decltype(n)::value];
        for (auto& s : sum) s = bias;
        weights.add(sum, row, x + i);
        for (int p = 0; p < decltype(n)::value; ++p)
          store_first(scratch.buffer + (i + p) * scratch.buffer_ld + c, silu_for<P>(sum[p]), size);
      };
      int64_t i = 0;
      for (; i + N <= count; i += N) pixels(std::integral_constant<int, N>{}, i);
      for (; i + 2 <= count; i += 2) pixels(std::integral_constant<int, 2>{}, i);  // never from an odd pixel on
      if (i < count) pixels(std::integral_constant<int, 1>{}, i);
      for (int j = 0; j < 3; ++j) row[j] += step[j];
    }
  }

  void project(int64_t y, int64_t x, int64_t count) const {
    E* to = out + y * args.out.row_stride + x * args.out.column_stride;
    const E* from = in + y * args.in.row_stride + x * args.in.column_stride;
    const int64_t depth = P::rows(shape.hidden);
    in_lane_blocks<float>(0, shape.out_channels, [&](auto vectors, int64_t column, int64_t present) {
      constexpr int V = decltype(vectors)::value;
      in_steps<kTileRows>(count, [&](auto pixels, int64_t i) {
        constexpr int R = decltype(pixels)::value;
        Vec<float> tile[R][V];
        begin_with_bias(tile, packed.project_bias + column);
        multiply_add<R, V, Operand::row_major>(tile, scratch.buffer + i * scratch.buffer_ld, scratch.buffer_ld,
                                               packed.project + column * depth, V * size, depth);
        if (shape.residual)
          map_tile(tile, [&](Vec<float> value, int r, int v) {
            return value + load_first(from + (i + r) * args.in.column_stride + column + v * size,
                                      static_cast<int>(smaller(size, present - v * size)));
          });
        store_pixels(tile, present, [&](int r) { return to + (i + r) * args.out.column_stride + column; });
      });
    });
  }

  void run(int64_t begin, int64_t end) const {
    clear_ring();
    const int64_t first = begin * shape.stride - shape.dilation;
    int64_t next = first > 0 ? first : 0;
    for (int64_t y = begin; y < end; ++y) {
      const int64_t last = smaller(shape.in_height - 1, y * shape.stride + shape.dilation);
      for (; next <= last; ++next) expand(next);
      for (int64_t x = 0; x < shape.out_width(); x += kBufferPixels) {
        const int64_t count = smaller(kBufferPixels, shape.out_width() - x);
        if (shape.dilation == 1 && shape.stride == 1)
          filter<1, 1>(y, x, count);
        else if (shape.dilation == 1)
          filter<2, 1>(y, x, count);
        else
          filter<0, 0>(y, x, count);
        project(y, x, count);
      }
    }
  }
};

template <typename P, typename E>
void inverted_residual(const InvertedResidualArgs& args, int64_t image, int64_t begin, int64_t end, void* scratch) {
  InvertedResidual<P, E>(args, image, scratch).run(begin, end);
}

}  // namespace MVIT_ISA

#define MVIT_INVERTED_RESIDUAL_KERNELS(P, E)                                                         \
  {                                                                                                  \
    MVIT_ISA::packed_inverted_residual_bytes<MVIT_ISA::P>, MVIT_ISA::pack_inverted_residual<MVIT_ISA::P>, \
        MVIT_ISA::inverted_residual_scratch_bytes<MVIT_ISA::P, E>, MVIT_ISA::inverted_residual<MVIT_ISA::P, E> \
  }

extern const InvertedResidualTable MVIT_TABLE(inverted_residual) = {
    MVIT_INVERTED_RESIDUAL_KERNELS(Plain<float>, float),
    MVIT_INVERTED_RESIDUAL_KERNELS(Plain<float>, MVIT_ISA::bfloat16),
#if defined(MVIT_BF16_PAIRS)
    MVIT_INVERTED_RESIDUAL_KERNELS(Bf16Pairs, MVIT_ISA::bfloat16),
#else
    {},
#endif
};

}  // namespace mvit
