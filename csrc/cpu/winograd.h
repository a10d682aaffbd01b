// SPDX-License-Identifier: Apache-2.0
// Dense 3×3 convolution of stride 1 in float32 by Winograd's minimal filtering F(2×2, 3×3): 16 products for a tile of
// 2 × 2 pixels instead of 36 (Winograd 1980; Lavin & Gray 2016, arXiv 1509.09308).
//
// With Y a tile of the result, D the 4 × 4 pixels that it sees, and g the filter from one input to one output channel,
//   Y = Aᵀ [(G g Gᵀ) ∘ (Bᵀ D B)] A,
// summed over the input channels before Aᵀ … A. So each of the 16 points is a product of matrices, (tiles × channels) ·
// (channels × columns). Filters are transformed in double when they are packed. A group of tiles at a time goes through
// the three parts, so that what is between them stays in L2. Tiles are counted from the map's first pixel, and a tile's
// bits depend on no other tile: neither on threads nor on groups.
//
// What is not finite, and overflow: docs/kernels/numerics.md.
#pragma once

#include "convolution.h"
#include "panels.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int kPoints = 16, kOutputSide = 2, kInputSide = 4;  // points; pixels of a tile's side, and of what it sees

// By what is known when weights are packed. With 24 channels either way the direct form is nearly as fast on AVX-512,
// with 16 it is faster on AVX2: the transforms take as long as the products they save.
MVIT_INLINE bool takes_winograd(const ConvolutionShape& shape) {
  return shape.kernel == 3 && shape.stride == 1 && shape.dilation == 1 && shape.in_channels >= 32 &&
         shape.out_channels >= 32;
}

struct PackedWinograd {
  float* panels;  // [panel][point][in_channel][columns]
  float* bias;    // padded to whole vectors
  std::size_t end;

  PackedWinograd(const ConvolutionShape& shape, const void* memory) {
    PanelPieces pieces(memory);
    panels = pieces.take<float>(panels_size<Plain<float>>(shape.out_channels, kPoints * shape.in_channels));
    bias = pieces.take<float>(round_up(shape.out_channels, Vec<float>::size));
    end = pieces.at;
  }
};

inline std::size_t packed_winograd_bytes(const ConvolutionShape& shape) { return PackedWinograd(shape, nullptr).end; }

// Row i of G times a column of three: g[0], (g[0] ± g[1] + g[2]) / 2, g[2].
MVIT_INLINE double filter_point(int64_t i, double first, double second, double third) {
  if (i == 0) return first;
  if (i == 3) return third;
  return 0.5 * (first + third + (i == 1 ? second : -second));
}

inline void pack_winograd(const ConvolutionShape& shape, const void* weight, const float* bias, void* memory) {
  const PackedWinograd packed(shape, memory);
  const int64_t channels = shape.in_channels;
  pack_panels<Plain<float>>(packed.panels, shape.out_channels, kPoints * channels, [&](int64_t out, int64_t k) {
    const float* g = static_cast<const float*>(weight) + (out * channels + k % channels) * 9;
    const int64_t row = k / channels / kInputSide, column = k / channels % kInputSide;
    const auto along = [&](int64_t i) { return filter_point(column, g[3 * i], g[3 * i + 1], g[3 * i + 2]); };
    return static_cast<float>(filter_point(row, along(0), along(1), along(2)));
  });
  pack_bias(packed.bias, bias, shape.out_channels);
}

struct WinogradTiles {
  int64_t rows, columns;
  int64_t group;  // tiles that are transformed together
  int64_t ld;     // floats from one transformed tile to the next

  explicit MVIT_INLINE WinogradTiles(const ConvolutionShape& shape)
      : rows((shape.in_height + 1) / kOutputSide),
        columns((shape.in_width + 1) / kOutputSide),
        ld(round_up(shape.in_channels, Vec<float>::size)) {
    const int64_t fit = kGroupBytes / (kPoints * ld * static_cast<int64_t>(sizeof(float))) / kTileRows * kTileRows;
    group = smaller(fit > kTileRows ? fit : kTileRows, rows * columns);
  }

  // Floats from one point to the next of a group with `width` values a tile. One cache line more than they are: 16
  // points at powers of two meet in one set of L1, and the transform of the input takes 1.3 times as long.
  MVIT_INLINE int64_t point(int64_t width) const { return group * width + 64 / static_cast<int64_t>(sizeof(float)); }

