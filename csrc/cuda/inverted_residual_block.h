// SPDX-License-Identifier: Apache-2.0
// What a block of inverted_residual has of a map: its place, copies of the pixels that its tile needs, the wide buffer's
// order, and the way from sums to the map that goes out.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "inverted_residual.h"

namespace mvit {

template <typename T, int CHANNELS, int OUT, int STRIDE, bool SMALL>
struct InvertedResidualBlock {
  static constexpr InvertedResidualLayout layout = inverted_residual_layout(CHANNELS, OUT, STRIDE, SMALL);
  static constexpr int ROWS = layout.tile.rows, COLUMNS = layout.tile.columns;  // of the output tile
  static constexpr int WARPS = layout.warps(), THREADS = 32 * WARPS, SHARES = layout.tile.shares;
  static constexpr int PATCH_ROWS = layout.tile.patch_rows, PATCH_COLUMNS = layout.patch_columns();
  static constexpr int PATCHES_OF_A_ROW = layout.patches_of_a_row();
  static constexpr int M = layout.pixels_of_a_lane() / 2;  // tiles of 16 pixels in a warp's product
  static constexpr int N = OUT / 8;                        // tiles of 8 output channels
  static constexpr int K = layout.padded() / 16;           // steps of 16 input channels
  static constexpr int EXPANDED_COLUMNS = layout.expanded_columns(), EXPANDED_PIXELS = layout.expanded_pixels();
  static constexpr int EXPANDED_TILES = layout.expanded_tiles();
  static constexpr int WIDE_ROW = layout.wide_row(), WIDE_BYTES = layout.wide_bytes();
  static constexpr int X = layout.x(), X_ROW = layout.x_row(), PLACES = layout.places();
  static constexpr int CHUNK_BYTES = layout.chunk_bytes(), BUFFERS = layout.tile.buffers;
  static_assert(layout.channels == CHANNELS && layout.padded() % 16 == 0 && CHANNELS % 8 == 0 && OUT % 8 == 0);
  static_assert(PATCHES_OF_A_ROW % 4 == 0 && ROWS % PATCH_ROWS == 0 && WARPS / SHARES * 8 * 2 * M == ROWS * COLUMNS);

  const InvertedResidualArgs& args;
  int64_t image;
  int tile_row, tile_column;          // of the tile's first output pixel
  int warp, patch_row, patch_column;  // of this lane's patch, in patches

  MVIT_DEVICE explicit InvertedResidualBlock(const InvertedResidualArgs& arguments) : args(arguments) {
    const int block = static_cast<int>(block_index()), tile = block % args.tiles;
    image = block / args.tiles;
    tile_row = tile / args.tiles_of_a_row * ROWS;
    tile_column = tile % args.tiles_of_a_row * COLUMNS;
    warp = warp_index();
    const int patch = warp / SHARES * 8 + lane_index() / 4;
    patch_row = patch / PATCHES_OF_A_ROW;
    patch_column = patch % PATCHES_OF_A_ROW;
  }

  // ------------------------------------------------------------------------------------------------- what is copied

  // Row and column in the image of a pixel of the expanded map.
  MVIT_DEVICE int row_of(int pixel) const { return tile_row * STRIDE - 1 + pixel / EXPANDED_COLUMNS; }
  MVIT_DEVICE int column_of(int pixel) const { return tile_column * STRIDE - 1 + pixel % EXPANDED_COLUMNS; }
  MVIT_DEVICE bool is_inside(int pixel) const {
    const int row = row_of(pixel), column = column_of(pixel);
    return pixel < EXPANDED_PIXELS && row >= 0 && row < args.height && column >= 0 && column < args.width;
  }

  MVIT_DEVICE void copy_x() const {
    constexpr int units = CHANNELS / 8, padded_units = 2 * K;
    const char* const from = static_cast<const char*>(args.in.data) + 2 * image * args.in.image;
    MVIT_ROLLED
    for (int i = thread_index(); i < 16 * EXPANDED_TILES * padded_units; i += THREADS) {
      const int pixel = i / padded_units, unit = i % padded_units;
      const bool valid = unit < units && is_inside(pixel);
      const int64_t at = valid ? 2 * (row_of(pixel) * args.in.row + column_of(pixel) * args.in.column) + 16 * unit : 0;
      copy_async<16>(X + pixel * X_ROW + 16 * unit, from + at, valid);
    }
  }

  // Place of a pixel's first half in a wide buffer, at `column` of a row: a line of 128 bytes has two pixels, each in
  // two halves of 32 bytes, four channels a lane. The halves' order within the line changes, by bits of the column that
  // make four pixels that are read at once (four columns apart) and four that are stored at once (neighbours) lie in
  // different banks. The second half is at `place ^ 32`.
  static MVIT_DEVICE int place_of(int column) {
    const int half = column % 2 * 2 ^ (column / 2 % 2) ^ (column / 4 % 4);
    return column / 2 * 128 + half * 32;
  }

