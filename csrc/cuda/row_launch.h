// SPDX-License-Identifier: Apache-2.0
// Launches of the row-wise operators' kernels, for the files that compile them for one dtype each.
#pragma once

#include "launch.h"
#include "layer_norm_mlp_kernel.h"
#include "row_product_kernel.h"

namespace mvit {

template <bool HALF>
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  const int64_t rows = 32 * plan.warps;
  return launch(args.residual ? row_product_kernel<T, false> : row_product_kernel<T, true>,
                dim3(static_cast<unsigned>((args.count + rows - 1) / rows), plan.blocks_y), 32 * plan.warps,
                plan.shared_bytes, stream, args, plan);
}

// With the least tiles of columns a warp that hold the rows: each is 16 registers.
template <bool HALF, int COLUMNS = 1>
int launch_layer_norm_mlp_of(const RowMlp& args, CUstream_st* stream) {
  constexpr int kHeld = 16 * kMlpColumnParts * COLUMNS;
  if constexpr (kHeld < kMostNormChannels)
    if (args.channels > kHeld) return launch_layer_norm_mlp_of<HALF, COLUMNS + 1>(args, stream);
  return launch(layer_norm_mlp_kernel<std::conditional_t<HALF, Half, BFloat16>, COLUMNS>,
                dim3(static_cast<unsigned>((args.count + kMlpRows - 1) / kMlpRows)), 32 * kMlpWarps,
                row_mlp_shared_bytes(args.channels), stream, args);
}

template <bool HALF>
int launch_layer_norm_mlp(const RowMlp& args, CUstream_st* stream) {
  return launch_layer_norm_mlp_of<HALF>(args, stream);
}

}  // namespace mvit
