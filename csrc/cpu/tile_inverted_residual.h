// SPDX-License-Identifier: Apache-2.0
// Inverted residuals on matrix tiles: as in inverted_residual_kernel.cpp, with both 1×1 convolutions on tiles and the
// depthwise one in float32. On tiles, too, it could be done (as products with diagonal matrices), but that takes 3.5 to
// 4.0 ns for 16 results with SiLU instead of 3.2, and a ring in bfloat16 adds its own rounding errors.
//
// The buffer holds 32 to 256 pixels, of one row, or of up to eight if rows are shorter. Many are projected faster: the
// depthwise convolution reads the ring through L1, so each projection finds its weights in L2, and the tile unit, asleep
// after 0.5 µs of other work, takes another 0.5 µs to wake up.
#pragma once

#include "inverted_residual.h"
#include "tile_depthwise.h"
#include "tile_pixels.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int64_t kBlockPixels = kBlockSide, kMostPixels = 8 * kBlockPixels;
// Pixels of the buffer: as many as 32 KB hold.
MVIT_INLINE int64_t buffer_pixels(int64_t hidden) {
  if (hidden == 0) return kBlockPixels;
  const int64_t blocks = (int64_t{32} << 10) / (2 * hidden * kBlockPixels);
  return kBlockPixels * (blocks < 1 ? 1 : smaller(blocks, kMostPixels / kBlockPixels));
}

struct PackedTileInvertedResidual {
  int64_t blocks, hidden, in_steps, hidden_steps;  // blocks: of one vector of channels; hidden: padded to whole steps
  bfloat16 *expand, *project;
  float* depthwise;  // [block of one vector][tap][channel]
  float *expand_bias, *depthwise_bias, *project_bias;
  std::size_t end;

  PackedTileInvertedResidual(const InvertedResidualShape& shape, const void* memory) {
    blocks = round_up(shape.hidden, Vec<float>::size) / Vec<float>::size;
    hidden = round_up(shape.hidden, kTileDepth);
    in_steps = round_up(shape.in_channels, kTileDepth) / kTileDepth;
    hidden_steps = hidden / kTileDepth;
    PanelPieces pieces(memory);
    expand = pieces.take<bfloat16>(tile_weights_size(hidden, in_steps));
    project = pieces.take<bfloat16>(tile_weights_size(shape.out_channels, hidden_steps));
    depthwise = pieces.take<float>(9 * hidden);
    expand_bias = pieces.take<float>(hidden);
    depthwise_bias = pieces.take<float>(hidden);
    project_bias = pieces.take<float>(round_up(shape.out_channels, Vec<float>::size));
    end = pieces.at;
  }
};

inline std::size_t packed_tile_inverted_residual_bytes(const InvertedResidualShape& shape) {
  return PackedTileInvertedResidual(shape, nullptr).end;
}

inline void pack_tile_inverted_residual(const InvertedResidualShape& shape, const InvertedResidualWeights& weights,
                                        void* memory) {
  constexpr int64_t size = Vec<float>::size;
  const PackedTileInvertedResidual packed(shape, memory);
  const auto* expand = static_cast<const bfloat16*>(weights.expand);
  const auto* depthwise = static_cast<const bfloat16*>(weights.depthwise);
  const auto* project = static_cast<const bfloat16*>(weights.project);
  pack_tile_weights(packed.expand, packed.hidden, packed.in_steps, [&](int64_t column, int64_t step, int64_t k) {
    const int64_t in = step * kTileDepth + k;
    return column < shape.hidden && in < shape.in_channels ? expand + column * shape.in_channels + in : nullptr;
  });
  pack_tile_weights(packed.project, shape.out_channels, packed.hidden_steps, [&](int64_t column, int64_t step, int64_t k) {
    const int64_t hidden = step * kTileDepth + k;
    return hidden < shape.hidden ? project + column * shape.hidden + hidden : nullptr;
  });
  for (int64_t c = 0; c < packed.hidden; ++c)
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* const weight = packed.depthwise + c / size * 9 * size + tap * size + c % size;
      if (c < shape.hidden) store_first(weight, load_first(depthwise + c * 9 + tap, 1), 1);
      else *weight = 0;
    }
  for (int64_t c = shape.hidden; c < packed.hidden; ++c) packed.expand_bias[c] = packed.depthwise_bias[c] = 0;
  pack_bias(packed.expand_bias, weights.expand_bias, shape.hidden);
  pack_bias(packed.depthwise_bias, weights.depthwise_bias, shape.hidden);
  pack_bias(packed.project_bias, weights.project_bias, shape.out_channels);
}

