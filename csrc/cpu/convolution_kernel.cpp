// SPDX-License-Identifier: Apache-2.0
// Direct dense convolution, 1×1 and 3×3 (but for those of winograd.h). The rows of the left operand are input pixels,
// read in place through one kernel tap after another; the right operand is the packed weights, (taps · in_channels) ×
// columns. No im2col, and no edge cases: the input map carries its zero padding as a border. Taps that see nothing but
// border are left out, which is 40 % of the work where a dilation is half the map's side.
#include "convolution_taps.h"
#include "panels.h"
#if !defined(MVIT_BF16_PAIRS)
#include "winograd.h"
#endif
#if defined(MVIT_TILES)
#include "tile_convolution.h"
#endif

namespace mvit {
namespace MVIT_ISA {

MVIT_INLINE int64_t depth_of(const ConvolutionShape& shape) {
  return shape.kernel * shape.kernel * shape.in_channels;
}

template <typename P>
struct PackedConvolution {
  typename P::Operand* panels;  // of (kernel row, kernel column, in_channel) × out_channels
  float* bias;                  // padded to whole vectors
  std::size_t end;

  PackedConvolution(const ConvolutionShape& shape, const void* memory) {
    PanelPieces pieces(memory);
    panels = pieces.take<typename P::Operand>(panels_size<P>(shape.out_channels, depth_of(shape)));
    bias = pieces.take<float>(round_up(shape.out_channels, Vec<float>::size));
    end = pieces.at;
  }
};

template <typename P>
std::size_t packed_convolution_bytes(const ConvolutionShape& shape) {
  return PackedConvolution<P>(shape, nullptr).end;
}

template <typename P>
void pack_convolution(const ConvolutionShape& shape, const void* weight, const float* bias, void* memory) {
  const PackedConvolution<P> packed(shape, memory);
  const auto* w = static_cast<const typename P::Weight*>(weight);
  const int64_t taps = shape.kernel * shape.kernel, channels = shape.in_channels;
  pack_panels<P>(packed.panels, shape.out_channels, depth_of(shape), [&](int64_t out, int64_t k) {
    return w[(out * channels + k % channels) * taps + k / channels];
  });
  pack_bias(packed.bias, bias, shape.out_channels);
}

inline std::size_t convolution_scratch_bytes(const ConvolutionShape&) { return 0; }

inline int64_t convolution_units(const ConvolutionShape& shape) {
  return panel_count<float>(shape.out_channels) * shape.out_height();
}

// The pixels of a map in row-major order, `stride` apart, starting with the first pixel of row `begin`.
template <typename E>
struct Pixels {
  E* first;
  int64_t row_stride, column_stride, width;

  Pixels(const Map& map, int64_t image, int64_t begin, int64_t stride, int64_t columns)
      : first(static_cast<E*>(map.data) + image * map.image_stride + begin * stride * map.row_stride),
        row_stride(stride * map.row_stride),
        column_stride(stride * map.column_stride),
        width(columns) {}

  // p[r] = address of pixel begin + r
  template <int R>
  MVIT_INLINE void locate(int64_t begin, E* (&p)[R]) const {
    int64_t column = begin % width;
    E* row = first + begin / width * row_stride;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      p[r] = row + column * column_stride;
      if (++column == width) {
        column = 0;
        row += row_stride;
      }
    }
  }
};

// multiply_add (see microkernel.h) with a left operand whose rows are at arbitrary addresses:
// A(r, k) is a[r][offset + k].
template <int R, int V>
MVIT_INLINE void multiply_add_at(Vec<float> (&tile)[R][V], const float* const (&a)[R], int64_t offset, const float* b,
                                 int64_t depth) {
  constexpr int size = Vec<float>::size;
  int64_t begin = 0;
#if defined(MVIT_NEON)
  begin = add_by_elements<R, V, Next::unknown>(tile, [&](int r) { return a[r] + offset; }, b, V * size, depth, begin);
#endif
MVIT_UNROLL_STEPS
  for (int64_t k = begin; k < depth; ++k) {
    Vec<float> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + (k * V + v) * size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<float> scalar(a[r][offset + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = fma(scalar, row[v], tile[r][v]);
    }
  }
}

#if defined(MVIT_BF16_PAIRS)
template <int R, int V>
MVIT_INLINE void multiply_add_at(Vec<float> (&tile)[R][V], const bfloat16* const (&a)[R], int64_t offset,
                                 const bf16x2* b, int64_t depth) {
  constexpr int size = Vec<float>::size;
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) std::memcpy(&row[v], b + (k * V + v) * size, sizeof row[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a[r] + offset + 2 * k, sizeof pair);
      const __m512bh scalar = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = Vec<float>(_mm512_dpbf16_ps(tile[r][v].native, scalar, row[v]));
    }
  }
}
#endif

