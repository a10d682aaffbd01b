// SPDX-License-Identifier: Apache-2.0
// The fused MLP, layer_norm_mlp, of many rows (layer_norm_mlp.h).
#include <type_traits>

#include "launch.h"
#include "mlp_rows.h"

namespace mvit {

// The ring of slots through which the weights pass, chunk by chunk.
template <int TILES>
struct MlpRing {
  const RowMlp& args;
  Shared begin, end;    // of all slots
  Shared filled, read;  // the slots to be filled and to be read next
  int warps;

  static constexpr Shared kSlot = mlp_chunk_bytes(TILES);
  static constexpr int kWarps = mlp_warps(TILES);
  static constexpr bool kPasses = TILES > 9;  // at the published widths no GPU keeps all weights

  MVIT_DEVICE MlpRing(const RowMlp& args, const RowMlpPlan& plan, Shared begin)
      : args(args), begin(begin), end(begin + plan.slots * kSlot), filled(begin), read(begin), warps(plan.warps) {}

  // Starts the copies of a chunk.
  MVIT_DEVICE void fill(int chunk) {
    const int first = kMlpChunk * chunk, left = args.hidden_channels - first;
    if (kPasses && warps == kWarps && left >= kMlpChunk && args.channels == 16 * TILES)
      fill_slot<kPasses>(first, left);
    else
      fill_slot<false>(first, left);
    filled = next(filled);
  }

  // A warp takes every so many rows of fc1, 16 bytes a lane, and four threads one of fc2. WHOLE: there is nothing that
  // does not exist and has to become zero, and as many warps as the kernel has registers for. Copies in loops were a
  // quarter of a warp's time at width 192 (predicted).
  template <bool WHOLE>
  MVIT_DEVICE void fill_slot(int first, int left) {
    constexpr int kUnits = 2 * TILES, kRows = 16 * TILES;
    static_assert(kUnits <= 32);
    const int lane = lane_index();
    const auto fc1 = static_cast<const char*>(args.fc1_weight) + 2 * static_cast<int64_t>(first) * args.channels;
    const auto fc2 = static_cast<const char*>(args.fc2_weight) + 2 * first;
    const auto copy_fc1 = [&](int row) {
      if (lane < kUnits && row < kMlpChunk)
        copy_async<16>(filled + in_lines(row, lane, kUnits), fc1 + 2 * (row * args.channels + 8 * lane),
                       WHOLE || (row < left && 8 * lane < args.channels));
    };
    const auto copy_fc2 = [&](int row, int unit) {
      if (row < kRows)
        copy_async<16>(filled + SharedChunk<TILES>::kFc1 + in_lines(row, unit, 4),
                       fc2 + 2 * (static_cast<int64_t>(row) * args.hidden_channels + 8 * unit),
                       WHOLE || (row < args.channels && 8 * unit < left));
    };
    const int unit = thread_index() % 4;
    if constexpr (WHOLE) {
      MVIT_UNROLL
      for (int k = 0; k < kMlpChunk; k += kWarps) copy_fc1(thread_index() / 32 + k);
      if constexpr (TILES <= 12) {
        MVIT_UNROLL
        for (int k = 0; k < kRows; k += 8 * kWarps) copy_fc2(thread_index() / 4 + k, unit);
      } else {  // 8 bytes would be spilled
        MVIT_ROLLED
        for (int k = 0; k < kRows; k += 8 * kWarps) copy_fc2(thread_index() / 4 + k, unit);
      }
    } else {
      MVIT_ROLLED
      for (int row = thread_index() / 32; row < kMlpChunk; row += warps) copy_fc1(row);
      MVIT_ROLLED
      for (int row = thread_index() / 4; row < kRows; row += 8 * warps) copy_fc2(row, unit);
    }
    if (thread_index() < 4)
      copy_async<16>(filled + SharedChunk<TILES>::kBias + 16 * unit,
                     static_cast<const char*>(args.fc1_bias) + 2 * (first + 8 * unit), WHOLE || 8 * unit < left);
  }

  MVIT_DEVICE Shared next(Shared slot) const { return slot + kSlot < end ? slot + kSlot : begin; }

