// SPDX-License-Identifier: Apache-2.0
// patch_attention backward for sequences whose keys can be distributed over the warps of one block. Shared memory holds
// the whole strand; each warp accumulates the gradients of its keys and values in registers, and queries are processed
// 64 at a time. The warps leave ds in shared memory and then divide up the gradients of those queries. This takes 5
// products, and no reduction across warps.
#include <type_traits>

#include "launch.h"
#include "patch_attention_gradient.h"

namespace mvit {

// Loads ds, stored as keys × queries, as the left operand (16 queries × 16 keys) of a product over keys.
MVIT_DEVICE void load_ds(uint32_t (&tile)[4], Shared at, Shared stride) {
  const int lane = lane_index();
  load_matrices_transposed(tile, at + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 16);
}

template <typename T, int D, int TILES>
MVIT_KERNEL(32 * kWholeWarps, 1)
patch_attention_backward_whole_kernel(const PatchAttentionBackward args, const PatchAttentionPlan plan) {
  constexpr Shared kStride = shared_row_bytes(D);
  constexpr int kGroups = D / 8;
  constexpr float kLog2E = 1.44269504f;
  const PatchAttentionShape& shape = args.shape;
  const StrandGroup group = strand_group(shape, plan);
  const int threads = 32 * plan.warps, tokens = group.has_strand ? shape.tokens : 0;
  const Shared ds_stride = shared_row_bytes(plan.chunk), part = plan.rows * kStride;
  const Shared query_rows = group.index * (patch_attention_backward_whole_shared_bytes(plan, D) / plan.groups);
  const Shared grad_rows = query_rows + part, key_rows = grad_rows + part, value_rows = key_rows + part;
  const Shared ds = value_rows;  // the values are in registers by then
  const Shared numbers = value_rows + plan.rows * (ds_stride > kStride ? ds_stride : kStride);

  const int64_t inner_bytes = int64_t(2) * shape.heads * shape.head_dim;
  const Tokens grad_out = tokens_of(args.grad_out, shape, group.strand);
  const Tokens q = tokens_of(args.qkv, shape, group.strand), grad_q = tokens_of(args.grad_qkv, shape, group.strand);
  Tokens k = q, v = q, grad_k = grad_q, grad_v = grad_q;
  k.first += inner_bytes, grad_k.first += inner_bytes;
  v.first += 2 * inner_bytes, grad_v.first += 2 * inner_bytes;
  const CopyOrder order = copy_order(group.thread, threads, 2 * shape.head_dim / plan.copy_bytes);
  copy_rows(plan.copy_bytes, key_rows, kStride, k, 0, plan.rows, tokens, order);
  copy_rows(plan.copy_bytes, value_rows, kStride, v, 0, plan.rows, tokens, order);
  copy_rows(plan.copy_bytes, query_rows, kStride, q, 0, plan.rows, tokens, order);
  copy_rows(plan.copy_bytes, grad_rows, kStride, grad_out, 0, plan.rows, tokens, order);
  commit_copies();
  clear_padding(query_rows, kStride, 4 * plan.rows, shape.head_dim, D, group.thread, threads);
  prepare_tokens<T>(numbers, tokens_of(args.out, shape, group.strand), grad_out,
                    args.logsumexp + static_cast<int64_t>(group.strand) * shape.tokens, shape.head_dim, tokens,
                    plan.rows, group.thread, threads);
  wait_copies<0>();
  sync_threads();

  const int warp_row = 16 * TILES * group.warp;
  const float factor = shape.scale * kLog2E;
  AttentionGradient<T, D, TILES> gradient;
  gradient.start(key_rows + warp_row * kStride, value_rows + warp_row * kStride, numbers, warp_row, tokens);
  // Warps are distributed over rows and, if there are at least eight, over halves of the columns of a chunk's query
  // gradients.
  const int halves = plan.warps >= 8 ? 2 : 1, of_rows = plan.warps / halves;
  const int first_group = group.warp / of_rows * (kGroups / 2);
  const int last_group = halves == 2 && group.warp < of_rows ? kGroups / 2 : kGroups;
  MVIT_ROLLED
  for (int begin = 0; begin < shape.tokens; begin += plan.chunk) {
    const int left = shape.tokens - begin, count = left < plan.chunk ? left : plan.chunk;
    sync_threads();  // all warps are done with the values, or with ds of the chunk before
    MVIT_ROLLED
    for (int n = 0; n < count; n += 16) {
      uint32_t tiles[TILES][4];
      gradient.over_queries(tiles, query_rows + (begin + n) * kStride, grad_rows + (begin + n) * kStride,
                            numbers + token_number(begin + n), factor);
      MVIT_UNROLL
      for (int m = 0; m < TILES; ++m)
        for (int i = 0; i < 4; ++i) {
          const int key = warp_row + 16 * m + i % 2 * 8 + lane_index() / 4;
          const int column = n + i / 2 * 8 + lane_index() % 4 * 2;
          store_shared<uint32_t>(ds + key * ds_stride + 2 * column, key < tokens ? tiles[m][i] : 0);
        }
    }
    sync_threads();  // ds of this chunk is there, of all keys
    MVIT_ROLLED
    for (int n = 16 * (group.warp % of_rows); n < count; n += 16 * of_rows) {
      float sums[kGroups][4] = {};
      MVIT_ROLLED
      for (int key = 0; key < plan.rows; key += 16) {
        uint32_t left_tile[4];
        load_ds(left_tile, ds + key * ds_stride + 2 * n, ds_stride);
        MVIT_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          if (g < first_group || g >= last_group) continue;
          uint32_t right[2];
          load_matrices_transposed(right, key_rows + (key + lane_index() % 16) * kStride + 16 * g);
          mma<T>(sums[g], left_tile, right);
        }
      }
      store_tile<T>(sums, grad_q, begin + n, shape.scale, shape.head_dim, tokens, first_group, last_group);
    }
  }
  MVIT_UNROLL
  for (int m = 0; m < TILES; ++m) {
    store_tile<T>(gradient.first_sums[m], grad_k, warp_row + 16 * m, shape.scale, shape.head_dim, tokens);
    store_tile<T>(gradient.second_sums[m], grad_v, warp_row + 16 * m, 1, shape.head_dim, tokens);
  }
}

template <bool HALF>
int launch_patch_attention_backward_whole(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention_backward_whole(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_backward_whole_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands)), plan.threads(),
                  patch_attention_backward_whole_shared_bytes(plan, D), stream, args, plan);
  });
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_patch_attention_backward_whole<kHalf>(const PatchAttentionBackward& args, int copy_bytes,
                                                          CUstream_st* stream);
#endif

}  // namespace mvit
