// SPDX-License-Identifier: Apache-2.0
// Convolutions on matrix tiles. The rows of A are input pixels where they lie: a step of the sum is 32 channels of one
// tap, whose address is in a table, so that the same loop serves 1×1, 3×3 and any stride and dilation. Of a map with four
// channels a pixel, the image's, a step is the three adjacent taps of a kernel row, in tiles of 12 values a row: one that
// reached further would make NaN of a NaN beyond the filter.
#pragma once

#include "convolution_taps.h"
#include "tile_pixels.h"

namespace mvit {
namespace MVIT_ISA {

// Steps of the sum as the weights are packed: parts of 32 channels of one tap after another; of narrow maps, kernel rows.
struct TileSteps {
  bool narrow;
  int64_t parts, count;

  explicit MVIT_INLINE TileSteps(const ConvolutionShape& shape)
      : narrow(shape.in_channels <= kNarrow),
        parts(narrow ? 1 : round_up(shape.in_channels, kTileDepth) / kTileDepth),
        count(narrow ? shape.kernel : shape.kernel * shape.kernel * parts) {}

  static constexpr int64_t kNarrow = 4;
};

struct PackedTileConvolution {
  int64_t steps;
  bfloat16* weights;
  float* bias;  // padded to whole blocks
  std::size_t end;

  PackedTileConvolution(const ConvolutionShape& shape, const void* memory)
      : steps(TileSteps(shape).count) {
    PanelPieces pieces(memory);
    weights = pieces.take<bfloat16>(tile_weights_size(shape.out_channels, steps));
    bias = pieces.take<float>(round_up(shape.out_channels, Vec<float>::size));
    end = pieces.at;
  }
};

inline std::size_t packed_tile_convolution_bytes(const ConvolutionShape& shape) {
  return PackedTileConvolution(shape, nullptr).end;
}

inline void pack_tile_convolution(const ConvolutionShape& shape, const void* weight, const float* bias, void* memory) {
  const PackedTileConvolution packed(shape, memory);
  const TileSteps steps(shape);
  const auto* w = static_cast<const bfloat16*>(weight);
  const int64_t taps = shape.kernel * shape.kernel, channels = shape.in_channels;
  pack_tile_weights(packed.weights, shape.out_channels, packed.steps, [&](int64_t out, int64_t step, int64_t k) {
    const int64_t in = steps.narrow ? k % TileSteps::kNarrow : step % steps.parts * kTileDepth + k;
    const int64_t tap = steps.narrow ? k / TileSteps::kNarrow : step / steps.parts;
    const bool present = in < channels && (!steps.narrow || tap < shape.kernel);
    return present ? w + (out * channels + in) * taps + (steps.narrow ? step * shape.kernel : 0) + tap : nullptr;
  });
  pack_bias(packed.bias, bias, shape.out_channels);
}

// Work is shared out by rows of all columns where the map is larger than the weights: threads then read what they wrote in
// the step before, and no thread reads the whole map. Where the weights are larger, by panels first, so that no thread reads
// all of them.
inline bool shared_by_rows(const ConvolutionShape& shape) {
  return shape.in_height * shape.in_width >= shape.out_channels * shape.kernel * shape.kernel;
}

inline int64_t tile_convolution_units(const ConvolutionShape& shape) {
  const int64_t panels = shared_by_rows(shape) ? 1 : round_up(shape.out_channels, kBlockSide) / kBlockSide;
  return panels * shape.out_height();
}

struct TileConvolutionScratch {
  int64_t *in, *weights;  // bytes from a block's first pixel, and from a panel's start, of each step
  void* results;
  std::size_t end;

  TileConvolutionScratch(const ConvolutionShape& shape, void* memory) {
    const int64_t steps = shape.kernel * shape.kernel * TileSteps(shape).parts;
    PanelPieces pieces(memory);
    in = pieces.take<int64_t>(steps);
    weights = pieces.take<int64_t>(steps);
    results = pieces.take<TileResults<2>>(1);
    end = pieces.at;
  }
};

inline std::size_t tile_convolution_scratch_bytes(const ConvolutionShape& shape) {
  return TileConvolutionScratch(shape, nullptr).end;
}

template <Activation kActivation>
MVIT_INLINE Vec<float> activated(Vec<float> x) {
  if constexpr (kActivation == Activation::silu) return silu_for<Bf16Pairs>(x);
  if constexpr (kActivation == Activation::relu) return maximum(Vec<float>(0.0f), x);  // a NaN stays NaN
  return x;
}

template <int N, Activation kActivation>
struct WritePixels {
  char* out;
  const int64_t* places;
  __mmask32 channels;

  MVIT_INLINE void advance(int rows) { places += rows; }
  MVIT_INLINE void operator()(Vec<float> (&tile)[kPieceRows][N], int row) const {
    for (int r = 0; r < kPieceRows; ++r) {
      for (int n = 0; n < N; ++n) tile[r][n] = activated<kActivation>(tile[r][n]);
      store_channels(out + places[row + r], tile[r], channels);
    }
  }
};

struct TileConvolution {
  const ConvolutionShape& shape;
  const Map &in, &out;
  const PackedTileConvolution packed;
  const TileConvolutionScratch scratch;
  const TileSteps steps;
  const char* first_in;
  char* first_out;
  bool adjacent;  // whether the taps of a kernel row are one step
  char nowhere[64];

  TileConvolution(const ConvolutionArgs& args, int64_t image, void* memory)
      : shape(args.shape),
        in(args.in),
        out(args.out),
        packed(args.shape, args.packed),
        scratch(args.shape, memory),
        steps(args.shape),
        first_in(static_cast<const char*>(args.in.data) + 2 * image * args.in.image_stride),
        first_out(static_cast<char*>(args.out.data) + 2 * image * args.out.image_stride),
        adjacent(steps.narrow && shape.dilation == 1 && in.column_stride == TileSteps::kNarrow) {}