struct TileInvertedResidualScratch {
  int64_t pixels, group;                    // of the buffer; output rows of it
  int64_t ring_rows, block_size, row_size;  // elements of one channel block of a ring row, and of the whole row
  int64_t row_ld;                           // elements from one pixel to the next in `row`
  float* ring;                              // [row][block][position][channel]
  float* zeros;                             // [position][channel]; stands in for any block of a row outside the map
  bfloat16* buffer;                         // [pixels][hidden]
  bfloat16* row;  // one row of the input, for maps whose pixels do not end at whole steps
  char* nowhere;  // the output of no pixel
  void* results;
  std::size_t end;

  TileInvertedResidualScratch(const InvertedResidualShape& shape, void* memory) {
    constexpr int64_t size = Vec<float>::size;
    const int64_t hidden = round_up(shape.hidden, kTileDepth);
    pixels = buffer_pixels(hidden);
    group = smaller(8, pixels / smaller(pixels, shape.out_width()));
    ring_rows = (group - 1) * shape.stride + 2 * shape.dilation + 1;
    block_size = (shape.in_width + 2 * shape.dilation + 1) * size;  // the last position is that of no pixel
    row_size = hidden / size * block_size;
    row_ld = round_up(shape.in_channels, kTileDepth);
    PanelPieces pieces(memory);
    ring = pieces.take<float>(ring_rows * row_size);
    zeros = pieces.take<float>(block_size);
    buffer = pieces.take<bfloat16>(pixels * hidden);
    row = pieces.take<bfloat16>(round_up(shape.in_width, kTile) * row_ld);
    nowhere = pieces.take<char>(2 * round_up(shape.out_channels, kBlockSide));
    results = pieces.take<TileResults<2>>(1);
    end = pieces.at;
  }
};

inline std::size_t tile_inverted_residual_scratch_bytes(const InvertedResidualShape& shape) {
  return TileInvertedResidualScratch(shape, nullptr).end;
}

// ring = SiLU(results), one vector of channels a block
template <int N>
struct WriteExpanded {
  char* ring;
  const int64_t* places;
  int64_t block_bytes;

  MVIT_INLINE void advance(int rows) { places += rows; }
  MVIT_INLINE void operator()(Vec<float> (&tile)[kPieceRows][N], int row) const {
    for (int r = 0; r < kPieceRows; ++r)
      for (int n = 0; n < N; ++n)
        store(reinterpret_cast<float*>(ring + places[row + r] + n * block_bytes), silu_beside_tiles(tile[r][n]));
  }
};

// out = results, or results + in
template <int N, bool kResidual>
struct WriteProjected {
  char* out;
  const int64_t* places;
  __mmask32 channels;
  const char* in;
  const int64_t* in_places;
  __mmask32 in_channels;

