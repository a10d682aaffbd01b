// SPDX-License-Identifier: Apache-2.0
// Launch plan of row_product_kernel.cu, shared by its bindings and the kernel.
//
// A block keeps the weights of `groups` groups of 32 result columns in shared memory for its whole life. Each of its
// warps works alone on 16 rows at a time, every (blocks_x · warps)-th tile, and has a slice of shared memory for the
// rows that it works on next. No result depends on the plan: a warp sums every element in one order.
#pragma once

#include "rows.h"

namespace mvit {

constexpr int kRowTile = 16, kColumnGroup = 32, kMostRowWarps = 16;

struct RowProductPlan {
  int warps, blocks_x;   // of 16 rows each; blocks along the rows
  int groups, blocks_y;  // groups of 32 columns a block, and the blocks that make up all of them
  int depth_tiles;       // of 16 channels, the last one padded with zeros
  int shared_bytes;      // exceeds the limit if not even one warp and one group fit
};

// Weights, bias and LayerNorm's parameters (float32 pairs), then a slice a warp. Python has the same for one warp and
// one group (product_bytes in mvit_kernels/backends/cuda/operators.py).
inline int64_t row_product_bytes(int channels, bool normed, int warps, int groups) {
  return int64_t{kColumnGroup * groups + kRowTile * warps} * shared_row_bytes((channels + 15) / 16 * 16) +
         2 * kColumnGroup * groups + (normed ? 8 * channels : 0);
}

// The quickest of all plans by an estimate in cycles: the copy of the weights; then, for each tile of a warp, what all
// warps read from shared memory (128 bytes a cycle: weights, rows, parameters) and the latency of one warp's own steps,
// of which other warps hide only a part.
inline RowProductPlan plan_row_product(const RowProduct& args, int multiprocessors, int shared_limit) {
  const int64_t depth = (args.channels + 15) / 16, tiles = (args.count + kRowTile - 1) / kRowTile;
  const int all_groups = (args.out_channels + kColumnGroup - 1) / kColumnGroup;
  const auto parts = [](int64_t all, int64_t most) { return (all + most - 1) / most; };
  RowProductPlan plan{};
  int64_t least = INT64_MAX;
  for (const int warps : {16, 12, 8, 4, 2, 1}) {
    for (int blocks_y = 1; blocks_y <= all_groups; ++blocks_y) {
      const auto groups = static_cast<int>(parts(all_groups, blocks_y));
      if (parts(all_groups, groups) != blocks_y) continue;
      const int64_t bytes = row_product_bytes(args.channels, !args.residual, warps, groups);
      const bool last = warps == 1 && groups == 1;
      if (bytes > shared_limit && !last) continue;
      const int64_t most_x = multiprocessors > blocks_y ? multiprocessors / blocks_y : 1;
      const int64_t wanted_x = parts(tiles, warps), blocks_x = wanted_x < most_x ? wanted_x : most_x;
      const int64_t shared = warps * (8 * depth * groups + 16 * depth);
      const int64_t alone = 300 + 60 * depth + groups * (150 + 35 * depth);
      const int64_t start = (kColumnGroup * groups + kRowTile * warps) * depth / 2;  // 64 bytes a cycle from L2
      const int64_t cycles = parts(blocks_x * blocks_y, multiprocessors) *
                             (start + parts(tiles, blocks_x * warps) * (shared + alone));
      if (cycles >= least && !(last && plan.warps == 0)) continue;
      least = cycles;
      plan = {warps, static_cast<int>(blocks_x), groups, blocks_y, static_cast<int>(depth),
              static_cast<int>(bytes < INT32_MAX ? bytes : INT32_MAX)};
    }
  }
  return plan;
}

template <bool HALF>  // false: bfloat16
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);

}  // namespace mvit
