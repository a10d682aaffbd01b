// SPDX-License-Identifier: Apache-2.0
// layer_norm_linear (NORMED) and linear_residual. A block keeps its rows in shared memory; the weights are streamed
// through in tiles of 64 result columns, the next tile being prefetched while one is processed. A warp has 32 rows,
// which halves its reads of the weights compared with 16, and normalises its own rows.
#include <type_traits>

#include "launch.h"
#include "row_tiles.h"

namespace mvit {

template <typename T, bool NORMED>
MVIT_KERNEL(128, 3)
row_product_kernel(const RowProduct args, const RowProductPlan plan) {
  constexpr int kTiles = 2, kColumns = kColumnTile / 16;
  const int warp = warp_index(), lane = lane_index(), threads = 32 * plan.warps;
  const int64_t first = (block_index() * plan.warps + warp) * 32, left = args.count - first;
  const Shared stride = shared_row_bytes(args.channels), slot_stride = shared_row_bytes(plan.depth);
  const Shared rows = 32 * warp * stride, slots = 32 * plan.warps * stride, slot_bytes = kColumnTile * slot_stride;
  const int first_column = block_index_y() * plan.column_tiles * kColumnTile;
  const int last_column = first_column + plan.column_tiles * kColumnTile;
  const int columns = (last_column < args.out_channels ? last_column : args.out_channels) - first_column;
  const int stages = (columns + kColumnTile - 1) / kColumnTile * plan.depths;

  // Stages: the parts of the depth of one tile, then those of the next tile.
  const auto copy_weights = [&](int stage) {
    if (stage < stages) {
      const int column = first_column + stage / plan.depths * kColumnTile, k = stage % plan.depths * plan.depth;
      const int64_t row_bytes = 2 * args.channels;
      copy_matrix(slots + stage % 2 * slot_bytes, slot_stride,
                  static_cast<const char*>(args.weight) + column * row_bytes + 2 * k, row_bytes, kColumnTile,
                  plan.depth / 8, args.out_channels - column, (args.channels - k) / 8, thread_index(), threads);
    }
    commit_copies();
  };
  const int64_t x_bytes = 2 * args.channels;
  copy_matrix(rows, stride, static_cast<const char*>(args.x) + (left > 0 ? first * x_bytes : 0), x_bytes, 32,
              args.channels / 8, left, args.channels / 8, lane, 32);
  commit_copies();
  copy_weights(0);
  if constexpr (NORMED) {
    wait_copies<1>();
    sync_warp();
    float* mean = block_index_y() == 0 ? args.mean + first : nullptr;
    normalize_rows<T, 8>(rows, stride, args.norm, args.channels, mean, args.rstd + first, left);
  }
  wait_copies<0>();
  sync_threads();

  float sums[kTiles][kColumns][2][4];
  MVIT_ROLLED
  for (int stage = 0; stage < stages; ++stage) {
    copy_weights(stage + 1);
    const int part = stage % plan.depths, k = part * plan.depth;
    const int column = first_column + stage / plan.depths * kColumnTile;
    const int depth = args.channels - k < plan.depth ? args.channels - k : plan.depth;
    const int tiles = (args.out_channels - column + 15) / 16;
    if (part == 0) {
      MVIT_UNROLL
      for (int i = 0; i < kTiles * kColumns * 8; ++i) sums[i / 8 / kColumns][i / 8 % kColumns][i / 4 % 2][i % 4] = 0;
    }
    if (left > 0)
      multiply_shared<T>(sums, rows + 2 * k, stride, slots + stage % 2 * slot_bytes, slot_stride, 16 * slot_stride,
                         depth, tiles);
    if (part + 1 == plan.depths) {
      MVIT_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int c = column + 16 * n + 8 * half + lane % 4 * 2;
          if (c >= args.out_channels) continue;
          const uint32_t bias = args.bias ? load_constant<uint32_t>(static_cast<const char*>(args.bias) + 2 * c) : 0;
          MVIT_UNROLL
          for (int i = 0; i < 2 * kTiles; ++i) {
            const int row = 8 * i + lane / 4;
            if (row >= left) continue;
            const int64_t place = 2 * ((first + row) * args.out_channels + c);
            float low = sums[i / 2][n][half][i % 2 * 2] + unpack_low<T>(bias);
            float high = sums[i / 2][n][half][i % 2 * 2 + 1] + unpack_high<T>(bias);
            if constexpr (NORMED) {
              if (args.silu) low = silu<T>(low), high = silu<T>(high);
            } else {
              const auto residual = load_constant<uint32_t>(static_cast<const char*>(args.residual) + place);
              low += unpack_low<T>(residual), high += unpack_high<T>(residual);
            }
            store_global(static_cast<char*>(args.out) + place, pack<T>(low, high));
          }
        }
      }
    }
    wait_copies<0>();
    sync_threads();  // the next tile is there for all warps, and all are done with this one
  }
}

template <bool HALF>
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  const int64_t rows = 32 * plan.warps;
  return launch(args.residual ? row_product_kernel<T, false> : row_product_kernel<T, true>,
                dim3(static_cast<unsigned>((args.count + rows - 1) / rows), plan.blocks_y), 32 * plan.warps,
                plan.shared_bytes, stream, args, plan);
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_row_product<kHalf>(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);
#endif

}  // namespace mvit
