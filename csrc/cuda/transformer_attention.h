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
  using Products::args, Products::own, Products::layout, Products::tiles_from, Products::ROWS;
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

  // The scores of one step, minus the reference of each row.
  MVIT_DEVICE void score(float (&s)[M][2 * M][4], const Tile (&query)[M][HEAD], Shared tiles,
                         const float (&reference)[M][2]) const {
    const int lane = lane_index();
    MVIT_UNROLL
    for (int n = 0; n < 2 * M; ++n) {
      const Shared from = tiles + n / 2 * layout.tile_bytes() + layout.keys() + n % 2 * 8 * layout.key_stride();
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

  // softmax(q kᵀ) v for the warp's rows. Scores are in base 2. Weights are 2^(score − reference), with one reference
  // per row that moves only when a score exceeds it by more than 8: any reference near the maximum gives the same
  // result, and moving it means rescaling everything accumulated so far. The first step sets it.
  MVIT_DEVICE void attend(Tile (&out)[M][HEAD], const Tile (&query)[M][HEAD]) const {
    constexpr float slack = 8;
    const int lane = lane_index();
    // The first tile of this warp's sequence.
    Shared tiles = tiles_from(args.first_warp_of_a_sequence(warp_index()) * M);
    float o[M][HEAD][4] = {}, reference[M][2] = {}, sum[M][2] = {};
    MVIT_ROLLED
    for (int step = 0; step < args.tokens; step += ROWS, tiles += M * layout.tile_bytes()) {
      float s[M][2 * M][4];
      score(s, query, tiles, reference);
      if (step + ROWS > args.tokens) {  // mask keys that only fill up the tile
        MVIT_UNROLL
        for (int n = 0; n < 2 * M; ++n)
          MVIT_UNROLL
          for (int i = 0; i < 4; ++i)
            if (step + n * 8 + lane % 4 * 2 + i % 2 >= args.tokens)
              MVIT_UNROLL
              for (int m = 0; m < M; ++m) s[m][n][i] = -kInfinity;
      }
      float largest[M][2], over = -kInfinity;
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          largest[m][half] = -kInfinity;
          MVIT_UNROLL
          for (int n = 0; n < 2 * M; ++n)
            largest[m][half] = fmaxf(largest[m][half], fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
          over = fmaxf(over, largest[m][half]);
        }
      if (any_lane(step == 0 || over > slack)) {
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float most = max_of_row(largest[m][half]);
            const float shift = step == 0 || most > slack ? most : 0.0f;
            const float factor = step == 0 ? 0.0f : exp2_approximate(-shift);
            reference[m][half] += shift;
            sum[m][half] *= factor;
            MVIT_UNROLL
            for (int n = 0; n < HEAD; ++n) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
            MVIT_UNROLL
            for (int n = 0; n < 2 * M; ++n) s[m][n][2 * half] -= shift, s[m][n][2 * half + 1] -= shift;
          }
      }
      Tile p[M][2 * M];
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int n = 0; n < 2 * M; ++n) {
          MVIT_UNROLL
          for (int i = 0; i < 4; ++i) s[m][n][i] = exp2_approximate(s[m][n][i]);
          sum[m][0] += s[m][n][0] + s[m][n][1];
          sum[m][1] += s[m][n][2] + s[m][n][3];
          pack_tile<T>(p[m][n], s[m][n]);
        }
      MVIT_UNROLL
      for (int k = 0; k < M; ++k) {  // sixteen keys each
        const Shared from = tiles + k * layout.tile_bytes() + layout.values() + lane % 16 * layout.value_stride();
        MVIT_UNROLL
        for (int n = 0; n + 1 < HEAD; n += 2) {
          uint32_t v[4];
          load_matrices_transposed(v, from + n * 16 + lane / 16 * 16);
          const uint32_t b[2][2] = {{v[0], v[1]}, {v[2], v[3]}};
          MVIT_UNROLL
          for (int m = 0; m < M; ++m) {
            multiply<T>(o[m][n], p[m][2 * k], p[m][2 * k + 1], b[0]);
            multiply<T>(o[m][n + 1], p[m][2 * k], p[m][2 * k + 1], b[1]);
          }
        }
        if constexpr (HEAD % 2 == 1) {
          uint32_t v[2];
          load_matrices_transposed(v, from + (HEAD - 1) * 16);
          MVIT_UNROLL
          for (int m = 0; m < M; ++m) multiply<T>(o[m][HEAD - 1], p[m][2 * k], p[m][2 * k + 1], v);
        }
      }
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