  MVIT_DEVICE SharedChunk<TILES> advance() {
    const Shared at = read;
    read = next(read);
    return SharedChunk<TILES>(at);
  }
};

template <typename T, int TILES>
MVIT_KERNEL(32 * mlp_warps(TILES), 1)
layer_norm_mlp_kernel(const RowMlp args, const RowMlpPlan plan) {
  constexpr int kPadded = 16 * TILES;
  constexpr Shared kVectors = 0, kSlots = mlp_vector_bytes(TILES);
  const int warp = warp_index();
  const Shared slice = kSlots + plan.slots * mlp_chunk_bytes(TILES) + warp * mlp_slice_bytes(args.channels);
  const SharedLaneRows<T, TILES> rows{slice, args.channels};
  const int tiles = static_cast<int>((args.count + kMlpRows - 1) / kMlpRows), at_once = plan.blocks * plan.warps;
  // Tiles go to the blocks in turn, then to their warps, so that all multiprocessors have some.
  int tile = static_cast<int>(block_index()) + warp * plan.blocks;
  const bool stays = plan.slots >= plan.chunks;
  MlpRing<TILES> ring(args, plan, kSlots);

  const auto copy_next = [&] {  // its group of copies is that of chunks that are asked for later, or of none
    sync_warp();  // all lanes have read the slice
    if (tile + at_once < tiles) copy_tile(slice, args, tile + at_once, lane_index(), 32);
  };

  if (tile < tiles) copy_tile(slice, args, tile, lane_index(), 32);
  commit_copies();
  int asked = 0;  // chunks of this pass whose copies have been started; then those of the next one
  MVIT_ROLLED
  for (; asked < plan.group && asked < plan.chunks; ++asked) ring.fill(asked);
  commit_copies();
  store_vectors<T>(kVectors, args, kPadded, thread_index(), 32 * plan.warps);
  wait_copies<1>();
  sync_threads();  // the slice and the vectors are there
  bool arriving = true;  // the weights
  MVIT_ROLLED
  for (int first = static_cast<int>(block_index()); first < tiles; first += at_once, tile += at_once) {
    const bool has_tile = tile < tiles;
    uint32_t x[TILES][4] = {};      // normalised
    float sums[2 * TILES][4] = {};  // of the result
    if (has_tile) {
      float mean[2], rstd[2];
      begin_sums(sums, mean, rows, kVectors + 8 * kPadded);
      rows.deviations(rstd, mean, args.norm.eps);
      for_parts<TILES>([&](auto part, auto count) {
        if (16 * part() >= args.channels) return;
        uint32_t a[count()][4];
        rows.template normalized<count()>(a, part, kVectors, kVectors + 4 * kPadded, mean, rstd);
        MVIT_UNROLL
        for (int i = 0; i < 4 * count(); ++i) x[part + i / 4][i % 4] = a[i / 4][i % 4];
      });
      store_statistics(args, int64_t{kMlpRows} * tile, mean, rstd);
      copy_next();
    }
    const auto left = [&](uint32_t(&a)[4], int k) {
      a[0] = x[k][0], a[1] = x[k][1], a[2] = x[k][2], a[3] = x[k][3];
    };
    const int columns = has_tile ? args.channels : 0;
    int group = 0;  // its first chunk
    const int all = stays || first + at_once >= tiles ? plan.chunks : 2 * plan.chunks;
    MVIT_ROLLED
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      if (arriving && (chunk == 0 || chunk == group + plan.group)) {
        group = chunk;
        commit_copies();
        wait_copies<0>();
        sync_threads();  // the group is there for all warps, and all are done with the one before it
      }
      const auto weights = ring.advance();
      uint32_t values[2][4] = {};
      if (has_tile) hidden_values<T, TILES>(values, left, weights, args.channels);
      // Into the slots of the group before, so that the last chunk of the next group is asked for early in this one.
      // Between the products, which also keeps the compiler from loading all of fc2 before it has hidden values: for
      // that it has no registers.
      if (arriving) {
        MVIT_ROLLED
        for (; asked < all && asked < group + 2 * plan.group && asked < chunk + plan.group + 2; ++asked)
          ring.fill(asked < plan.chunks ? asked : asked - plan.chunks);
      }
      add_chunk<T, TILES>(sums, values, weights, columns);
    }
    asked -= plan.chunks;
    if (has_tile) store_tile<T, TILES>(args, int64_t{kMlpRows} * tile, sums);
    arriving = !stays;
    commit_copies();
    wait_copies<0>();
    sync_warp();  // the slice has the next tile
  }
}

template <bool HALF>
int launch_layer_norm_mlp(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream) {
  using T = std::conditional_t<HALF, Half, BFloat16>;
  return with_tiles<kMlpTiles>(args.channels, [&](auto tiles) {
    return launch(layer_norm_mlp_kernel<T, tiles()>, dim3(static_cast<unsigned>(plan.blocks)), 32 * plan.warps,
                  plan.shared_bytes, stream, args, plan);
  });
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_layer_norm_mlp<kHalf>(const RowMlp& args, const RowMlpPlan& plan, CUstream_st* stream);
#endif

}  // namespace mvit
