// SPDX-License-Identifier: Apache-2.0
// patch_attention backward, for sequences of any length: a block takes the gradients of its rows as queries over all keys,
// then those of the same tokens as keys and values over all queries. Nothing is summed up across blocks or by atomics, at
// the price of 7 products for 5 (patch_attention_backward_whole_kernel.h has those).
//
// With scores s, weights p = exp(s - logsumexp), δ = Σ out · grad_out of a query:
//   grad_v = pᵀ grad_out,  ds = p (grad_out vᵀ - δ),  grad_q = scale · ds k,  grad_k = scale · dsᵀ q.
#pragma once

#include "strands.h"

namespace mvit {

// For each two of a strand's tokens, 16 bytes (TwoQueries): logsumexp in powers of two, and δ. Where there is no token,
// what makes weights and gradients 0.
MVIT_DEVICE Shared token_number(int n) { return 16 * (n / 2) + 4 * (n % 2); }

template <typename T>
MVIT_DEVICE void prepare_tokens(Shared numbers, const Tokens& out, const Tokens& grad_out, const float* logsumexp,
                                int head_dim, int tokens, int count, int thread, int threads) {
  constexpr float kLog2E = 1.44269504f;
  const int lane = thread % 4;  // four lanes a token
  MVIT_ROLLED
  for (int n = thread / 4; n < count; n += threads / 4) {
    float delta = 0;
    if (n < tokens) {
      const char *a = out.at(n), *b = grad_out.at(n);
      for (int column = 2 * lane; column < head_dim; column += 8) {
        const uint32_t x = load_constant<uint32_t>(a + 2 * column), y = load_constant<uint32_t>(b + 2 * column);
        delta += unpack_low<T>(x) * unpack_low<T>(y) + unpack_high<T>(x) * unpack_high<T>(y);
      }
    }
    delta = sum_of_row(delta);
    if (lane == 0) {
      const float log = n < tokens ? load_constant<float>(logsumexp + n) * kLog2E : INFINITY;
      store_shared(numbers + token_number(n), log);
      store_shared(numbers + token_number(n) + 8, delta);
    }
  }
}

// What prepare_tokens leaves of a query and the next.
struct alignas(16) TwoQueries {
  float log[2], delta[2];
};

template <typename T, int D, int TILES>
struct AttentionGradient {
  static constexpr int kGroups = D / 8;
  static constexpr Shared kStride = shared_row_bytes(D);

  Rows16<kGroups> first[TILES], second[TILES];  // of queries and grad_out, or of keys and values
  float first_sums[TILES][kGroups][4], second_sums[TILES][kGroups][4];
  float logs[TILES][2], deltas[TILES][2];

