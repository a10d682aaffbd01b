// SPDX-License-Identifier: Apache-2.0
// layer_norm_linear (NORMED) and linear_residual. The weights stay in shared memory; every warp goes its own way through
// the rows (row_product.h). It takes 16 rows from its slice into registers, starts the copy of its next 16 into the same
// slice, normalises, and multiplies by one group of 32 columns after the other. Once the weights are there, no warp
// waits for another.
//
// Rows of weights lie in shared memory in the order in which a lane then holds eight adjacent columns of the result
// (column_of), so that it reads and writes 16 bytes at a time.
#include <type_traits>

#include "launch.h"
#include "row_fragments.h"
#include "row_product.h"

namespace mvit {

// The column whose weights lie in a row of shared memory: row 8t + 2q + e of a group has column 8q + 2t + e. It is
// column 2q + e of the group's tile t, and so with the lanes l for which l % 4 = q.
MVIT_DEVICE int column_of(int row) { return row / 32 * 32 + row / 2 % 4 * 8 + row / 8 % 4 * 2 + row % 2; }

template <typename T, bool NORMED>
MVIT_KERNEL(32 * kMostRowWarps, 1)
row_product_kernel(const RowProduct args, const RowProductPlan plan) {
  const int warp = warp_index(), lane = lane_index(), threads = 32 * plan.warps;
  const Shared stride = shared_row_bytes(16 * plan.depth_tiles);
  const Shared bias = kColumnGroup * plan.groups * stride, parameters = bias + 2 * kColumnGroup * plan.groups;
  const Shared slice = parameters + (NORMED ? 8 * args.channels : 0) + kRowTile * warp * stride;
  const int row_bytes = 2 * args.channels, units = 2 * plan.depth_tiles, valid_units = args.channels / 8;
  const int first_column = block_index_y() * plan.groups * kColumnGroup, columns = args.out_channels - first_column;
  const int groups = columns < kColumnGroup * plan.groups ? (columns + kColumnGroup - 1) / kColumnGroup : plan.groups;
  const int64_t tiles = (args.count + kRowTile - 1) / kRowTile, step = int64_t{plan.blocks_x} * plan.warps;
  int64_t tile = block_index() * plan.warps + warp;
  // More channels than registers hold pass through them in parts, for each group anew; the slice is then in use until
  // the last group is done.
  const bool in_parts = !NORMED && plan.depth_tiles > kDepthTiles;

  const Walk walk = walk_of(units, lane, 32);
  const auto copy_tile = [&](int64_t which) {
    if (which < tiles) {
      const int64_t first = kRowTile * which, left = args.count - first;
      copy_rows(walk, kRowTile, slice, stride, static_cast<const char*>(args.x) + first * row_bytes, row_bytes,
                left < kRowTile ? static_cast<int>(left) : kRowTile, valid_units, [](int row) { return row; });
    }
    commit_copies();
  };
  copy_tile(tile);
  const char* weight = static_cast<const char*>(args.weight) + int64_t{first_column} * row_bytes;
  copy_rows(walk_of(units, thread_index(), threads), kColumnGroup * groups, 0, stride, weight, row_bytes, columns,
            valid_units, column_of);
  MVIT_ROLLED
  for (int unit = thread_index(); unit < 4 * groups; unit += threads) {  // zeros where there is no bias
    const bool valid = args.bias && 8 * unit < columns;
    copy_async<16>(bias + 16 * unit,
                   valid ? static_cast<const char*>(args.bias) + 2 * first_column + 16 * unit : weight, valid);
  }
  commit_copies();
  if constexpr (NORMED) {
    store_parameters<T>(parameters, args.norm, args.channels, thread_index(), threads);
    sync_threads();  // LayerNorm's parameters are there
  }

  RowFragments rows;
  bool weights_there = false;
  do {
    const bool some = tile < tiles;  // false for warps that have no tile at all, which only take part in the barrier
    if (weights_there)
      wait_copies<0>();
    else
      wait_copies<1>();
    sync_warp();  // all lanes' copies are in the slice
    if (some && !in_parts) load_rows(rows, slice, stride, plan.depth_tiles);
    sync_warp();  // all lanes have read the slice
    if (in_parts)
      commit_copies();
    else
      copy_tile(tile + step);
    const int64_t row = kRowTile * tile + lane / 4;  // and the one 8 further down
    if constexpr (NORMED) {
      if (some) {
        float mean[2], rstd[2];
        normalize<T>(rows, parameters, args.channels, args.norm.eps, mean, rstd);
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (block_index_y() > 0 || lane % 4 > 0 || row + 8 * half >= args.count) continue;
          store_global(args.mean + row + 8 * half, mean[half]);
          store_global(args.rstd + row + 8 * half, rstd[half]);
        }
      }
    }
    if (!weights_there) {
      wait_copies<1>();
      sync_threads();  // weights and biases are there
      weights_there = true;
    }

    MVIT_ROLLED
    for (int group = 0; some && group < groups; ++group) {
      const int column = kColumnGroup * group + lane % 4 * 8;
      const int64_t place = 2 * (row * args.out_channels + first_column + column);
      const auto stored = [&](int half) { return column < columns && row + 8 * half < args.count; };
      const auto place_of = [&](int half) { return place + int64_t{16 * half} * args.out_channels; };
      Words4 residual[2];
      if constexpr (!NORMED) {
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half)
          if (stored(half))
            residual[half] = load_constant<Words4>(static_cast<const char*>(args.residual) + place_of(half));
      }
      float sums[4][4], of_bias[8];
      unpack_eight<T>(of_bias, load_shared<Words4>(bias + 2 * column));
      MVIT_UNROLL
      for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = of_bias[i / 4 * 2 + i % 2];
      const Shared of_group = kColumnGroup * group * stride;
      if (!in_parts) {
        multiply_group<T>(sums, rows, of_group, stride, plan.depth_tiles);
      } else {
        MVIT_ROLLED
        for (int k = 0; k < plan.depth_tiles; k += kDepthTiles) {
          load_rows(rows, slice + 32 * k, stride, plan.depth_tiles - k);
          multiply_group<T>(sums, rows, of_group + 32 * k, stride, plan.depth_tiles - k);
        }
      }
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        float more[8];
        if constexpr (!NORMED) unpack_eight<T>(more, residual[half]);
        uint32_t packed[4];
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          float low = sums[i][2 * half], high = sums[i][2 * half + 1];
          if constexpr (NORMED) {
            if (args.silu) low = silu<T>(low), high = silu<T>(high);
          } else {
            low += more[2 * i], high += more[2 * i + 1];
          }
          packed[i] = pack<T>(low, high);
        }
        if (stored(half))
          store_global(static_cast<char*>(args.out) + place_of(half),
                       Words4{packed[0], packed[1], packed[2], packed[3]});
      }
    }
    tile += step;
    if (in_parts) {
      sync_warp();  // all lanes are done with the slice
      copy_tile(tile);
    }
  } while (tile < tiles);
  wait_copies<0>();
}

template <bool HALF>
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  return launch(args.residual ? row_product_kernel<T, false> : row_product_kernel<T, true>,
                dim3(plan.blocks_x, plan.blocks_y), 32 * plan.warps, plan.shared_bytes, stream, args, plan);
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_row_product<kHalf>(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);
#endif

}  // namespace mvit
