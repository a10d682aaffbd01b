// SPDX-License-Identifier: Apache-2.0
// layer_norm_linear (NORMED) and linear_residual. The weights stay in shared memory; every warp goes its own way
// through the rows (row_product.h). It takes its rows from its slice into registers, starts the copy of its next rows
// into the same slice, normalises, and multiplies by one group of 32 columns after the other. Once the weights are
// there, no warp waits for another.
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
MVIT_DEVICE int column_of(unsigned row) {
  return static_cast<int>(row / 32 * 32 + row / 2 % 4 * 8 + row / 8 % 4 * 2 + row % 2);
}

// Rows of DEPTH tiles of 16 channels, 32 of them a warp; or 16 rows of any number of tiles, if DEPTH is 0.
template <typename T, bool NORMED, int DEPTH>
MVIT_KERNEL(32 * row_warps_of(DEPTH), 1)
row_product_kernel(const RowProduct args, const RowProductPlan plan) {
  constexpr int kTiles = row_tiles_of(DEPTH), kRows = 16 * kTiles;
  const int warp = warp_index(), lane = lane_index(), thread = thread_index(), threads = 32 * plan.warps;
  const int depth = DEPTH ? DEPTH : plan.depth_tiles, channels = args.channels;
  const Shared stride = shared_row_bytes(16 * depth);
  const Shared bias = kColumnGroup * plan.groups * stride, parameters = bias + 2 * kColumnGroup * plan.groups;
  const Shared raw = parameters + 8 * channels;
  const Shared slice = parameters + (NORMED ? 16 * channels : 0) + kRows * warp * stride;
  const int row_bytes = 2 * channels, units = 2 * depth, valid_units = channels / 8;
  const int first_column = block_index_y() * plan.groups * kColumnGroup, columns = args.out_channels - first_column;
  const int groups = columns < kColumnGroup * plan.groups ? (columns + kColumnGroup - 1) / kColumnGroup : plan.groups;
  const int64_t step = int64_t{plan.blocks_x} * plan.warps * kRows;
  int64_t first = (block_index() * plan.warps + warp) * kRows;
  // More channels than registers hold pass through them in parts, for each group anew; the slice is then in use until
  // the last group is done.
  const bool in_parts = !NORMED && DEPTH == 0 && depth > kMostDepthTiles;

  const auto copy_slice = [&](int64_t from) {
    if (from < args.count)
      copy_rows(kRows, slice, stride, static_cast<const char*>(args.x) + from * row_bytes, row_bytes,
                args.count - from < kRows ? static_cast<int>(args.count - from) : kRows, units, valid_units, 0, 1,
                [](int row) { return row; });
  };
  copy_slice(first);
  if constexpr (NORMED) copy_parameters(raw, args.norm, channels, thread, threads);
  commit_copies();
  const char* weight = static_cast<const char*>(args.weight) + int64_t{first_column} * row_bytes;
  copy_rows(kColumnGroup * groups, 0, stride, weight, row_bytes, columns, units, valid_units, warp, plan.warps,
            column_of);
  MVIT_ROLLED
  for (int unit = thread; unit < 4 * groups; unit += threads) {  // zeros where there is no bias
    const bool valid = args.bias && 8 * unit < columns;
    copy_async<16>(bias + 16 * unit,
                   valid ? static_cast<const char*>(args.bias) + 2 * first_column + 16 * unit : weight, valid);
  }
  commit_copies();
  wait_copies<1>();
  if constexpr (NORMED) {
    convert_parameters<T>(parameters, raw, args.norm, channels, thread, threads);
    sync_threads();  // LayerNorm's parameters are there
  }

  RowFragments<DEPTH ? DEPTH : kMostDepthTiles> rows[kTiles];
  bool weights_there = false;
  do {
    const bool some = first < args.count;  // false for warps without any row: they only take part in the barrier
    sync_warp();  // all lanes' copies are in the slice
    const int64_t row = first + lane / 4;  // and every eighth one further down
    float mean = 0, rstd = 0;              // of row lane % kRows
    if (some && !in_parts) {
      if constexpr (NORMED) {
        row_statistics<T, kTiles>(slice, stride, channels, args.norm.eps, mean, rstd);
        if (block_index_y() == 0 && lane < kRows && first + lane < args.count) {
          store_global(args.mean + first + lane, mean);
          store_global(args.rstd + first + lane, rstd);
        }
      }
      MVIT_UNROLL
      for (int m = 0; m < kTiles; ++m) load_rows(rows[m], slice + 16 * m * stride, stride, depth);
    }
    sync_warp();  // all lanes have read the slice
    if (!in_parts) copy_slice(first + step);
    commit_copies();
    if constexpr (NORMED) {
      // At 240 channels, a number that the compiler does not know keeps it from unpacking more than registers hold.
      if (some) normalize<T>(rows, DEPTH > 12 ? plan.depth_tiles : depth, parameters, channels, mean, rstd);
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
      const auto stored = [&](int i) { return column < columns && row + 8 * i < args.count; };
      const auto place_of = [&](int i) { return place + int64_t{16 * i} * args.out_channels; };
      Words4 residual[2 * kTiles];
      if constexpr (!NORMED) {
        MVIT_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i)
          if (stored(i)) residual[i] = load_constant<Words4>(static_cast<const char*>(args.residual) + place_of(i));
      }
      float sums[kTiles][4][4], of_bias[8];
      unpack_eight<T>(of_bias, load_shared<Words4>(bias + 2 * column));
      MVIT_UNROLL
      for (int i = 0; i < 16 * kTiles; ++i) sums[i / 16][i / 4 % 4][i % 4] = of_bias[i / 4 % 4 * 2 + i % 2];
      const Shared of_group = kColumnGroup * group * stride;
      if (!in_parts) {
        multiply_group<T>(sums, rows, of_group, stride, depth);
      } else {
        MVIT_ROLLED
        for (int k = 0; k < depth; k += kMostDepthTiles) {
          load_rows(rows[0], slice + 32 * k, stride, depth - k);
          multiply_group<T>(sums, rows, of_group + 32 * k, stride, depth - k);
        }
      }
      MVIT_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        float more[8];
        if constexpr (!NORMED) unpack_eight<T>(more, residual[i]);
        uint32_t packed[4];
        MVIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          float low = sums[i / 2][j][i % 2 * 2], high = sums[i / 2][j][i % 2 * 2 + 1];
          if constexpr (NORMED) {
            if (args.silu) low = silu<T>(low), high = silu<T>(high);
          } else {
            low += more[2 * j], high += more[2 * j + 1];
          }
          packed[j] = pack<T>(low, high);
        }
        if (stored(i))
          store_global(static_cast<char*>(args.out) + place_of(i), Words4{packed[0], packed[1], packed[2], packed[3]});
      }
    }
    first += step;
    if (in_parts) {
      sync_warp();  // all lanes are done with the slice
      copy_slice(first);
      commit_copies();
    }
    wait_copies<0>();
  } while (first < args.count);
}

template <bool HALF>
int launch_row_product(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  auto kernel = args.residual ? row_product_kernel<T, false, 0> : row_product_kernel<T, true, 0>;
#define MVIT_DEPTH(DEPTH) \
  if (plan.row_tiles == 2 && plan.depth_tiles == DEPTH) kernel = row_product_kernel<T, true, DEPTH>;
  MVIT_DEPTHS
#undef MVIT_DEPTH
  return launch(kernel, dim3(plan.blocks_x, plan.blocks_y), 32 * plan.warps, plan.shared_bytes, stream, args, plan);
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_row_product<kHalf>(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);
#endif

}  // namespace mvit
