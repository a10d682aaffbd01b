// SPDX-License-Identifier: Apache-2.0
// Attention in the transformer kernel: keys and values of a head in shared memory, and a warp's softmax over them.
#pragma once

#include <cmath>
#include <limits>

#include "fragments.h"
#include "transformer.h"
#include "transformer_products.h"

namespace mvit {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T, int WIDTH, int HEAD_DIM, int M>
struct TransformerAttention : TransformerProducts<T, WIDTH, HEAD_DIM, M> {
  using Products = TransformerProducts<T, WIDTH, HEAD_DIM, M>;
  using Products::args, Products::own, Products::layout, Products::tiles_from;
  static constexpr int HEAD = layout.head() / 8;  // tiles of 8 columns per head

  // Packed, the accumulators of key are the fragments of its transpose; those of value are stored as rows.
  MVIT_DEVICE void store_keys_and_values(const float (&kv)[M][2 * HEAD][4]) const {
    const int lane = lane_index();
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Shared tile = own + m * layout.tile_bytes();
        uint32_t key[HEAD];
        MVIT_UNROLL
        for (int n = 0; n < HEAD; ++n) key[n] = pack<T>(kv[m][n][2 * half], kv[m][n][2 * half + 1]);
        const Shared key_rows = tile + layout.keys() + half * 8 * layout.key_stride();
        MVIT_UNROLL
        for (int n = 0; n + 1 < HEAD; n += 2)
          store_shared(key_rows + n / 2 * kFragmentBytes + lane * 8, Words2{key[n], key[n + 1]});
        if constexpr (HEAD % 2 == 1)
          store_shared(key_rows + HEAD / 2 * kFragmentBytes + lane * 4, key[HEAD - 1]);
        const Shared value_row = tile + layout.values() + (half * 8 + lane / 4) * layout.value_stride() + lane % 4 * 4;
        MVIT_UNROLL
        for (int n = 0; n < HEAD; ++n)
          store_shared(value_row + n * 16, pack<T>(kv[m][HEAD + n][2 * half], kv[m][HEAD + n][2 * half + 1]));
      }
  }