  MVIT_INLINE void advance(int rows) {
    places += rows;
    if constexpr (kResidual) in_places += rows;
  }
  MVIT_INLINE void operator()(Vec<float> (&tile)[kPieceRows][N], int row) const {
    for (int r = 0; r < kPieceRows; ++r) {
      if constexpr (kResidual) {
        const char* const from = in + in_places[row + r];
        look_at(reinterpret_cast<const bfloat16*>(from), __builtin_popcount(in_channels));
        for (int n = 0; n < N; ++n) {
          const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(in_channels >> n * kTile), from + n * 32);
          // GCC 12 would convert halves and join them.
          const auto bits = NativeBits(_mm512_maskz_cvtepu16_epi32(-1, half)) << 16;
          tile[r][n] = tile[r][n] + Vec<float>(NativeFloat(bits));
        }
      }
      store_channels(out + places[row + r], tile[r], channels);
    }
  }
};

// Where the pixels of the buffer go, in bytes from the first one's place, and where they are in the input.
struct ProjectedPixels {
  char* out;
  const char* in;
  int64_t count = -1;
  int64_t places[kMostPixels], in_places[kMostPixels];
};

struct TileInvertedResidual {
  static constexpr int64_t size = Vec<float>::size;
  const InvertedResidualArgs& args;
  const InvertedResidualShape& shape;
  const PackedTileInvertedResidual packed;
  const TileInvertedResidualScratch scratch;
  const bfloat16* in;
  bfloat16* out;
  const bool reads_in_place;  // the map's rows

  TileInvertedResidual(const InvertedResidualArgs& arguments, int64_t image, void* memory)
      : args(arguments),
        shape(arguments.shape),
        packed(arguments.shape, arguments.packed),
        scratch(arguments.shape, memory),
        in(static_cast<const bfloat16*>(args.in.data) + image * args.in.image_stride),
        out(static_cast<bfloat16*>(args.out.data) + image * args.out.image_stride),
        reads_in_place(args.in.channel_step % kTile == 0) {}

  float* ring_row(int64_t y) const { return scratch.ring + y % scratch.ring_rows * scratch.row_size; }

  // Zeroes what is read without having been written: positions on both sides of every row, and channels beyond the input's.
  void clear() const {
    const auto zero = [](auto* begin, int64_t count) {
      std::memset(static_cast<void*>(begin), 0, static_cast<std::size_t>(count) * sizeof *begin);
    };
    const int64_t side = shape.dilation * size;
    for (int64_t block = 0; block < scratch.ring_rows * (packed.hidden / size); ++block) {
      float* const begin = scratch.ring + block * scratch.block_size;
      zero(begin, side);
      zero(begin + side + shape.in_width * size, side);
    }
    zero(scratch.zeros, scratch.block_size);
    const int64_t filtered = packed.blocks * size;
    for (int64_t i = 0; i < scratch.pixels && filtered < packed.hidden; ++i)
      zero(scratch.buffer + i * packed.hidden + filtered, packed.hidden - filtered);
    if (!reads_in_place) zero(scratch.row, round_up(shape.in_width, kTile) * scratch.row_ld);
  }

