// SPDX-License-Identifier: Apache-2.0
// Launch plan of row_product_kernel.cu, shared by its bindings and the kernel.
//
// A block keeps the weights of `groups` groups of 32 result columns in shared memory for its whole life. Each of its
// warps works alone on 16 · row_tiles rows at a time, then on those blocks_x · warps times as far down, and has a slice
// of shared memory for the rows that it works on next. No result depends on the plan: every element is summed in one
// order.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mvit {

constexpr int kColumnGroup = 32;
constexpr int kMostDepthTiles = 16;  // of 16 channels, that a warp's 16 rows in registers may have

// For layer_norm_linear, the widths of MobileViT xxs, xs and s, in tiles of 16 channels, have kernels of their own, in
// which a warp has 32 rows: that halves its reads of the weights, and wants up to 255 registers. linear_residual is
// bound by the bytes that it moves either way.
#define MVIT_DEPTHS MVIT_DEPTH(4) MVIT_DEPTH(5) MVIT_DEPTH(6) MVIT_DEPTH(8) MVIT_DEPTH(9) MVIT_DEPTH(12) MVIT_DEPTH(15)
constexpr int row_tiles_of(int depth_tiles) {
#define MVIT_DEPTH(DEPTH) || depth_tiles == DEPTH
  return (false MVIT_DEPTHS) ? 2 : 1;
#undef MVIT_DEPTH
}
constexpr int row_warps_of(int depth_tiles) { return 16 / row_tiles_of(depth_tiles); }

struct RowProductPlan {
  int row_tiles;         // 1, or 2 in kernels of one width
  int warps, blocks_x;   // blocks along the rows
  int groups, blocks_y;  // groups of 32 columns a block, and the blocks that make up all of them
  int depth_tiles;       // of 16 channels, the last one padded with zeros
  int shared_bytes;      // exceeds the limit if not even one warp and one group fit
};

// Weights, bias, LayerNorm's parameters (as float32 pairs and as they come), then a slice a warp. Python has the same
// for one warp, one row tile and one group (product_bytes in mvit_kernels/backends/cuda/operators.py).
inline int64_t row_product_bytes(int channels, bool normed, int row_tiles, int warps, int groups) {
  return int64_t{kColumnGroup * groups + 16 * row_tiles * warps} * shared_row_bytes((channels + 15) / 16 * 16) +
         2 * kColumnGroup * groups + (normed ? 16 * channels : 0);
}

inline int64_t rounded_up(int64_t all, int64_t most) { return (all + most - 1) / most; }

// The plan with these numbers: the rest follows from them.
inline RowProductPlan row_product_plan(const RowProduct& args, int row_tiles, int warps, int64_t blocks_x, int groups) {
  const int64_t bytes = row_product_bytes(args.channels, !args.residual, row_tiles, warps, groups);
  const int64_t blocks_y = rounded_up(rounded_up(args.out_channels, kColumnGroup), groups);
  return {row_tiles, warps, static_cast<int>(blocks_x), groups, static_cast<int>(blocks_y), (args.channels + 15) / 16,
          static_cast<int>(bytes < INT32_MAX ? bytes : INT32_MAX)};
}

// An estimate in cycles of what a plan takes: the copy of the weights (64 bytes a cycle from L2); then, for each turn
// of a warp, what all warps read from shared memory (128 bytes a cycle: weights, rows, parameters) and the latency of
// one warp's own steps, of which other warps hide only a part.
inline int64_t row_product_cycles(const RowProduct& args, const RowProductPlan& plan, int multiprocessors) {
  const int64_t depth = plan.depth_tiles, row_tiles = plan.row_tiles;
  const int64_t copied = (kColumnGroup * plan.groups + 16 * row_tiles * plan.warps) * depth / 2;
  const int64_t shared = plan.warps * (8 * depth * plan.groups + 16 * depth * row_tiles);
  const int64_t alone = 300 + 60 * depth * row_tiles + plan.groups * (150 + 35 * depth) * (1 + row_tiles) / 2;
  const int64_t turns = rounded_up(args.count, int64_t{16} * row_tiles * plan.warps * plan.blocks_x);
  return rounded_up(int64_t{plan.blocks_x} * plan.blocks_y, multiprocessors) * (copied + turns * (shared + alone));
}

// The quickest plan by that estimate, with no more blocks than multiprocessors. If none fits, the smallest.
inline RowProductPlan plan_row_product(const RowProduct& args, int multiprocessors, int shared_limit) {
  RowProductPlan best = row_product_plan(args, 1, 1, 1, 1);
  const int64_t all_groups = rounded_up(args.out_channels, kColumnGroup);
  int64_t least = INT64_MAX;
  const int most_row_tiles = args.residual ? 1 : row_tiles_of(best.depth_tiles);
  for (int row_tiles = 1; row_tiles <= most_row_tiles; ++row_tiles) {
    for (const int warps : {16, 12, 8, 6, 4, 2, 1}) {
      if (row_tiles * warps > 16) continue;
      for (int64_t blocks_y = 1, before = 0; blocks_y <= all_groups; ++blocks_y) {
        const int64_t groups = rounded_up(all_groups, blocks_y), all_x = rounded_up(args.count, 16 * row_tiles * warps);
        if (groups == before) continue;
        before = groups;
        const int64_t most_x = multiprocessors > blocks_y ? multiprocessors / blocks_y : 1;
        const RowProductPlan plan =
            row_product_plan(args, row_tiles, warps, all_x < most_x ? all_x : most_x, static_cast<int>(groups));
        const int64_t cycles = row_product_cycles(args, plan, multiprocessors);
        if (plan.shared_bytes <= shared_limit && cycles < least) least = cycles, best = plan;
      }
    }
  }
  return best;
}

template <bool HALF>  // false: bfloat16
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);

}  // namespace mvit