  // The scores of sixteen keys, minus the reference of each row.
  MVIT_DEVICE void score(float (&s)[M][2][4], const Tile (&query)[M][HEAD], Shared tile,
                         const float (&reference)[M][2]) const {
    const int lane = lane_index();
    MVIT_UNROLL
    for (int n = 0; n < 2; ++n) {
      const Shared from = tile + layout.keys() + n * 8 * layout.key_stride();
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) s[m][n][i] = -reference[m][i / 2];
      MVIT_UNROLL
      for (int k = 0; k + 1 < HEAD; k += 2) {
        const auto w = load_shared<Words2>(from + k / 2 * kFragmentBytes + lane * 8);
        const uint32_t b[2] = {w.x, w.y};
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) multiply<T>(s[m][n], query[m][k], query[m][k + 1], b);
      }
      if constexpr (HEAD % 2 == 1) {
        const auto b = load_shared<uint32_t>(from + HEAD / 2 * kFragmentBytes + lane * 4);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) multiply<T>(s[m][n], query[m][HEAD - 1], b);
      }
    }
  }

  // The largest of a lane's scores, as an integer (see as_integer), if it is positive; else another negative number.
  static MVIT_DEVICE int largest_score(const float (&s)[M][2][4]) {
    int over[M][2];
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int n = 0; n < 2; ++n) {
        over[m][n] = largest_of(as_integer(s[m][n][0]), as_integer(s[m][n][1]), as_integer(s[m][n][2]));
        over[m][n] = largest_of(over[m][n], over[m][n], as_integer(s[m][n][3]));
      }
    int most = largest_of(over[0][0], over[0][0], over[0][1]);
    if constexpr (M == 2) most = largest_of(most, over[1][0], over[1][1]);
    return most;
  }

  // softmax(q kᵀ) v for the warp's rows. Scores are in base 2. Weights are 2^(score − reference), with one reference
  // per row that moves only when a score exceeds it by more than 8: any reference near the maximum gives the same
  // result, and moving it means rescaling everything accumulated so far. The first step sets it.
  //
  // While the special functions work on the scores of a step, the tensor cores have those of the next: otherwise a
  // scheduler's two warps, which a barrier starts together, wait for one unit and then for the other.
  MVIT_DEVICE void attend(Tile (&out)[M][HEAD], const Tile (&query)[M][HEAD]) const {
    constexpr float slack = 8;
    const int lane = lane_index();
    // The first tile of this warp's sequence.
    Shared tile = tiles_from(args.first_warp_of_a_sequence(warp_index()) * M);
    float o[M][HEAD][4] = {}, reference[M][2] = {}, sum[M][2] = {};
    int limit = std::numeric_limits<int>::min();
    float s[M][2][4];
    score(s, query, tile, reference);
    MVIT_ROLLED
    for (int step = 0; step < args.tokens; step += 16) {
      if (any_lane(largest_score(s) > limit || step + 16 > args.tokens)) {
        if (step + 16 > args.tokens) {  // mask keys that only fill up the tile
          MVIT_UNROLL
          for (int n = 0; n < 2; ++n)
            MVIT_UNROLL
            for (int i = 0; i < 4; ++i)
              if (step + n * 8 + lane % 4 * 2 + i % 2 >= args.tokens)
                MVIT_UNROLL
                for (int m = 0; m < M; ++m) s[m][n][i] = -kInfinity;
        }
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float largest = fmaxf(fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]),
                                        fmaxf(s[m][1][2 * half], s[m][1][2 * half + 1]));
            const float most = max_of_row(largest);
            const float shift = step == 0 || most > slack ? most : 0.0f;
            const float factor = step == 0 ? 0.0f : exp2_approximate(-shift);
            reference[m][half] += shift;
            sum[m][half] *= factor;
            MVIT_UNROLL
            for (int n = 0; n < HEAD; ++n) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
            MVIT_UNROLL
            for (int n = 0; n < 2; ++n) s[m][n][2 * half] -= shift, s[m][n][2 * half + 1] -= shift;
          }
      }
      limit = as_integer(slack);
      // The last step has no next one; without a branch, it computes its own scores again.
      const Shared here = tile;
      if (step + 16 < args.tokens) tile += layout.tile_bytes();
      float next[M][2][4];
      score(next, query, tile, reference);
      Tile p[M][2];
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int n = 0; n < 2; ++n) {
          MVIT_UNROLL
          for (int i = 0; i < 4; ++i) s[m][n][i] = exp2_approximate(s[m][n][i]);
          sum[m][0] += s[m][n][0] + s[m][n][1];
          sum[m][1] += s[m][n][2] + s[m][n][3];
          pack_tile<T>(p[m][n], s[m][n]);
        }
      const Shared from = here + layout.values() + lane % 16 * layout.value_stride();
      MVIT_UNROLL
      for (int n = 0; n + 1 < HEAD; n += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, from + n * 16 + lane / 16 * 16);
        const uint32_t b[2][2] = {{v[0], v[1]}, {v[2], v[3]}};
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          multiply<T>(o[m][n], p[m][0], p[m][1], b[0]);
          multiply<T>(o[m][n + 1], p[m][0], p[m][1], b[1]);
        }
      }
      if constexpr (HEAD % 2 == 1) {
        uint32_t v[2];
        load_matrices_transposed(v, from + (HEAD - 1) * 16);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) multiply<T>(o[m][HEAD - 1], p[m][0], p[m][1], v);
      }
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int n = 0; n < 2; ++n)
          MVIT_UNROLL
          for (int i = 0; i < 4; ++i) s[m][n][i] = next[m][n][i];
    }
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) {
      const float scale[2] = {reciprocal_approximate(sum_of_row(sum[m][0])),
                              reciprocal_approximate(sum_of_row(sum[m][1]))};
      MVIT_UNROLL
      for (int n = 0; n < HEAD; ++n) {
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) o[m][n][i] *= scale[i / 2];
        pack_tile<T>(out[m][n], o[m][n]);
      }
    }
  }
};

}  // namespace mvit
