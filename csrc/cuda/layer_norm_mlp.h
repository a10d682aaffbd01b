// SPDX-License-Identifier: Apache-2.0
// Launch plans of layer_norm_mlp_kernel.cu, shared by its binding and the kernels.
//
// A warp has 16 rows (a tile) and takes the hidden units in chunks of 32. Of many rows, a block has several tiles at
// once, one a warp, and the weights pass through a ring of slots in shared memory, a chunk each. Where the slots are all
// of the chunks, the weights stay, and from its second tile on no warp waits for another. Of few rows, a block has one
// tile, its warps share out the chunks, and read the weights from global memory.
#pragma once

#include <type_traits>

#include "rows.h"

namespace mvit {

constexpr int kMlpRows = 16, kMlpChunk = 32;
// Fewer rows than this would leave most warps of the ring's blocks without a tile. The two sum in different orders, so
// the choice is by the call's shape and not by the GPU.
constexpr int64_t kFewMlpRows = 2048;
constexpr int kMostMlpGroup = 4;

// The kernels are compiled for these numbers of tiles of 16 channels; rows are filled up with zeros. Wider rows than the
// first has are always `few`.
constexpr int kMlpTiles[] = {4, 5, 6, 8, 9, 12, 15}, kFewMlpTiles[] = {6, 9, 12, 16};

template <int N>
constexpr int tiles_of(const int (&list)[N], int channels) {
  for (const int tiles : list)
    if (channels <= 16 * tiles) return tiles;
  return 0;
}
// call(tiles) with that number as a constant.
template <const auto& LIST, int I = 0, typename Call>
int with_tiles(int channels, const Call& call) {
  if constexpr ((I + 1) * sizeof LIST[0] < sizeof LIST)
    if (channels > 16 * LIST[I]) return with_tiles<LIST, I + 1>(channels, call);
  return call(std::integral_constant<int, LIST[I]>{});
}

// Warps of a block, by the registers that a thread has: 12 for each tile, and some 60. An even number.
constexpr int mlp_warps(int tiles) { return tiles <= 5 ? 16 : tiles <= 9 ? 12 : 8; }
// The few rows' warps have more weights in registers, and no normalised rows.
constexpr int few_mlp_warps(int tiles) { return tiles <= 6 ? 16 : tiles <= 9 ? 12 : 8; }

// Shared memory of a chunk of fc1, of fc2 and of fc1's bias, and of a warp's slice: the rows that it has next.
constexpr int mlp_chunk_bytes(int tiles) {
  return line_bytes(kMlpChunk, 2 * tiles) + line_bytes(16 * tiles, kMlpChunk / 8) + 2 * kMlpChunk;
}
constexpr int mlp_slice_bytes(int channels) { return kMlpRows * lane_row_bytes(channels); }
// LayerNorm's weight and bias and fc2's bias, in float32.
constexpr int mlp_vector_bytes(int tiles) { return 3 * 4 * 16 * tiles; }

struct RowMlpPlan {
  bool few;
  int blocks, warps;
  int chunks;  // of hidden units
  int slots;   // of the ring
  int group;   // chunks from one barrier to the next, in which warps may be at different ones
  int shared_bytes;  // exceeds the limit if the rows do not fit
};

inline RowMlpPlan plan_row_mlp(int64_t count, int channels, int hidden_channels, int multiprocessors, int shared_limit,
                               int64_t few_rows = kFewMlpRows) {
  const int slice = mlp_slice_bytes(channels);
  const int64_t row_tiles = (count + kMlpRows - 1) / kMlpRows;
  RowMlpPlan plan{};
  plan.chunks = (hidden_channels + kMlpChunk - 1) / kMlpChunk;
  plan.few = count <= few_rows || tiles_of(kMlpTiles, channels) == 0;
  const int tiles = plan.few ? tiles_of(kFewMlpTiles, channels) : tiles_of(kMlpTiles, channels);
  const int chunk = mlp_chunk_bytes(tiles);
  const int vectors = mlp_vector_bytes(tiles);
  if (plan.few) {
    plan.warps = few_mlp_warps(tiles);
    plan.blocks = static_cast<int>(row_tiles);
    if (plan.chunks < plan.warps) plan.warps = plan.chunks;
    plan.shared_bytes = vectors + slice + plan.warps / 2 * kMlpRows * 16 * tiles * 4;  // sums of half of the warps
    return plan;
  }
  plan.warps = mlp_warps(tiles);
  const auto slots = [&] { return (shared_limit - vectors - plan.warps * slice) / chunk; };
  while (plan.warps > 2 && slots() < 2) plan.warps -= 2;
  const bool stay = plan.chunks <= slots();
  plan.group = slots() / 2 < kMostMlpGroup ? slots() / 2 : kMostMlpGroup;
  if (plan.group == 0) plan.group = 1;
  plan.slots = stay ? plan.chunks : 2 * plan.group;
  plan.blocks = static_cast<int>(row_tiles < multiprocessors ? row_tiles : multiprocessors);
  plan.shared_bytes = vectors + plan.slots * chunk + plan.warps * slice;
  return plan;
}

// Launches of a plan for many and for few rows; each returns a cudaError_t.
template <bool HALF>  // false: bfloat16
int launch_layer_norm_mlp(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream);
template <bool HALF>
int launch_few_rows_mlp(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream);

}  // namespace mvit
