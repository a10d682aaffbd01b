// SPDX-License-Identifier: Apache-2.0
// The fused MLP, layer_norm_mlp, of few rows (layer_norm_mlp.h): a block has one tile of rows, and its warps share out
// the hidden units. The weights, of which a warp uses each only once, come straight from global memory.
#include <type_traits>

#include "launch.h"
#include "mlp_rows.h"

namespace mvit {

// The sums of all warps, added up in the first one.
template <int COLUMNS>
MVIT_DEVICE void add_up(float (&sums)[COLUMNS][4], Shared at, int warps) {
  const int warp = warp_index();
  MVIT_ROLLED
  while (warps > 1) {  // the upper half to the lower one
    const int kept = (warps + 1) / 2;
    const Shared place = at + (warp < kept ? warp : warp - kept) * COLUMNS * 512;
    if (warp >= kept && warp < warps) {
      MVIT_UNROLL
      for (int n = 0; n < COLUMNS; ++n)
        store_shared(place + n * 512, Floats4{sums[n][0], sums[n][1], sums[n][2], sums[n][3]});
    }
    sync_threads();  // they are there
    if (warp + kept < warps) {
      MVIT_UNROLL
      for (int n = 0; n < COLUMNS; ++n) {
        const auto other = load_shared<Floats4>(place + n * 512);
        sums[n][0] += other.x, sums[n][1] += other.y, sums[n][2] += other.z, sums[n][3] += other.w;
      }
    }
    sync_threads();  // and read
    warps = kept;
  }
}

template <typename T, int TILES>
MVIT_KERNEL(32 * few_mlp_warps(TILES), 1)
few_rows_mlp_kernel(const RowMlp args, const RowMlpPlan plan) {
  const int warp = warp_index();
  const int64_t first = kMlpRows * block_index();
  constexpr int kPadded = 16 * TILES;
  constexpr Shared kVectors = 0, kTile = mlp_vector_bytes(TILES);
  const SharedLaneRows<T, TILES> rows{kTile, args.channels};
  copy_tile(kTile, args, block_index(), thread_index(), 32 * plan.warps);
  commit_copies();
  store_vectors<T>(kVectors, args, kPadded, thread_index(), 32 * plan.warps);
  wait_copies<0>();
  sync_threads();  // the tile and the vectors are there
  float sums[2 * TILES][4] = {};
  if (warp == 0) {
    float mean[2], rstd[2];
    begin_sums(sums, mean, rows, kVectors + 8 * kPadded);
    rows.deviations(rstd, mean, args.norm.eps);
    for_parts_rolled<TILES>([&](int tile, auto count) {
      uint32_t a[count()][4];
      rows.template normalized<count()>(a, tile, kVectors, kVectors + 4 * kPadded, mean, rstd);
      rows.template store_operands<count()>(a, tile);
    });
    store_statistics(args, first, mean, rstd);
  }
  sync_threads();  // the normalised tile is there
  MVIT_ROLLED
  for (int chunk = warp; chunk < plan.chunks; chunk += plan.warps) {
    const GlobalChunk<TILES> weights(args, kMlpChunk * chunk);
    const auto left = [&](uint32_t(&a)[4], int tile) { rows.load_operand(a, tile); };
    uint32_t values[2][4];
    hidden_values<T, TILES>(values, left, weights, args.channels);
    add_chunk<T, TILES>(sums, values, weights, args.channels);
  }
  add_up(sums, kTile + mlp_slice_bytes(args.channels) + 16 * lane_index(), plan.warps);
  if (warp == 0) store_tile<T, TILES>(args, first, sums);
}

template <bool HALF>
int launch_few_rows_mlp(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  return with_tiles<kFewMlpTiles>(args.channels, [&](auto tiles) {
    return launch(few_rows_mlp_kernel<T, tiles()>, dim3(static_cast<unsigned>(plan.blocks)), 32 * plan.warps,
                  plan.shared_bytes, stream, args, plan);
  });
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_few_rows_mlp<kHalf>(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream);
#endif

}  // namespace mvit