  // On a Xeon with 2 MB of L2 twice as much takes 1.03 times as long, and a quarter of it up to 1.4 times at 256 and
  // 320 channels: weights, which come from L2 or L3, are then read once for 8 tiles.
  static constexpr int64_t kGroupBytes = 512 << 10;
};

inline int64_t winograd_units(const ConvolutionShape& shape) {
  return panel_count<float>(shape.out_channels) * WinogradTiles(shape).rows;
}

struct WinogradScratch {
  float* inputs;    // [point][tile of the group][ld]
  float* products;  // [point][tile of the group][columns of a panel]
  std::size_t end;

  WinogradScratch(const ConvolutionShape& shape, void* memory) {
    const WinogradTiles tiles(shape);
    PanelPieces pieces(memory);
    inputs = pieces.take<float>(kPoints * tiles.point(tiles.ld));
    products = pieces.take<float>(kPoints * tiles.point(kTileVectors * Vec<float>::size));
    end = pieces.at;
  }
};

inline std::size_t winograd_scratch_bytes(const ConvolutionShape& shape) {
  return WinogradScratch(shape, nullptr).end;
}

// Bᵀ times a column of four.
MVIT_INLINE void input_points(Vec<float> (&to)[kInputSide], const Vec<float> (&d)[kInputSide]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// Aᵀ times a column of four.
MVIT_INLINE void output_pixels(Vec<float> (&to)[kOutputSide], Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  to[0] = a + b + c;
  to[1] = b - c - d;
}

struct WinogradConvolution {
  const ConvolutionShape& shape;
  const Map &in, &out;
  const int64_t image;
  const PackedWinograd packed;
  const WinogradTiles tiles;
  const WinogradScratch scratch;

  MVIT_INLINE WinogradConvolution(const ConvolutionArgs& args, int64_t image, void* memory)
      : shape(args.shape),
        in(args.in),
        out(args.out),
        image(image),
        packed(shape, args.packed),
        tiles(shape),
        scratch(shape, memory) {}

  // Bᵀ D B of the tiles [begin, end), to scratch.inputs. Right and lower border stand for what is beyond them, too.
  void transform(int64_t begin, int64_t end) const {
    constexpr int size = Vec<float>::size;
    const float* const first = static_cast<const float*>(in.data) + image * in.image_stride;
    const int64_t point = tiles.point(tiles.ld);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t top = tile / tiles.columns * kOutputSide - 1, left = tile % tiles.columns * kOutputSide - 1;
      const float* row[kInputSide];
      int64_t column[kInputSide];
      for (int i = 0; i < kInputSide; ++i) {
        row[i] = first + smaller(top + i, shape.in_height) * in.row_stride;
        column[i] = smaller(left + i, shape.in_width) * in.column_stride;
      }
      float* to = scratch.inputs + (tile - begin) * tiles.ld;
      const auto channels = [&](int64_t c, const auto& pixel) {
        Vec<float> along[kInputSide][kInputSide];
#pragma GCC unroll 4
        for (int i = 0; i < kInputSide; ++i) {
          const Vec<float> d[kInputSide] = {pixel(row[i] + column[0] + c), pixel(row[i] + column[1] + c),
                                            pixel(row[i] + column[2] + c), pixel(row[i] + column[3] + c)};
          input_points(along[i], d);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kInputSide; ++j) {
          const Vec<float> d[kInputSide] = {along[0][j], along[1][j], along[2][j], along[3][j]};
          Vec<float> points[kInputSide];
          input_points(points, d);
#pragma GCC unroll 4
          for (int i = 0; i < kInputSide; ++i) store(to + (i * kInputSide + j) * point + c, points[i]);
        }
      };
      int64_t c = 0;
      for (; c + size <= shape.in_channels; c += size) channels(c, [](const float* p) { return load(p); });
      const int rest = static_cast<int>(shape.in_channels - c);
      if (rest > 0) channels(c, [&](const float* p) { return load_first(p, rest); });
    }
  }

  // The products of `count` tiles from the group's tile `from` on, at all points, with one panel.
  template <int V>
  void multiply(const float* panel, int64_t from, int64_t count) const {
    constexpr int64_t ld = V * Vec<float>::size;
    const int64_t depth = shape.in_channels, block = block_of<float>(depth);
    for (int64_t point = 0; point < kPoints; ++point) {
      const float* a = scratch.inputs + point * tiles.point(tiles.ld) + from * tiles.ld;
      const float* b = panel + point * depth * ld;
      float* to = scratch.products + point * tiles.point(ld) + from * ld;
      in_steps<kTileRows>(count, [&](auto rows, int64_t tile) {
        constexpr int R = decltype(rows)::value;
        Vec<float> sums[R][V];
        clear(sums);
        multiply_add_in_blocks<R, V, Operand::row_major>(sums, a + tile * tiles.ld, tiles.ld, b, ld, depth, block);
        store_tile(to + tile * ld, ld, sums);
      });
    }
  }

  // Aᵀ … A of these products, bias and activation, to the map. `first` is the map's tile at the group's start.
  template <int V>
  void write(const float* bias, int64_t column, int64_t present, int64_t first, int64_t from, int64_t count) const {
    constexpr int size = Vec<float>::size;
    constexpr int64_t ld = V * size;
    float nowhere[V * size];  // where pixels beyond an odd map are written
    float* const map = static_cast<float*>(out.data) + image * out.image_stride + column;
    for (int64_t tile = from; tile < from + count; ++tile) {
      const float* m = scratch.products + tile * ld;
      const auto at = [&](int point, int v) { return load(m + point * tiles.point(ld) + v * size); };
      Vec<float> pixels[kOutputSide * kOutputSide][V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Vec<float> along[kInputSide][kOutputSide];
#pragma GCC unroll 4
        for (int i = 0; i < kInputSide; ++i)
          output_pixels(along[i], at(4 * i, v), at(4 * i + 1, v), at(4 * i + 2, v), at(4 * i + 3, v));
        const Vec<float> b = load(bias + v * size);
#pragma GCC unroll 2
        for (int j = 0; j < kOutputSide; ++j) {
          Vec<float> to[kOutputSide];
          output_pixels(to, along[0][j], along[1][j], along[2][j], along[3][j]);
#pragma GCC unroll 2
          for (int i = 0; i < kOutputSide; ++i) pixels[kOutputSide * i + j][v] = to[i] + b;
        }
      }
      activate<Plain<float>>(pixels, shape.activation);
      const int64_t top = (first + tile) / tiles.columns * kOutputSide;
      const int64_t left = (first + tile) % tiles.columns * kOutputSide;
      store_pixels(pixels, present, [&](int r) {
        const int64_t y = top + r / kOutputSide, x = left + r % kOutputSide;
        const bool inside = y < shape.in_height && x < shape.in_width;
        return inside ? map + y * out.row_stride + x * out.column_stride : nowhere;
      });
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t above = begin / tiles.rows * tiles.rows;  // units of the panels before
    const bool one_panel = end <= above + tiles.rows;
    const int64_t all = (one_panel ? end - above : tiles.rows) * tiles.columns;
    for (int64_t first = one_panel ? (begin - above) * tiles.columns : 0; first < all; first += tiles.group) {
      const int64_t last = smaller(first + tiles.group, all);
      transform(first, last);
      int64_t unit = 0;
      in_lane_blocks<float>(0, shape.out_channels, [&](auto vectors, int64_t column, int64_t present) {
        constexpr int V = decltype(vectors)::value;
        // The panel's tiles that are this call's, then those of them in the group.
        const int64_t start = begin > unit ? (begin - unit) * tiles.columns : 0;
        const int64_t stop = smaller(tiles.rows, end - unit) * tiles.columns;
        unit += tiles.rows;
        const int64_t from = (start > first ? start : first) - first, count = smaller(stop, last) - first - from;
        if (count <= 0) return;
        multiply<V>(packed.panels + column * kPoints * shape.in_channels, from, count);
        write<V>(packed.bias + column, column, present, first, from, count);
      });
    }
  }
};

inline void convolve_by_winograd(const ConvolutionArgs& args, int64_t image, int64_t begin, int64_t end,
                                 void* scratch) {
  WinogradConvolution(args, image, scratch).run(begin, end);
}

}  // namespace MVIT_ISA
}  // namespace mvit