  // Expands input rows [begin, end) into the ring, channels [column, column_end), N blocks at a time; if `copied`, the only
  // one of these rows is in scratch.row.
  template <int N>
  void expand(int64_t begin, int64_t end, bool copied, int64_t column, int64_t column_end) const {
    const int64_t row_bytes = copied ? 0 : 2 * args.in.row_stride;
    const int64_t pixel_bytes = 2 * (copied ? scratch.row_ld : args.in.column_stride);
    const char* const rows = reinterpret_cast<const char*>(copied ? scratch.row : in);
    constexpr int64_t position = size * static_cast<int64_t>(sizeof(float));
    const int64_t block_bytes = scratch.block_size * static_cast<int64_t>(sizeof(float));
    const TiledRows tiled(shape.in_width, kTile);
    TileProducts<N, WriteExpanded<N>> products(*static_cast<TileResults<N>*>(scratch.results));
    RowPlaces places(tiled.rows, tiled.present, position);
    const int64_t first_slot = begin % scratch.ring_rows;  // a division a block would take a tenth of its time
    for (; column < column_end; column += N * kTile) {
      float* const ring_column = scratch.ring + column / size * scratch.block_size;
      const TileOperand b = weights_from(packed.expand, column, packed.in_steps);
      const StartAt bias{packed.expand_bias + column, 0};
      in_tile_blocks(tiled, begin, end, [&](auto tiles, int64_t y, int64_t x, int64_t next_y, int64_t next_x) {
        constexpr int M = decltype(tiles)::value;
        const auto at = [&](int64_t row, int64_t pixel) {
          const int64_t slot = first_slot + row - begin, wrapped = slot < scratch.ring_rows ? slot : slot - scratch.ring_rows;
          float* const in_ring = ring_column + wrapped * scratch.row_size;
          return reinterpret_cast<char*>(in_ring) + (shape.dilation + pixel) * position;
        };
        char* const to = at(y, x);
        const TileOperand a{rows + y * row_bytes + x * pixel_bytes, (next_y - y) * row_bytes + (next_x - x) * pixel_bytes,
                            2 * kTileDepth, pixel_bytes};
        const int64_t* const to_rows = places.of(at(next_y, next_x) - to, at(y, shape.in_width + shape.dilation) - to);
        products.template block<M>(a, b, packed.in_steps, bias, {to, to_rows, block_bytes}, M * kTile);
      });
    }
    products.finish();
  }

  void expand(int64_t begin, int64_t end, bool copied) const {
    const int64_t pairs_end = packed.blocks / 2 * kBlockSide;
    expand<2>(begin, end, copied, 0, pairs_end);
    expand<1>(begin, end, copied, pairs_end, packed.blocks * size);
  }