  // Of the strand's rows from `begin` on.
  MVIT_DEVICE void start(Shared first_rows, Shared second_rows, Shared numbers, int begin, int tokens) {
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      load_tile<false>(first[m], first_rows + 16 * m * kStride, kStride);
      load_tile<false>(second[m], second_rows + 16 * m * kStride, kStride);
      MVIT_UNROLL
      for (int g = 0; g < kGroups; ++g)
        for (int i = 0; i < 4; ++i) first_sums[m][g][i] = second_sums[m][g][i] = 0;
      MVIT_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int n = begin + 16 * m + 8 * r + lane_index() / 4;
        logs[m][r] = n < tokens ? load_shared<float>(numbers + token_number(n)) : INFINITY;
        deltas[m][r] = n < tokens ? load_shared<float>(numbers + token_number(n) + 8) : 0;
      }
    }
  }

  // This warp's queries over 16 keys and values, of which `keys` exist.
  MVIT_DEVICE void over_keys(Shared key_rows, Shared value_rows, int keys, float factor) {
    Rows16<kGroups> k, v;
    load_tile<false>(k, key_rows, kStride);
    load_tile<false>(v, value_rows, kStride);
    uint32_t packed[TILES][4];
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      float scores[2][4] = {}, ds[2][4] = {};
      multiply<T>(scores, first[m], k);
      multiply<T>(ds, second[m], v);
      MVIT_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, r = i % 4 / 2;
        const bool exists = 8 * half + lane_index() % 4 * 2 + i % 2 < keys;
        const float p = exists ? exp2_approximate(fmaf(scores[half][i % 4], factor, -logs[m][r])) : 0;
        ds[half][i % 4] = p * (ds[half][i % 4] - deltas[m][r]);
      }
      pack_tile<T>(packed[m], ds);
    }
    load_tile<true>(k, key_rows, kStride);
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) accumulate<T>(first_sums[m], packed[m], k);
  }

  // This warp's keys and values over 16 queries, whose numbers are at `numbers`.
  MVIT_DEVICE void over_queries(Shared query_rows, Shared grad_rows, Shared numbers, float factor) {
    Rows16<kGroups> q, grad;
    load_tile<false>(q, query_rows, kStride);
    load_tile<false>(grad, grad_rows, kStride);
    uint32_t weights[TILES][4], packed[TILES][4];
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      float p[2][4] = {}, ds[2][4] = {};
      multiply<T>(p, first[m], q);
      multiply<T>(ds, second[m], grad);
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto queries = load_shared<TwoQueries>(numbers + token_number(8 * half + lane_index() % 4 * 2));
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          p[half][i] = exp2_approximate(fmaf(p[half][i], factor, -queries.log[i % 2]));
          ds[half][i] = p[half][i] * (ds[half][i] - queries.delta[i % 2]);
        }
      }
      pack_tile<T>(weights[m], p);
      pack_tile<T>(packed[m], ds);
    }
    load_tile<true>(q, query_rows, kStride);
    load_tile<true>(grad, grad_rows, kStride);
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      accumulate<T>(first_sums[m], packed[m], q);
      accumulate<T>(second_sums[m], weights[m], grad);
    }
  }

  MVIT_DEVICE void store(const float (&sums)[TILES][kGroups][4], const Tokens& to, int begin, float scale, int head_dim,
                         int tokens) {
    const int column = lane_index() % 4 * 2;
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m)
      for (int r = 0; r < 2; ++r) {
        const int n = begin + 16 * m + 8 * r + lane_index() / 4;
        char* row = to.at(n);
        MVIT_UNROLL
        for (int g = 0; g < kGroups; ++g)
          if (n < tokens && 8 * g + column < head_dim)
            store_global(row + 2 * (8 * g + column), pack<T>(sums[m][g][2 * r] * scale, sums[m][g][2 * r + 1] * scale));
      }
  }
};

template <typename T, int D, int TILES>
MVIT_KERNEL(32 * kBlockWarps, 2)
patch_attention_backward_kernel(const PatchAttentionBackward args, const PatchAttentionPlan plan) {
  constexpr Shared kStride = shared_row_bytes(D);
  constexpr float kLog2E = 1.44269504f;
  const PatchAttentionShape& shape = args.shape;
  const StrandGroup group = strand_group(shape, plan);
  const int threads = 32 * plan.warps, chunks = (shape.tokens + plan.chunk - 1) / plan.chunk;
  const int row_count = 2 * (plan.rows + plan.slots * plan.chunk);
  const Shared own = group.index * (row_count * kStride + 8 * chunks * plan.chunk), own_second = own + plan.rows * kStride;
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
  const auto copy_both = [&](Shared to, Shared to_second, const Tokens& first, const Tokens& second, int begin, int count) {
    copy_rows(plan.copy_bytes, to, kStride, first, begin, count, tokens, order);
    copy_rows(plan.copy_bytes, to_second, kStride, second, begin, count, tokens, order);
  };
  const int first = block_index_y() * plan.rows, warp_row = 16 * TILES * group.warp;
  const bool works = first + warp_row < tokens;
  const float factor = shape.scale * kLog2E;
  AttentionGradient<T, D, TILES> gradient;

  // The block's own rows, then chunk after chunk of the others; `work` is given a slot and the chunk's first token.
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
  if (works) gradient.store(gradient.first_sums, grad_q, first + warp_row, shape.scale, shape.head_dim, tokens);
  pass(k, v, q, grad_out, [&](Shared slot, int begin) {
    MVIT_ROLLED
    for (int n = 0; n < plan.chunk && begin + n < shape.tokens; n += 16)
      gradient.over_queries(slot + n * kStride, slot + second_after + n * kStride, numbers + token_number(begin + n), factor);
  });
  if (works) {
    Tokens grad_k = grad_q, grad_v = grad_q;
    grad_k.first += inner_bytes;
    grad_v.first += 2 * inner_bytes;
    gradient.store(gradient.first_sums, grad_k, first + warp_row, shape.scale, shape.head_dim, tokens);
    gradient.store(gradient.second_sums, grad_v, first + warp_row, 1, shape.head_dim, tokens);
  }
}

}  // namespace mvit
