// SPDX-License-Identifier: Apache-2.0
// The rows of one warp in the transformer kernel: loads from the map to shared memory, stores back, and LayerNorm
// statistics.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "transformer.h"

namespace mvit {

// Assignment of columns to lanes. Of two adjacent 16-column tiles 2i and 2i + 1, the lane with t = lane % 4 holds the
// eight columns from 32i + 8t on; of a single tile at the end, the four from 16k + 4t on. Each lane thus reads and
// writes the map directly, 16 bytes at a time. The order of columns in a product's sum is arbitrary; the packed weights
// use the same order.
template <int WIDTH>
struct Columns {
  template <int COUNT>
  static MVIT_DEVICE int first(int tile) {
    return 16 * tile + 4 * COUNT * (lane_index() % 4);
  }
  // At width 120 the last of every four lanes has no columns in the last two of the eight tiles.
  static MVIT_DEVICE bool has(int tile) {
    static_assert(WIDTH % 16 == 0 || WIDTH % 32 == 24);
    return WIDTH % 16 == 0 || first<2>(tile / 2 * 2) < WIDTH;
  }
};
template <int COUNT>  // a lane's share of a row in COUNT tiles
using Part = std::conditional_t<COUNT == 2, Words4, Words2>;
template <typename T, int WIDTH, int HEAD_DIM, int M>
struct TransformerRows {
  static constexpr TransformerLayout layout{WIDTH, HEAD_DIM};
  static constexpr int TILES = layout.tiles();  // tiles of 16 columns of x
  static constexpr int ROWS = 16 * M;           // rows per warp
  using Lanes = Columns<WIDTH>;

  // Loops over tiles are unrolled by the largest divisor up to 5: a whole layer has to fit in the instruction cache.
  static constexpr int group_of(int count) {
    int group = count < 5 ? count : 5;
    while (count % group) --group;
    return group;
  }

  const TransformerArgs& args;
  Shared own = tiles_from(warp_index() * M);  // the warp's first tile

  MVIT_DEVICE Shared tiles_from(int tile) const { return 2 * args.slot + tile * layout.tile_bytes(); }
  // Address of mean and 1 / σ of row g (+ 8) of tile m, g = lane / 4.
  MVIT_DEVICE Shared norm_of(int m, int half) const {
    return own + m * layout.tile_bytes() + layout.norms() + (half * 8 + lane_index() / 4) * 8;
  }
  // Address of this lane's fragment of 16 columns of tile m.
  MVIT_DEVICE Shared row_tile(int m, int tile) const {
    return own + m * layout.tile_bytes() + (tile * 32 + lane_index()) * 16;
  }

