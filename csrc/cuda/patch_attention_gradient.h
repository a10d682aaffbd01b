// SPDX-License-Identifier: Apache-2.0
// Shared by both backward kernels of patch_attention. With scores s, weights p = exp(s - logsumexp) and, per query,
// δ = Σ out · grad_out:
//   grad_v = pᵀ grad_out,  ds = p (grad_out vᵀ - δ),  grad_q = scale · ds k,  grad_k = scale · dsᵀ q.
#pragma once

#include "strands.h"

namespace mvit {

// Shared memory holds 16 bytes (TwoQueries) for every two tokens of a strand: logsumexp in base 2, and δ. Places
// without a token hold values that make weights and gradients 0.
MVIT_DEVICE Shared token_number(int n) { return 16 * (n / 2) + 4 * (n % 2); }

template <typename T>
MVIT_DEVICE void prepare_tokens(Shared numbers, const Tokens& out, const Tokens& grad_out, const float* logsumexp,
                                int head_dim, int tokens, int count, int thread, int threads) {
  constexpr float kLog2E = 1.44269504f;
  const int lane = thread % 4;  // four lanes per token
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

// What prepare_tokens stores for two adjacent queries.
struct alignas(16) TwoQueries {
  float log[2], delta[2];
};

// The rows of one warp, queries or keys, against the rows of the other operand, 16 at a time. Of each tile of 16 rows a
// lane holds rows lane / 4 and lane / 4 + 8, indexed by r = 0 or 1.
template <typename T, int D, int TILES>
struct AttentionGradient {
  static constexpr int kGroups = D / 8;
  static constexpr Shared kStride = shared_row_bytes(D);

  Rows16<kGroups> first[TILES], second[TILES];  // queries and grad_out, or keys and values
  float first_sums[TILES][kGroups][4], second_sums[TILES][kGroups][4];
  float logs[TILES][2], deltas[TILES][2];

  // Loads the warp's rows, which start at row `begin` of the strand.
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

  // Processes this warp's queries against 16 keys and values, of which `keys` exist.
  MVIT_DEVICE void over_keys(Shared key_rows, Shared value_rows, int keys, float factor) {
    RightRows16<kGroups> k, v;
    load_right(k, key_rows, kStride);
    load_right(v, value_rows, kStride);
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
    Rows16<kGroups> by_keys;
    load_tile<true>(by_keys, key_rows, kStride);
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) accumulate<T>(first_sums[m], packed[m], by_keys);
  }

  // Processes this warp's keys and values against 16 queries, whose statistics are at `numbers`. Leaves ds, rounded, in
  // `ds_tiles`: for each tile of keys, the left operand of a product over queries.
  MVIT_DEVICE void over_queries(uint32_t (&ds_tiles)[TILES][4], Shared query_rows, Shared grad_rows, Shared numbers,
                                float factor) {
    RightRows16<kGroups> q, grad;
    load_right(q, query_rows, kStride);
    load_right(grad, grad_rows, kStride);
    uint32_t weights[TILES][4];
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
      pack_tile<T>(ds_tiles[m], ds);
    }
    Rows16<kGroups> q_by_rows, grad_by_rows;
    load_tile<true>(q_by_rows, query_rows, kStride);
    load_tile<true>(grad_by_rows, grad_rows, kStride);
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) {
      accumulate<T>(first_sums[m], ds_tiles[m], q_by_rows);
      accumulate<T>(second_sums[m], weights[m], grad_by_rows);
    }
  }
};

// Stores a tile's sums times `scale` to the rows from `begin` on.
template <typename T, int GROUPS>
MVIT_DEVICE void store_tile(const float (&sums)[GROUPS][4], const Tokens& to, int begin, float scale, int head_dim,
                            int tokens, int first_group = 0, int last_group = GROUPS) {
  const int column = lane_index() % 4 * 2;
  MVIT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int n = begin + 8 * r + lane_index() / 4;
    char* row = to.at(n);
    MVIT_UNROLL
    for (int g = 0; g < GROUPS; ++g)
      if (n < tokens && 8 * g + column < head_dim && g >= first_group && g < last_group)
        store_global(row + 2 * (8 * g + column), pack<T>(sums[g][2 * r] * scale, sums[g][2 * r + 1] * scale));
  }
}

}  // namespace mvit