  MVIT_DEVICE void prepare_places() const {
    MVIT_ROLLED
    for (int pixel = thread_index(); pixel < 16 * EXPANDED_TILES; pixel += THREADS) {
      const bool inside = is_inside(pixel);
      const int place = pixel / EXPANDED_COLUMNS * WIDE_ROW + place_of(pixel % EXPANDED_COLUMNS);
      store_shared(PLACES + 4 * pixel, inside ? place : -1);
      if (!inside && pixel < EXPANDED_PIXELS)
        MVIT_UNROLL
        for (int i = 0; i < 4 * BUFFERS; ++i)
          store_shared(i / 4 * WIDE_BYTES + (place ^ i / 2 % 2 * 32) + i % 2 * 16, Words4{});
    }
  }

  // --------------------------------------------------------------------------------------------------------- output

  // Output columns: of four adjacent tiles of 8 the lane with t = lane % 4 has eight adjacent columns, from 8t on; of
  // the two or the one that are left at the end, four or two. body(first tile, tiles, first column) for each group.
  template <typename Body>
  static MVIT_DEVICE void each_group(const Body& body) {
    const int t = lane_index() % 4;
    MVIT_UNROLL
    for (int n = 0; n + 3 < N; n += 4) body(n, std::integral_constant<int, 4>{}, 8 * n + 8 * t);
    if constexpr (N % 4 >= 2) body(N / 4 * 4, std::integral_constant<int, 2>{}, N / 4 * 32 + 4 * t);
    if constexpr (N % 2 == 1) body(N - 1, std::integral_constant<int, 1>{}, 8 * (N - 1) + 2 * t);
  }

  MVIT_DEVICE void start_with_bias(float (&sums)[M][N][4]) const {
    const auto* bias = reinterpret_cast<const float*>(args.weights + int64_t{args.chunks} * CHUNK_BYTES);
    each_group([&](int first, auto tiles, int column) {
      MVIT_UNROLL
      for (int i = 0; i < decltype(tiles)::value; ++i) {
        const auto two = warp % SHARES == 0 ? load_constant<Floats2>(bias + column + 2 * i) : Floats2{};
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          float(&four)[4] = sums[m][first + i];
          four[0] = four[2] = two.x, four[1] = four[3] = two.y;
        }
      }
    });
  }

  // The sums of the second share, through shared memory that nothing else needs any more, to those of the first.
  MVIT_DEVICE void join_shares(float (&sums)[M][N][4]) const {
    static_assert(SHARES == 1 || (STRIDE == 2 && WARPS / 2 * M * N * 512 <= PLACES));
    sync_threads();
    const Shared at = warp / 2 * M * N * 512 + lane_index() * 16;
    if (warp % 2 == 1) {
      MVIT_UNROLL
      for (int i = 0; i < M * N; ++i) {
        const float(&four)[4] = sums[i / N][i % N];
        store_shared(at + i * 512, Floats4{four[0], four[1], four[2], four[3]});
      }
    }
    sync_threads();
    if (warp % 2 == 1) return;
    MVIT_UNROLL
    for (int i = 0; i < M * N; ++i) {
      float(&four)[4] = sums[i / N][i % N];
      const auto more = load_shared<Floats4>(at + i * 512);
      four[0] += more.x, four[1] += more.y, four[2] += more.z, four[3] += more.w;
    }
  }

  template <int WORDS>
  using Part = std::conditional_t<WORDS == 4, Words4, std::conditional_t<WORDS == 2, Words2, uint32_t>>;

  MVIT_DEVICE void write(const float (&sums)[M][N][4]) const {
    MVIT_UNROLL
    for (int pixel = 0; pixel < 2 * M; ++pixel) {
      const int row = patch_row * PATCH_ROWS + pixel / PATCH_COLUMNS;
      const int column = patch_column * PATCH_COLUMNS + pixel % PATCH_COLUMNS;
      if (tile_row + row >= args.out_height || tile_column + column >= args.out_width) continue;
      char* const to = static_cast<char*>(args.out.data) +
                       2 * (image * args.out.image + (tile_row + row) * args.out.row +
                            (tile_column + column) * args.out.column);
      const Shared x = X + ((row + 1) * EXPANDED_COLUMNS + column + 1) * X_ROW;
      each_group([&](int first, auto tiles, int at) {
        constexpr int words = decltype(tiles)::value;
        union {
          Part<words> part;
          uint32_t word[words];
        } in{}, out;
        if constexpr (STRIDE == 1 && CHANNELS == OUT)
          if (args.residual) in.part = load_shared<Part<words>>(x + 2 * at);
        MVIT_UNROLL
        for (int i = 0; i < words; ++i) {
          const float(&four)[4] = sums[pixel / 2][first + i];
          out.word[i] = pack<T>(four[pixel % 2 * 2] + unpack_low<T>(in.word[i]),
                                four[pixel % 2 * 2 + 1] + unpack_high<T>(in.word[i]));
        }
        store_global(to + 2 * at, out.part);
      });
    }
  }
};

}  // namespace mvit