  // Address in the map of row g (+ 8) of the warp's tile m; null if there is no such row.
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
      // All are under way before the first is waited for: one by one, they are 2 to 4 % of a launch.
      Words4 pairs[TILES / 2][2];
      Words2 single[2];
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        MVIT_UNROLL
        for (int i = 0; i < TILES / 2; ++i) pairs[i][half] = read_part<2>(2 * i, from[half]);
        if constexpr (TILES % 2 == 1) single[half] = read_part<1>(TILES - 1, from[half]);
      }
      MVIT_UNROLL
      for (int i = 0; i < TILES / 2; ++i) {
        const Words4 &low = pairs[i][0], &high = pairs[i][1];
        store_shared(row_tile(m, 2 * i), Words4{low.x, high.x, low.y, high.y});
        store_shared(row_tile(m, 2 * i + 1), Words4{low.z, high.z, low.w, high.w});
      }
      if constexpr (TILES % 2 == 1)
        store_shared(row_tile(m, TILES - 1), Words4{single[0].x, single[1].x, single[0].y, single[1].y});
    }
  }

  // This lane's columns of COUNT adjacent tiles in the row that starts at `from`; zeros if there is none.
  template <int COUNT>
  MVIT_DEVICE Part<COUNT> read_part(int tile, const char* from) const {
    // Read anyway, from the map's start: with a branch for each, one load would wait for the other.
    const bool valid = from != nullptr && Lanes::has(tile);
    const char* const start = static_cast<const char*>(args.in.data);
    const char* const at = valid ? from + 2 * Lanes::template first<COUNT>(tile) : start;
    const auto part = load_constant<Part<COUNT>>(at);
    return valid ? part : Part<COUNT>{};
  }

  MVIT_DEVICE void write_rows() const {
    if (args.final_norm) statistics();
    const float* const weight = vector(args.layers);
    const float* const bias = vector(args.layers + 1);
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) {
      char* const to[2] = {find_row(m, 0, args.out), find_row(m, 1, args.out)};
      MVIT_ROLLED
      for (int pair = 0; pair < TILES / 2; ++pair) write_part<2>(m, 2 * pair, to, weight, bias);
      if constexpr (TILES % 2 == 1) write_part<1>(m, TILES - 1, to, weight, bias);
    }
  }

  template <int COUNT>
  MVIT_DEVICE void write_part(int m, int tile, char* const (&to)[2], const float* weight, const float* bias) const {
    const auto left = load_shared<Words4>(row_tile(m, tile));
    Words4 right{};
    if constexpr (COUNT == 2) right = load_shared<Words4>(row_tile(m, tile + 1));
    uint32_t y[2][4] = {{left.x, left.z, right.x, right.z}, {left.y, left.w, right.y, right.w}};
    if (args.final_norm)
      MVIT_UNROLL
      for (int i = 0; i < 2 * COUNT; ++i) {
        const Floats2 scale = vector_part(weight, tile, i), shift = vector_part(bias, tile, i);
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const auto norm = load_shared<Floats2>(norm_of(m, half));
          y[half][i] = pack<T>((unpack_low<T>(y[half][i]) - norm.x) * norm.y * scale.x + shift.x,
                               (unpack_high<T>(y[half][i]) - norm.x) * norm.y * scale.y + shift.y);
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

  // The float32 vectors after the layers' matrices: fc2's bias per layer, then weight and bias of the final LayerNorm.
  //
  // Of the layout only constants: kv_parts() and proj_parts() find their divisors by loops, which would run on the GPU
  // wherever one of the arguments is known at run time only. On an H200 they took a third to a half of the kernel.
  MVIT_DEVICE const float* vector(int index) const {
    constexpr int64_t attention_bytes = layout.layer_bytes(0), mlp_bytes = layout.mlp_chunk();
    const unsigned char* vectors = args.weights + args.layers * (attention_bytes + args.hidden_chunks * mlp_bytes);
    return reinterpret_cast<const float*>(vectors) + index * layout.padded();
  }

  // The i-th pair of a vector's values for this lane's columns of `tile` and the next one.
  static MVIT_DEVICE Floats2 vector_part(const float* vector, int tile, int i) {
    return load_constant<Floats2>(vector + 16 * tile + 8 * i + lane_index() % 4 * 2);
  }

  // Computes mean and 1 / σ of the warp's rows into shared memory, since the eight registers are needed elsewhere.
  //
  // Two passes: the one-pass formula, E[x²] − E[x]², cancels where the mean is large.
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
    sync_warp();  // the previous statistics have been read
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float rstd = rsqrt_approximate(sum_of_row(sum[m][half]) * (1.0f / WIDTH) + args.eps);
        if (lane_index() % 4 == 0) store_shared(norm_of(m, half), Floats2{mean[m][half], rstd});
      }
    sync_warp();
  }

  // body(m, tile, half, low, high) for every pair of values of x that this lane holds.
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

  // x += d, for the 16 columns of the tile.
  MVIT_DEVICE void add_to_rows(int m, int tile, const float (&left)[4], const float (&right)[4]) const {
    const auto x = load_shared<Words4>(row_tile(m, tile));
    store_shared(row_tile(m, tile), Words4{pack<T>(unpack_low<T>(x.x) + left[0], unpack_high<T>(x.x) + left[1]),
                                           pack<T>(unpack_low<T>(x.y) + left[2], unpack_high<T>(x.y) + left[3]),
                                           pack<T>(unpack_low<T>(x.z) + right[0], unpack_high<T>(x.z) + right[1]),
                                           pack<T>(unpack_low<T>(x.w) + right[2], unpack_high<T>(x.w) + right[3])});
  }
};

}  // namespace mvit