  void expand(int64_t begin, int64_t end) const {
    if (reads_in_place) {
      const bool shallow = pairs_of(args.in) < kTilePairs;
      if (shallow) load_configuration(TileConfiguration(kTile, pairs_of(args.in)));
      expand(begin, end, false);
      if (shallow) load_configuration(TileConfiguration(kTile));
      return;
    }
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t x = 0; x < shape.in_width && shape.in_channels > 0; ++x)  // an empty map has a null pointer
        std::memcpy(scratch.row + x * scratch.row_ld, in + y * args.in.row_stride + x * args.in.column_stride,
                    static_cast<std::size_t>(shape.in_channels) * sizeof *in);
      expand(y, y + 1, true);
    }
  }

  // buffer[i] = SiLU(depthwise) of output pixels (y, x + i), i < count
  template <int kStride, int kDilation>
  void filter(int64_t y, int64_t x, int64_t count, bfloat16* buffer) const {
    const float* row[3];
    int64_t step[3];
    for (int i = 0; i < 3; ++i) {
      const int64_t at = y * shape.stride + (i - 1) * shape.dilation;
      const bool inside = at >= 0 && at < shape.in_height;
      row[i] = (inside ? ring_row(at) : scratch.zeros) + x * shape.stride * size;
      step[i] = inside ? scratch.block_size : 0;
    }
    for (int64_t c = 0; c < packed.blocks * size; c += size) {
      const TileDepthwise<kStride, kDilation> depthwise(packed.depthwise + c * 9, packed.depthwise_bias + c, shape.stride,
                                                        shape.dilation);
      depthwise.run(row, count, buffer + c, packed.hidden);
      for (int i = 0; i < 3; ++i) row[i] += step[i];
    }
  }

  void filter_any(int64_t y, int64_t x, int64_t count, bfloat16* buffer) const {
    if (shape.dilation == 1 && shape.stride == 1)
      filter<1, 1>(y, x, count, buffer);
    else if (shape.dilation == 1)
      filter<2, 1>(y, x, count, buffer);
    else
      filter<0, 0>(y, x, count, buffer);
  }

  // Projects the buffer to `count` output pixels from (y, x) on, in row-major order.
  template <int N, bool kResidual>
  void project(const ProjectedPixels& to, int64_t count, int64_t column) const {
    const int64_t hidden_bytes = 2 * packed.hidden;
    const TileOperand b = weights_from(packed.project, column, packed.hidden_steps);
    const StartAt bias{packed.project_bias + column, 0};
    const __mmask32 channels = written_channels(args.out, shape.out_channels, column);
    const __mmask32 in_channels = kResidual ? written_channels(args.in, shape.in_channels, column) : 0;
    TileProducts<N, WriteProjected<N, kResidual>> products(*static_cast<TileResults<N>*>(scratch.results));
    for (int64_t i = 0; i < count; i += kBlockPixels) {
      const TileOperand a{reinterpret_cast<const char*>(scratch.buffer + i * packed.hidden), kTile * hidden_bytes,
                          2 * kTileDepth, hidden_bytes};
      const WriteProjected<N, kResidual> write{to.out + 2 * column, to.places + i,    channels,
                                               to.in + 2 * column,  to.in_places + i, in_channels};
      const int present = static_cast<int>(smaller(count - i, kBlockPixels));
      if (present > kTile)
        products.template block<2>(a, b, packed.hidden_steps, bias, write, present);
      else
        products.template block<1>(a, b, packed.hidden_steps, bias, write, present);
    }
    products.finish();
  }

  void project(int64_t y, int64_t x, int64_t count, ProjectedPixels& to) const {
    to.out = reinterpret_cast<char*>(out + y * args.out.row_stride + x * args.out.column_stride);
    to.in = reinterpret_cast<const char*>(in + y * args.in.row_stride + x * args.in.column_stride);
    if (to.count != count) {  // usually the first time alone
      to.count = count;
      for (int64_t i = 0, row = 0, pixel = 0; i < count; ++i) {
        to.places[i] = 2 * (row * args.out.row_stride + pixel * args.out.column_stride);
        to.in_places[i] = 2 * (row * args.in.row_stride + pixel * args.in.column_stride);
        if (++pixel == shape.out_width()) ++row, pixel = 0;
      }
    }
    for (int64_t i = count; i < round_up(count, kPieceRows); ++i) {
      to.places[i] = scratch.nowhere - to.out;
      to.in_places[i] = scratch.nowhere - to.in;
    }
    for (int64_t column = 0; column < shape.out_channels; column += kBlockSide)
      with_tile_columns(column, shape.out_channels, [&](auto tiles, int64_t) {
        constexpr int N = decltype(tiles)::value;
        if (shape.residual)
          project<N, true>(to, count, column);
        else
          project<N, false>(to, count, column);
      });
  }

  void run(int64_t begin, int64_t end) const {
    const Tiles configured;
    clear();
    ProjectedPixels projected;
    const int64_t first = begin * shape.stride - shape.dilation, width = shape.out_width();
    int64_t next = first > 0 ? first : 0;
    for (int64_t y = begin; y < end; y += scratch.group) {
      const int64_t rows = smaller(scratch.group, end - y);
      const int64_t needed = smaller(shape.in_height, (y + rows - 1) * shape.stride + shape.dilation + 1);
      if (next < needed) expand(next, needed);
      next = needed > next ? needed : next;
      if (scratch.group > 1) {
        for (int64_t i = 0; i < rows; ++i) filter_any(y + i, 0, width, scratch.buffer + i * width * packed.hidden);
        project(y, 0, rows * width, projected);
        continue;
      }
      for (int64_t x = 0; x < width; x += scratch.pixels) {
        const int64_t count = smaller(scratch.pixels, width - x);
        filter_any(y, x, count, scratch.buffer);
        project(y, x, count, projected);
      }
    }
  }
};

inline void inverted_residual_on_tiles(const InvertedResidualArgs& args, int64_t image, int64_t begin, int64_t end,
                                       void* scratch) {
  TileInvertedResidual(args, image, scratch).run(begin, end);
}

}  // namespace MVIT_ISA
}  // namespace mvit
