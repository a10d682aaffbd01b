// SPDX-License-Identifier: Apache-2.0
// A warp's rows in the transformer kernel: from the map to shared memory and back, and their means and deviations.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "transformer.h"

namespace mvit {

// Which columns a lane holds. Of two 16-column tiles side by side, 2i and 2i + 1, the lane with t = lane % 4 has the eight
// columns from 32i + 8t on, of a tile alone at the end the four from 16k + 4t on: so a lane reads and writes a map
// directly, 16 bytes at a time. Products do not ask in which order columns are summed; the packed weights follow.
template <int WIDTH>
struct Columns {
  template <int COUNT>
  static MVIT_DEVICE int first(int tile) {
    return 16 * tile + 4 * COUNT * (lane_index() % 4);
  }
  // Of width 120 the last lane of four has no columns in the last two of eight tiles.
  static MVIT_DEVICE bool has(int tile) {
    static_assert(WIDTH % 16 == 0 || WIDTH % 32 == 24);
    return WIDTH % 16 == 0 || first<2>(tile / 2 * 2) < WIDTH;
  }
};
template <int COUNT>  // of a row in COUNT tiles
using Part = std::conditional_t<COUNT == 2, Words4, Words2>;
template <typename T, int WIDTH, int HEAD_DIM, int M>
struct TransformerRows {
  static constexpr TransformerLayout layout{WIDTH, HEAD_DIM};
  static constexpr int TILES = layout.tiles();  // of 16 columns of x
  static constexpr int ROWS = 16 * M;           // of a warp
  using Lanes = Columns<WIDTH>;

  // Loops over tiles are unrolled by the largest divisor up to 5: all of a layer is to fit in the instruction cache.
  static constexpr int group_of(int count) {
    int group = count < 5 ? count : 5;
    while (count % group) --group;
    return group;
  }

  const TransformerArgs& args;
  Shared own = tiles_from(warp_index() * M);  // the warp's tiles

  static MVIT_DEVICE Shared tiles_from(int tile) { return 2 * layout.slot() + tile * layout.tile_bytes(); }
  // Where mean and 1 / σ are of the row g (+ 8) of tile m.
  MVIT_DEVICE Shared norm_of(int m, int half) const {
    return own + m * layout.tile_bytes() + layout.norms() + (half * 8 + lane_index() / 4) * 8;
  }
  // Where the lane's part is of sixteen columns of tile m.
  MVIT_DEVICE Shared row_tile(int m, int tile) const {
    return own + m * layout.tile_bytes() + (tile * 32 + lane_index()) * 16;
  }

  // Where in the map the row g (+ 8) of the warp's tile m is; null where there is none.
  MVIT_DEVICE char* find_row(int m, int half, const TransformerMap& map) const {
    const int row = warp_index() * ROWS + m * 16 + half * 8 + lane_index() / 4;
    const int sequence = static_cast<int>(block_index()) * args.sequences_of_a_block + row / args.padded_tokens;
    const int token = row % args.padded_tokens;
    if (sequence >= args.sequences || token >= args.tokens) return nullptr;
    const int places = args.patch_height * args.patch_width, place = sequence % places;
    const int y = token / args.patch_columns * args.patch_height + place / args.patch_width;
    const int x = token % args.patch_columns * args.patch_width + place % args.patch_width;
    return static_cast<char*>(map.data) + 2 * (sequence / places * map.image + y * map.row + x * map.column);
  }

  MVIT_DEVICE void read_rows() const {
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) {
      const char* const from[2] = {find_row(m, 0, args.in), find_row(m, 1, args.in)};
      MVIT_ROLLED
      for (int pair = 0; pair < TILES / 2; ++pair) read_part<2>(m, 2 * pair, from);
      if constexpr (TILES % 2 == 1) read_part<1>(m, TILES - 1, from);
    }
  }

