// SPDX-License-Identifier: Apache-2.0
// patch_attention backward for sequences of any length. A block first computes the gradients of its rows as queries,
// over all keys, then those of the same tokens as keys and values, over all queries. There are no sums across blocks
// and no atomics, at the price of 7 products instead of the 5 of patch_attention_backward_whole_kernel.cu.
#include <type_traits>

#include "launch.h"
#include "patch_attention_gradient.h"

namespace mvit {

template <typename T, int D, int TILES>
MVIT_KERNEL(32 * kBlockWarps, 2)
patch_attention_backward_kernel(const PatchAttentionBackward args, const PatchAttentionPlan plan) {
  constexpr Shared kStride = shared_row_bytes(D);
  constexpr float kLog2E = 1.44269504f;
  const PatchAttentionShape& shape = args.shape;
  const StrandGroup group = strand_group(shape, plan);
  const int threads = 32 * plan.warps, chunks = (shape.tokens + plan.chunk - 1) / plan.chunk;
  const int row_count = 2 * (plan.rows + plan.slots * plan.chunk);
  const Shared own = group.index * (row_count * kStride + 8 * chunks * plan.chunk);
  const Shared own_second = own + plan.rows * kStride;
  const Shared slots = own + 2 * plan.rows * kStride, slot_bytes = 2 * plan.chunk * kStride;
  const Shared numbers = own + row_count * kStride, second_after = plan.chunk * kStride;

  const int tokens = group.has_strand ? shape.tokens : 0;
  const int64_t inner_bytes = int64_t(2) * shape.heads * shape.head_dim;
  const Tokens grad_out = tokens_of(args.grad_out, shape, group.strand);
  Tokens q = tokens_of(args.qkv, shape, group.strand), k = q, v = q;
  k.first += inner_bytes;
  v.first += 2 * inner_bytes;
  clear_padding(own, kStride, row_count, shape.head_dim, D, group.thread, threads);
  prepare_tokens<T>(numbers, tokens_of(args.out, shape, group.strand), grad_out,
                    args.logsumexp + static_cast<int64_t>(group.strand) * shape.tokens, shape.head_dim, tokens,
                    chunks * plan.chunk, group.thread, threads);

  const CopyOrder order = copy_order(group.thread, threads, 2 * shape.head_dim / plan.copy_bytes);
  const auto copy_both = [&](Shared to, Shared to_second, const Tokens& first, const Tokens& second, int begin,
                             int count) {
    copy_rows(plan.copy_bytes, to, kStride, first, begin, count, tokens, order);
    copy_rows(plan.copy_bytes, to_second, kStride, second, begin, count, tokens, order);
  };
  const int first = block_index_y() * plan.rows, warp_row = 16 * TILES * group.warp;
  const bool works = first + warp_row < tokens;
  const float factor = shape.scale * kLog2E;
  AttentionGradient<T, D, TILES> gradient;

  // Loads the block's own rows, then streams the other rows chunk by chunk; `work` receives a slot and the chunk's
  // first token.
  const auto pass = [&](const Tokens& own_rows, const Tokens& own_second_rows, const Tokens& rows,
                        const Tokens& second_rows, const auto& work) {
    const auto copy_chunk = [&](int chunk) {
      const Shared slot = slots + chunk % plan.slots * slot_bytes;
      if (chunk < chunks) copy_both(slot, slot + second_after, rows, second_rows, chunk * plan.chunk, plan.chunk);
      commit_copies();
    };
    copy_both(own, own_second, own_rows, own_second_rows, first, plan.rows);
    copy_chunk(0);
    wait_copies<0>();
    sync_threads();
    if (works)
      gradient.start(own + warp_row * kStride, own_second + warp_row * kStride, numbers, first + warp_row, tokens);
    MVIT_ROLLED
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_chunk(chunk + 1);
      if (works) work(slots + chunk % plan.slots * slot_bytes, chunk * plan.chunk);
      wait_copies<0>();
      sync_threads();  // the next chunk is there for all warps, and all are done with this one
    }
  };

  Tokens grad_q = tokens_of(args.grad_qkv, shape, group.strand);
  pass(q, grad_out, k, v, [&](Shared slot, int begin) {
    MVIT_ROLLED
    for (int n = 0; n < plan.chunk && begin + n < shape.tokens; n += 16)
      gradient.over_keys(slot + n * kStride, slot + second_after + n * kStride, shape.tokens - begin - n, factor);
  });
  const auto store = [&](const float (&sums)[TILES][D / 8][4], const Tokens& to, float scale) {
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m)
      store_tile<T>(sums[m], to, first + warp_row + 16 * m, scale, shape.head_dim, tokens);
  };
  if (works) store(gradient.first_sums, grad_q, shape.scale);
  pass(k, v, q, grad_out, [&](Shared slot, int begin) {
    MVIT_ROLLED
    for (int n = 0; n < plan.chunk && begin + n < shape.tokens; n += 16) {
      uint32_t ds[TILES][4];
      gradient.over_queries(ds, slot + n * kStride, slot + second_after + n * kStride,
                            numbers + token_number(begin + n), factor);
    }
  });
  if (works) {
    Tokens grad_k = grad_q, grad_v = grad_q;
    grad_k.first += inner_bytes;
    grad_v.first += 2 * inner_bytes;
    store(gradient.first_sums, grad_k, shape.scale);
    store(gradient.second_sums, grad_v, 1);
  }
}

template <bool HALF>
int launch_patch_attention_backward(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_backward_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens)), plan.threads(),
                  patch_attention_backward_shared_bytes(plan, D, args.shape.tokens), stream, args, plan);
  });
}

#ifdef MVIT_TYPE  // set by CMakeLists.txt; files that include this one need only the templates
constexpr bool kHalf = std::is_same_v<MVIT_TYPE, Half>;
template int launch_patch_attention_backward<kHalf>(const PatchAttentionBackward& args, int copy_bytes,
                                                    CUstream_st* stream);
#endif

}  // namespace mvit
