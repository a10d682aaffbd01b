// SPDX-License-Identifier: Apache-2.0
// The fused MLP, layer_norm_mlp. A block holds 64 normalised rows in shared memory, computes 64 of their hidden units
// at a time and accumulates these into the whole result, which stays in registers. Its eight warps are arranged as two
// row parts × four column parts, of the hidden units and of the result. The weights of one product are prefetched while
// the other is computed.
#include <type_traits>

#include "launch.h"
#include "row_tiles.h"

namespace mvit {

// COLUMNS: the maximum number of tiles of 16 result columns per warp.
template <typename T, int COLUMNS>
MVIT_KERNEL(32 * kMlpWarps, 2)
layer_norm_mlp_kernel(const RowMlp args) {
  constexpr int kTiles = 2, kSplit = kMlpColumnParts;
  const int warp = warp_index(), lane = lane_index(), threads = 32 * kMlpWarps;
  const int row_part = warp / kSplit, column_part = warp % kSplit;
  const int channels = args.channels, units = channels / 8, column_tiles = (channels + 15) / 16;
  const int64_t first = block_index() * kMlpRows, left = args.count - first;
  const Shared stride = shared_row_bytes(channels), hidden_stride = shared_row_bytes(kHiddenTile);
  const Shared hidden = kMlpRows * stride, fc1 = hidden + kMlpRows * hidden_stride, fc2 = fc1 + kHiddenTile * stride;

  const auto copy_fc1 = [&](int h) {  // rows h to h + 63
    if (h < args.hidden_channels)
      copy_matrix(fc1, stride, static_cast<const char*>(args.fc1_weight) + static_cast<int64_t>(2) * h * channels,
                  2 * channels, kHiddenTile, units, args.hidden_channels - h, units, thread_index(), threads);
    commit_copies();
  };
  const auto copy_fc2 = [&](int h) {  // columns h to h + 63
    copy_matrix(fc2, hidden_stride, static_cast<const char*>(args.fc2_weight) + 2 * h, 2 * args.hidden_channels,
                16 * column_tiles, kHiddenTile / 8, channels, (args.hidden_channels - h) / 8, thread_index(), threads);
    commit_copies();
  };

  // Each warp copies and normalises eight rows.
  constexpr int kOwn = kMlpRows / kMlpWarps;
  const int64_t own_left = left - kOwn * warp;
  copy_matrix(kOwn * warp * stride, stride,
              static_cast<const char*>(args.x) + (own_left > 0 ? 2 * (first + kOwn * warp) * channels : 0),
              2 * channels, kOwn, units, own_left, units, lane, 32);
  commit_copies();
  copy_fc1(0);
  wait_copies<1>();
  sync_warp();
  normalize_rows<T, kOwn / 4>(kOwn * warp * stride, stride, args.norm, channels, args.mean + first + kOwn * warp,
                              args.rstd + first + kOwn * warp, own_left);

  float sums[kTiles][COLUMNS][2][4] = {};
  const Shared rows = 32 * row_part * stride, hidden_rows = hidden + 32 * row_part * hidden_stride;
  MVIT_ROLLED
  for (int h = 0; h < args.hidden_channels; h += kHiddenTile) {
    wait_copies<0>();
    sync_threads();  // fc1's rows are there, and all warps are done with the last hidden values and fc2's columns
    copy_fc2(h);
    float values[kTiles][1][2][4] = {};
    multiply_shared<T>(values, rows, stride, fc1 + 16 * column_part * stride, stride, 0, channels, 1);
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = 16 * column_part + 8 * half + lane % 4 * 2;
      const bool exists = h + column < args.hidden_channels;
      const uint32_t bias =
          exists ? load_constant<uint32_t>(static_cast<const char*>(args.fc1_bias) + 2 * (h + column)) : 0;
      MVIT_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float low = values[i / 2][0][half][i % 2 * 2] + unpack_low<T>(bias);
        const float high = values[i / 2][0][half][i % 2 * 2 + 1] + unpack_high<T>(bias);
        store_shared(hidden_rows + (8 * i + lane / 4) * hidden_stride + 2 * column,
                     pack<T>(silu<T>(low), silu<T>(high)));
      }
    }
    wait_copies<0>();
    sync_threads();  // hidden values and fc2's columns are there, and all warps are done with fc1's rows
    copy_fc1(h + kHiddenTile);
    // The tiles of this column part are column_part, column_part + 4, …
    multiply_shared<T>(sums, hidden_rows, hidden_stride, fc2 + 16 * column_part * hidden_stride, hidden_stride,
                       16 * kSplit * hidden_stride, kHiddenTile, (column_tiles - column_part + kSplit - 1) / kSplit);
  }
  wait_copies<0>();

  MVIT_UNROLL
  for (int n = 0; n < COLUMNS; ++n) {
    MVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int c = 16 * (column_part + kSplit * n) + 8 * half + lane % 4 * 2;
      if (c >= channels) continue;
      const auto bias = load_constant<uint32_t>(static_cast<const char*>(args.fc2_bias) + 2 * c);
      MVIT_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int row = 32 * row_part + 8 * i + lane / 4;
        if (row >= left) continue;
        const int64_t place = 2 * ((first + row) * channels + c);
        const auto x = load_constant<uint32_t>(static_cast<const char*>(args.x) + place);
        const float low = sums[i / 2][n][half][i % 2 * 2] + unpack_low<T>(bias) + unpack_low<T>(x);
        const float high = sums[i / 2][n][half][i % 2 * 2 + 1] + unpack_high<T>(bias) + unpack_high<T>(x);
        store_global(static_cast<char*>(args.out) + place, pack<T>(low, high));
      }
    }
  }
}

// Launches the kernel with the fewest column tiles per warp that hold the rows; each tile takes 16 registers.
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

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_layer_norm_mlp<kHalf>(const RowMlp& args, CUstream_st* stream);
#endif

}  // namespace mvit