  MVIT_INLINE unsigned inside(int64_t first, int64_t last, int64_t side) const {
    return shape.kernel == 1 ? 1 : taps_inside(shape, first, last, side);
  }

  // Writes the tables of the steps of kernel rows and columns; returns how many there are.
  int64_t tabulate(unsigned kernel_rows, unsigned kernel_columns) const {
    constexpr int64_t tap_bytes = TileSteps::kNarrow / 2 * 64;  // of the weights of a narrow map
    const int64_t border = shape.kernel / 2 * shape.dilation * (in.row_stride + in.column_stride);
    int64_t count = 0;
    for (int64_t i = 0; i < shape.kernel; ++i)
      for (int64_t j = 0; j < (adjacent ? 1 : shape.kernel); ++j) {
        if ((kernel_rows >> i & kernel_columns >> j & 1) == 0) continue;
        const int64_t at = shape.dilation * (i * in.row_stride + j * in.column_stride) - border;
        for (int64_t part = 0; part < steps.parts; ++part) {
          scratch.in[count] = 2 * (at + part * kTileDepth);
          scratch.weights[count++] = steps.narrow ? i * kTileBytes + j * tap_bytes
                                                  : ((i * shape.kernel + j) * steps.parts + part) * kTileBytes;
        }
      }
    return count;
  }

  // Output rows [begin, end) of the panel of columns that starts at `column`.
  template <int N, Activation kActivation>
  __attribute__((noinline)) void panel(int64_t column, int64_t begin, int64_t end) {
    const int64_t in_row = 2 * shape.stride * in.row_stride, in_column = 2 * shape.stride * in.column_stride;
    const int64_t out_row = 2 * out.row_stride, out_column = 2 * out.column_stride, width = shape.out_width();
    // Rows that are adjacent in memory are one long row.
    const bool flat = shape.kernel == 1 && in_row == width * in_column && out_row == width * out_column;
    const char* const rows_in = first_in + (flat ? begin * in_row : 0);
    char* const rows_out = first_out + (flat ? begin * out_row : 0) + 2 * column;
    const int64_t pixels = flat ? (end - begin) * width : width;
    const TiledRows tiled(pixels, TiledRows::rows_for(pixels));
    if (flat) begin = 0, end = 1;

    const Tiles configured(tiled.rows, adjacent ? static_cast<int>(2 * shape.kernel) : pairs_of(in));
    TileProducts<N, WritePixels<N, kActivation>> products(*static_cast<TileResults<N>*>(scratch.results), tiled.rows);
    const ScatteredTileOperand b{
        reinterpret_cast<const char*>(packed.weights + column / kTile * packed.steps * kTileElements), scratch.weights,
        packed.steps * kTileBytes, 64};
    const StartAt bias{packed.bias + column, 0};
    const __mmask32 channels = written_channels(out, shape.out_channels, column);
    RowPlaces places(tiled.rows, tiled.present, out_column);
    unsigned tabulated = 0;
    int64_t count = 0;
    in_tile_blocks(tiled, begin, end, [&](auto tiles, int64_t row, int64_t x, int64_t next_row, int64_t next_x) {
      constexpr int M = decltype(tiles)::value;
      const unsigned kernel_rows = inside(row, next_row, shape.in_height);
      unsigned kernel_columns = 7;
      if (shape.dilation > 1)
        kernel_columns = inside(smaller(x, next_x), (x > next_x ? x : next_x) + tiled.rows - 1, shape.in_width);
      if (const unsigned taps = kernel_rows | kernel_columns << 3; taps != tabulated) {
        count = tabulate(kernel_rows, kernel_columns);
        tabulated = taps;
      }
      const int64_t rows = next_row - row, columns = next_x - x;
      char* const to = rows_out + row * out_row + x * out_column;
      const ScatteredTileOperand a{rows_in + row * in_row + x * in_column, scratch.in, rows * in_row + columns * in_column,
                                   in_column};
      const int64_t* const to_rows = places.of(rows * out_row + columns * out_column, nowhere - to);
      products.template block<M>(a, b, count, bias, {to, to_rows, channels}, M * tiled.rows);
    });
    products.finish();
  }

  template <int N>
  void panel(int64_t column, int64_t begin, int64_t end) {
    if (shape.activation == Activation::silu) return panel<N, Activation::silu>(column, begin, end);
    if (shape.activation == Activation::relu) return panel<N, Activation::relu>(column, begin, end);
    panel<N, Activation::none>(column, begin, end);
  }

  void panels(int64_t column, int64_t columns, int64_t begin, int64_t end) {
    for (; column < columns; column += kBlockSide)
      with_tile_columns(column, shape.out_channels,
                        [&](auto tiles, int64_t first) { panel<decltype(tiles)::value>(first, begin, end); });
  }

  void run(int64_t begin, int64_t end) {
    const int64_t rows = shape.out_height();
    if (shared_by_rows(shape)) return panels(0, shape.out_channels, begin, end);
    for (int64_t at = begin; at < end;) {
      const int64_t first = at % rows, last = smaller(rows, first + end - at), column = at / rows * kBlockSide;
      panels(column, column + kBlockSide, first, last);
      at += last - first;
    }
  }
};

inline void convolve_on_tiles(const ConvolutionArgs& args, int64_t image, int64_t begin, int64_t end, void* scratch) {
  TileConvolution(args, image, scratch).run(begin, end);
}

}  // namespace MVIT_ISA
}  // namespace mvit