template <typename P>
void convolve(const ConvolutionArgs& args, int64_t image, int64_t begin, int64_t end, void*) {
  using E = typename P::Weight;
  const ConvolutionShape& shape = args.shape;
  const PackedConvolution<P> packed(shape, args.packed);
  const int64_t rows = shape.out_height(), columns = shape.out_width();
  // Taps of one kernel row that are adjacent in memory form a single run along the depth.
  const bool adjacent = shape.kernel == 3 && shape.dilation == 1 && args.in.column_stride == shape.in_channels;
  const int64_t runs = adjacent ? 1 : shape.kernel, depth = P::rows(depth_of(shape) / (shape.kernel * runs));
  const int64_t run_stride = shape.dilation * args.in.column_stride, tap_row = shape.dilation * args.in.row_stride;
  const int64_t border = shape.kernel == 3 ? run_stride + tap_row : 0;
  const int64_t block = depth > 0 ? block_of<E>(depth) : 1;

  int64_t panel = 0;
  in_lane_blocks<float>(0, shape.out_channels, [&](auto vectors, int64_t column, int64_t present) {
    constexpr int V = decltype(vectors)::value;
    const int64_t unit = rows * panel++;
    const int64_t first = begin > unit ? begin - unit : 0, last = smaller(rows, end - unit);
    if (first >= last) return;
    const Pixels<const E> in(args.in, image, first, shape.stride, columns);
    const Pixels<E> out(args.out, image, first, 1, columns);
    const auto* weights = packed.panels + column * P::rows(depth_of(shape));
    const float* bias = packed.bias + column;
    in_steps<kTileRows>((last - first) * columns, [&](auto pixels, int64_t pixel) {
      constexpr int R = decltype(pixels)::value;
      const E* a[R];
      in.locate(pixel, a);
      Vec<float> tile[R][V];
      begin_with_bias(tile, bias);
      const auto* b = weights;
      float sums[R * V * Vec<float>::size];
      // Steps in the current block of the sum. Short runs share a block: an RGB image has three runs of 9 values.
      int64_t in_block = 0;
      bool parked = false, full = false;
      unsigned rows_inside = 1, columns_inside = 7;
      if (shape.kernel == 3) {
        const int64_t top = first + pixel / columns, left = pixel % columns, right = left + R - 1;
        rows_inside = taps_inside(shape, top, right < columns ? top : top + right / columns, shape.in_height);
        if (runs == 3 && right < columns) columns_inside = taps_inside(shape, left, right, shape.in_width);
      }
      const auto end_block = [&] {
        if (parked) add_tile(tile, sums, V * Vec<float>::size);
      };
      for (int64_t i = 0; i < shape.kernel; ++i)
        for (int64_t j = 0; j < runs; ++j)
          for (int64_t k = 0; k < depth; k += block) {
            const int64_t length = smaller(block, depth - k);
            // Blocks end in the same places with and without the taps left out, which would add zeros: a pixel's bits
            // do not depend on its tile.
            if (sums_in_blocks<E> && in_block > 0 && in_block + length > kBlock) {
              full = true;
              in_block = 0;
            }
            in_block += length;
            if ((rows_inside >> i & columns_inside >> j & 1) != 0) {
              if (full) {
                end_block();
                store_tile(sums, V * Vec<float>::size, tile);
                clear(tile);
                parked = true;
                full = false;
              }
              multiply_add_at(tile, a, i * tap_row + j * run_stride - border + k * P::kStep, b, length);
            }
            b += length * V * Vec<float>::size;
          }
      end_block();
      activate<P>(tile, shape.activation);
      E* to[R];
      out.locate(pixel, to);
      store_pixels(tile, present, [&](int r) { return to[r] + column; });
    });
  });
}

#if !defined(MVIT_BF16_PAIRS)
// In float32: by Winograd's algorithm where that is faster, else directly.
inline std::size_t packed_bytes(const ConvolutionShape& shape) {
  return takes_winograd(shape) ? packed_winograd_bytes(shape) : packed_convolution_bytes<Plain<float>>(shape);
}

inline void pack(const ConvolutionShape& shape, const void* weight, const float* bias, void* memory) {
  (takes_winograd(shape) ? pack_winograd : pack_convolution<Plain<float>>)(shape, weight, bias, memory);
}

inline int64_t units(const ConvolutionShape& shape) {
  return takes_winograd(shape) ? winograd_units(shape) : convolution_units(shape);
}

inline std::size_t scratch_bytes(const ConvolutionShape& shape) {
  return takes_winograd(shape) ? winograd_scratch_bytes(shape) : convolution_scratch_bytes(shape);
}

inline void run(const ConvolutionArgs& args, int64_t image, int64_t begin, int64_t end, void* scratch) {
  (takes_winograd(args.shape) ? convolve_by_winograd : convolve<Plain<float>>)(args, image, begin, end, scratch);
}
#endif

}  // namespace MVIT_ISA

#if defined(MVIT_TILES)
#define MVIT_PAIRS_OF_CONVOLUTION                                                               \
  {                                                                                             \
    MVIT_ISA::packed_tile_convolution_bytes, MVIT_ISA::pack_tile_convolution,                   \
        MVIT_ISA::tile_convolution_units, MVIT_ISA::tile_convolution_scratch_bytes, MVIT_ISA::convolve_on_tiles \
  }
#else
#define MVIT_PAIRS_OF_CONVOLUTION                                                                                 \
  {                                                                                                               \
    MVIT_ISA::packed_convolution_bytes<MVIT_ISA::Bf16Pairs>, MVIT_ISA::pack_convolution<MVIT_ISA::Bf16Pairs>,     \
        MVIT_ISA::convolution_units, MVIT_ISA::convolution_scratch_bytes, MVIT_ISA::convolve<MVIT_ISA::Bf16Pairs> \
  }
#endif

extern const ConvolutionTable MVIT_TABLE(convolution) = {
    MVIT_PLAIN_ENTRY({MVIT_ISA::packed_bytes, MVIT_ISA::pack, MVIT_ISA::units, MVIT_ISA::scratch_bytes, MVIT_ISA::run}),
    MVIT_PAIRS_ENTRY(MVIT_PAIRS_OF_CONVOLUTION),
};

}  // namespace mvit
