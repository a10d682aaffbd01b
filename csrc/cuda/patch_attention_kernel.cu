// SPDX-License-Identifier: Apache-2.0
// patch_attention forward: FlashAttention (arXiv:2205.14135, algorithm 1), with the grouping into patches done by
// addressing. A warp keeps its queries and accumulators in registers; keys and values are streamed through shared
// memory in chunks of 64, the next chunk being prefetched while one is processed.
#include <type_traits>

#include "launch.h"
#include "strands.h"

namespace mvit {

// The queries of one warp, over one chunk of keys after another. Of each tile of 16 queries a lane holds rows lane / 4
// and lane / 4 + 8, indexed by r = 0 or 1.
template <typename T, int D, int TILES>
struct Attention {
  static constexpr int kGroups = D / 8, kKeyTiles = kChunk / 16;
  static constexpr Shared kStride = shared_row_bytes(D);

  Rows16<kGroups> queries[TILES];
  float sums[TILES][kGroups][4];
  float largest[TILES][2], total[TILES][2];  // `total` covers this lane's columns only

  // `flip`: 0x80008000 if the scale is negative, which flips the signs of the queries and is exact.
  MVIT_DEVICE void start(Shared at, uint32_t flip) {
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      load_tile<false>(queries[m], at + 16 * m * kStride, kStride);
      MVIT_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        queries[m][g][0] ^= flip;
        queries[m][g][1] ^= flip;
        for (int i = 0; i < 4; ++i) sums[m][g][i] = 0;
      }
      for (int r = 0; r < 2; ++r) largest[m][r] = -INFINITY, total[m][r] = 0;
    }
  }

  // Processes a chunk with `keys` keys. Rows of the chunk past the last key are zero, and tiles past the last key are
  // undefined. WHOLE: the chunk is full, known at compile time, so that loads and products of different tiles overlap.
  template <bool WHOLE>
  MVIT_DEVICE void attend(Shared key_rows, Shared value_rows, int keys, float factor) {
    float scores[TILES][kKeyTiles][2][4];
    MVIT_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      const bool exists = WHOLE || 16 * n < keys;
      MVIT_UNROLL
      for (int i = 0; i < 8 * TILES; ++i) scores[i / 8][n][i / 4 % 2][i % 4] = exists ? 0 : -INFINITY;
      if (!exists) continue;
      RightRows16<kGroups> tile;
      load_right(tile, key_rows + 16 * n * kStride, kStride);
      MVIT_UNROLL
      for (int m = 0; m < TILES; ++m) multiply<T>(scores[m][n], queries[m], tile);
      if (!WHOLE && 16 * n + 16 > keys) mask(scores, n, keys);
    }
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m)
      for (int r = 0; r < 2; ++r) weigh(scores[m], m, r, factor);
    MVIT_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      if (!WHOLE && 16 * n >= keys) continue;
      Rows16<kGroups> tile;
      load_tile<true>(tile, value_rows + 16 * n * kStride, kStride);
      MVIT_UNROLL
      for (int m = 0; m < TILES; ++m) {
        uint32_t weights[4];
        pack_tile<T>(weights, scores[m][n]);
        accumulate<T>(sums[m], weights, tile);
      }
    }
  }

  MVIT_DEVICE void mask(float (&scores)[TILES][kKeyTiles][2][4], int n, int keys) {
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m)
      for (int i = 0; i < 8; ++i)
        if (16 * n + i / 4 * 8 + lane_index() % 4 * 2 + i % 2 >= keys) scores[m][n][i / 4][i % 4] = -INFINITY;
  }

  // Turns scores into weights relative to the running maximum, and rescales the previous sums to it.
  MVIT_DEVICE void weigh(float (&scores)[kKeyTiles][2][4], int m, int r, float factor) {
    float now = largest[m][r];
    MVIT_UNROLL
    for (int n = 0; n < kKeyTiles; ++n)
      for (int i = 0; i < 4; ++i) now = fmaxf(now, scores[n][i / 2][2 * r + i % 2]);
    now = max_of_row(now);
    const float shrink = exp2_approximate((largest[m][r] - now) * factor), shift = -now * factor;
    largest[m][r] = now;
    total[m][r] *= shrink;
    MVIT_UNROLL
    for (int g = 0; g < kGroups; ++g)
      for (int i = 0; i < 2; ++i) sums[m][g][2 * r + i] *= shrink;
    MVIT_UNROLL
    for (int n = 0; n < kKeyTiles; ++n)
      for (int i = 0; i < 4; ++i) {
        float& score = scores[n][i / 2][2 * r + i % 2];
        score = exp2_approximate(fmaf(score, factor, shift));
        total[m][r] += score;
      }
  }

  // Normalises and stores the queries from `first` on.
  MVIT_DEVICE void finish(const Tokens& out, float* logsumexp, int first, const PatchAttentionShape& shape) {
    const int column = lane_index() % 4 * 2;
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m)
      for (int r = 0; r < 2; ++r) {
        const float all = sum_of_row(total[m][r]), inverse = 1 / all;
        const int n = first + 16 * m + 8 * r + lane_index() / 4;
        char* row = out.at(n);
        if (n < shape.tokens && column == 0)
          store_global(logsumexp + n, fmaf(largest[m][r], fabsf(shape.scale), logf(all)));
        MVIT_UNROLL
        for (int g = 0; g < kGroups; ++g)
          if (n < shape.tokens && 8 * g + column < shape.head_dim)
            store_global(row + 2 * (8 * g + column),
                         pack<T>(sums[m][g][2 * r] * inverse, sums[m][g][2 * r + 1] * inverse));
      }
  }
};