  // The lane's columns of COUNT tiles, which are adjacent.
  template <int COUNT>
  MVIT_DEVICE void read_part(int m, int tile, const char* const (&from)[2]) const {
    Part<COUNT> part[2] = {};
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half)
      if (from[half] != nullptr && Lanes::has(tile))
        part[half] = load_constant<Part<COUNT>>(from[half] + 2 * Lanes::template first<COUNT>(tile));
    store_shared(row_tile(m, tile), Words4{part[0].x, part[1].x, part[0].y, part[1].y});
    if constexpr (COUNT == 2) store_shared(row_tile(m, tile + 1), Words4{part[0].z, part[1].z, part[0].w, part[1].w});
  }

  MVIT_DEVICE void write_rows() const {
    if (args.final_norm) statistics();
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) {
      char* const to[2] = {find_row(m, 0, args.out), find_row(m, 1, args.out)};
      MVIT_ROLLED
      for (int pair = 0; pair < TILES / 2; ++pair) write_part<2>(m, 2 * pair, to);
      if constexpr (TILES % 2 == 1) write_part<1>(m, TILES - 1, to);
    }
  }

  template <int COUNT>
  MVIT_DEVICE void write_part(int m, int tile, char* const (&to)[2]) const {
    const auto left = load_shared<Words4>(row_tile(m, tile));
    Words4 right{};
    if constexpr (COUNT == 2) right = load_shared<Words4>(row_tile(m, tile + 1));
    uint32_t y[2][4] = {{left.x, left.z, right.x, right.z}, {left.y, left.w, right.y, right.w}};
    if (args.final_norm)
      MVIT_UNROLL
      for (int i = 0; i < 2 * COUNT; ++i) {
        const Floats2 weight = vector_part(vector(args.layers), tile, i);
        const Floats2 bias = vector_part(vector(args.layers + 1), tile, i);
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const auto norm = load_shared<Floats2>(norm_of(m, half));
          y[half][i] = pack<T>((unpack_low<T>(y[half][i]) - norm.x) * norm.y * weight.x + bias.x,
                               (unpack_high<T>(y[half][i]) - norm.x) * norm.y * weight.y + bias.y);
        }
      }
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half)
      if (to[half] != nullptr && Lanes::has(tile)) {
        char* const at = to[half] + 2 * Lanes::template first<COUNT>(tile);
        if constexpr (COUNT == 2)
          store_global(at, Words4{y[half][0], y[half][1], y[half][2], y[half][3]});
        else
          store_global(at, Words2{y[half][0], y[half][1]});
      }
  }

  // Behind the layers' matrices: fc2's bias of each, and the last LayerNorm's weight and bias.
  MVIT_DEVICE const float* vector(int index) const {
    constexpr TransformerLayout sizes = layout;  // the class's own is not there on the device
    const unsigned char* vectors = args.weights + args.layers * sizes.layer_bytes(args.hidden_chunks);
    return reinterpret_cast<const float*>(vectors) + index * layout.padded();
  }

  // The i-th two of what a vector has for the lane's columns of a tile, and of the next.
  static MVIT_DEVICE Floats2 vector_part(const float* vector, int tile, int i) {
    return load_constant<Floats2>(vector + 16 * tile + 8 * i + lane_index() % 4 * 2);
  }

  // Mean and 1 / σ of the warp's rows, to shared memory: eight registers are wanted elsewhere.
  //
  // In two passes: the sum of squares less the square of the sum would cancel where the mean is large.
  MVIT_DEVICE void statistics() const {
    float sum[M][2] = {}, mean[M][2];
    each_tile([&](int m, int, int half, float low, float high) { sum[m][half] += low + high; });
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) mean[m][half] = mean_of(sum_of_row(sum[m][half]), WIDTH), sum[m][half] = 0;
    each_tile([&](int m, int tile, int half, float low, float high) {
      low -= mean[m][half], high -= mean[m][half];
      if (Lanes::has(tile)) sum[m][half] += low * low + high * high;
    });
    sync_warp();  // the last ones have been read
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float rstd = rsqrt_approximate(sum_of_row(sum[m][half]) * (1.0f / WIDTH) + args.eps);
        if (lane_index() % 4 == 0) store_shared(norm_of(m, half), Floats2{mean[m][half], rstd});
      }
    sync_warp();
  }

  // body(m, tile, half, low, high) for all that the lane has of x, two by two.
  template <typename Body>
  MVIT_DEVICE void each_tile(const Body& body) const {
    MVIT_ROLLED
    for (int group = 0; group < TILES; group += group_of(TILES))
      MVIT_UNROLL
      for (int tile = group; tile < group + group_of(TILES); ++tile)
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          const auto w = load_shared<Words4>(row_tile(m, tile));
          body(m, tile, 0, unpack_low<T>(w.x), unpack_high<T>(w.x));
          body(m, tile, 1, unpack_low<T>(w.y), unpack_high<T>(w.y));
          body(m, tile, 0, unpack_low<T>(w.z), unpack_high<T>(w.z));
          body(m, tile, 1, unpack_low<T>(w.w), unpack_high<T>(w.w));
        }
  }

  // x += d, of the tile's sixteen columns.
  MVIT_DEVICE void add_to_rows(int m, int tile, const float (&left)[4], const float (&right)[4]) const {
    const auto x = load_shared<Words4>(row_tile(m, tile));
    store_shared(row_tile(m, tile), Words4{pack<T>(unpack_low<T>(x.x) + left[0], unpack_high<T>(x.x) + left[1]),
                                           pack<T>(unpack_low<T>(x.y) + left[2], unpack_high<T>(x.y) + left[3]),
                                           pack<T>(unpack_low<T>(x.z) + right[0], unpack_high<T>(x.z) + right[1]),
                                           pack<T>(unpack_low<T>(x.w) + right[2], unpack_high<T>(x.w) + right[3])});
  }
};

}  // namespace mvit
