// SPDX-License-Identifier: Apache-2.0
// Interface between the bindings of the row-wise operators and their kernels: arguments, and launch plans with their
// threads and shared memory. Rows and weights are contiguous and aligned to 16 bytes; widths are multiples of 8.
#pragma once

#include <cstdint>

#include "shared_rows.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

constexpr int kMostNormChannels = 256;  // normalised rows pass through registers

struct Norm {
  const void *weight, *bias;
  bool weight_in_float, bias_in_float;  // else in x's dtype
  float eps;
};

// act(LN(x) Wᵀ + b), or residual + x Wᵀ + b.
struct RowProduct {
  const void *x, *weight, *bias;  // bias may be null
  void* out;
  int64_t count;  // number of rows
  int channels, out_channels;
  bool silu;               // layer_norm_linear only
  Norm norm;               // layer_norm_linear only
  float *mean, *rstd;      // layer_norm_linear only
  const void* residual;    // linear_residual only
};

// x + fc2(silu(fc1(LN(x)))).
struct RowMlp {
  const void *x, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  void* out;
  int64_t count;
  int channels, hidden_channels;
  Norm norm;
  float *mean, *rstd;
};

// A block of row_product_kernel holds 32 rows per warp with all their channels, and two slots of 64 rows of weights
// with at most 256 channels each. Block y processes `column_tiles` tiles of 64 columns, from tile
// y · column_tiles on.
constexpr int kColumnTile = 64, kMostDepth = 256;

struct RowProductPlan {
  int warps, column_tiles, blocks_y;
  int depth, depths;  // channels per slot, and the number of slots that make up all channels
  int shared_bytes;   // exceeds the limit if the rows do not fit
};

inline RowProductPlan plan_row_product(int64_t count, int channels, int out_channels, int multiprocessors,
                                       int shared_limit) {
  RowProductPlan plan{};
  plan.depths = (channels + kMostDepth - 1) / kMostDepth;
  plan.depth = plan.depths == 1 ? channels : ((channels + plan.depths - 1) / plan.depths + 15) / 16 * 16;
  const auto bytes = [&](int warps) {
    return 32 * warps * shared_row_bytes(channels) + 2 * kColumnTile * shared_row_bytes(plan.depth);
  };
  const int tiles = (out_channels + kColumnTile - 1) / kColumnTile;
  const auto blocks = [&](int warps) { return (count + 32 * warps - 1) / (32 * warps); };
  plan.warps = 4;
  while (plan.warps > 2 && bytes(plan.warps) > shared_limit / 2 - 1024) plan.warps /= 2;  // two blocks hide latency
  while (plan.warps > 1 && bytes(plan.warps) > shared_limit) plan.warps /= 2;
  while (plan.warps > 1 && blocks(plan.warps) * tiles < multiprocessors) plan.warps /= 2;
  plan.blocks_y = 1;
  while (plan.blocks_y < tiles && blocks(plan.warps) * plan.blocks_y < 2 * multiprocessors) ++plan.blocks_y;
  plan.column_tiles = (tiles + plan.blocks_y - 1) / plan.blocks_y;
  plan.blocks_y = (tiles + plan.column_tiles - 1) / plan.column_tiles;
  plan.shared_bytes = bytes(plan.warps);
  return plan;
}

// A block of layer_norm_mlp_kernel holds 64 rows, their hidden values for 64 hidden units at a time, and the parts of
// both weights for these units.
constexpr int kMlpRows = 64, kMlpWarps = 8, kMlpColumnParts = 4, kHiddenTile = 64;

inline int row_mlp_shared_bytes(int channels) {
  return (kMlpRows + kHiddenTile) * shared_row_bytes(channels) +
         (kMlpRows + (channels + 15) / 16 * 16) * shared_row_bytes(kHiddenTile);
}

// Kernel launches; each returns a cudaError_t.
template <bool HALF>  // false: bfloat16
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);
template <bool HALF>
int launch_layer_norm_mlp(const RowMlp& args, CUstream_st* stream);

}  // namespace mvit