template <typename T, int D, int TILES>
MVIT_KERNEL(32 * kBlockWarps, D == 32 || D == 40 ? 2 : 3)
patch_attention_kernel(const PatchAttentionForward args, const PatchAttentionPlan plan) {
  constexpr Shared kStride = shared_row_bytes(D);
  constexpr float kLog2E = 1.44269504f;
  const PatchAttentionShape& shape = args.shape;
  const StrandGroup group = strand_group(shape, plan);
  const int threads = 32 * plan.warps, row_count = plan.rows + 2 * plan.slots * plan.chunk;
  const Shared query_rows = group.index * row_count * kStride, slots = query_rows + plan.rows * kStride;
  const Shared slot_bytes = 2 * plan.chunk * kStride, values_after = plan.chunk * kStride;
  clear_padding(query_rows, kStride, row_count, shape.head_dim, D, group.thread, threads);

  const int tokens = group.has_strand ? shape.tokens : 0;
  const int64_t inner_bytes = int64_t(2) * shape.heads * shape.head_dim;
  const Tokens queries = tokens_of(args.qkv, shape, group.strand);
  Tokens keys = queries, values = queries;
  keys.first += inner_bytes;
  values.first += 2 * inner_bytes;
  const CopyOrder order = copy_order(group.thread, threads, 2 * shape.head_dim / plan.copy_bytes);
  const auto copy_chunk = [&](int chunk) {
    const int begin = chunk * plan.chunk;
    const Shared slot = slots + chunk % plan.slots * slot_bytes;
    if (begin < shape.tokens) {
      copy_rows(plan.copy_bytes, slot, kStride, keys, begin, plan.chunk, tokens, order);
      copy_rows(plan.copy_bytes, slot + values_after, kStride, values, begin, plan.chunk, tokens, order);
    }
    commit_copies();
  };

  const int first = block_index_y() * plan.rows, warp_first = first + 16 * TILES * group.warp;
  copy_rows(plan.copy_bytes, query_rows, kStride, queries, first, plan.rows, tokens, order);
  copy_chunk(0);
  wait_copies<0>();
  sync_threads();
  Attention<T, D, TILES> attention;
  attention.start(query_rows + 16 * TILES * group.warp * kStride, shape.scale < 0 ? 0x80008000u : 0);
  // Not zero, so that a score of minus infinity remains minus infinity.
  const float factor = fmaxf(fabsf(shape.scale) * kLog2E, 1.2e-38f);
  MVIT_ROLLED
  for (int chunk = 0; chunk * plan.chunk < shape.tokens; ++chunk) {
    copy_chunk(chunk + 1);
    const Shared slot = slots + chunk % plan.slots * slot_bytes;
    const int left = shape.tokens - chunk * plan.chunk;
    if (warp_first < tokens && left >= kChunk)
      attention.template attend<true>(slot, slot + values_after, kChunk, factor);
    else if (warp_first < tokens)
      attention.template attend<false>(slot, slot + values_after, left, factor);
    wait_copies<0>();
    sync_threads();  // the next chunk is there for all warps, and all are done with this one
  }
  if (warp_first < tokens) {
    float* logsumexp = args.logsumexp + static_cast<int64_t>(group.strand) * shape.tokens;
    attention.finish(tokens_of(args.out, shape, group.strand), logsumexp, warp_first, shape);
  }
}

template <bool HALF>
int launch_patch_attention(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens)), plan.threads(),
                  patch_attention_shared_bytes(plan, D), stream, args, plan);
  });
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_patch_attention<kHalf>(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream);
#endif

}  // namespace mvit
