// SPDX-License-Identifier: Apache-2.0
// A layer of the transformer kernel: attention and MLP of a warp's rows.
#pragma once

#include <type_traits>

#include "transformer_attention.h"

namespace mvit {

template <typename T, int WIDTH, int HEAD_DIM, int M>
struct Transformer : TransformerAttention<T, WIDTH, HEAD_DIM, M> {
  using Attention = TransformerAttention<T, WIDTH, HEAD_DIM, M>;
  using Products = typename Attention::Products;
  using Attention::args, Attention::layout, Attention::ring, Attention::TILES, Attention::HEAD;
  using Attention::group_of, Attention::vector, Attention::vector_part;
  using Attention::normalise, Attention::store_keys_and_values, Attention::attend;
  using Attention::add_to_rows, Attention::statistics;
  // Tiles of hidden units computed at once: at width 192 the registers suffice for only two.
  static constexpr int UNITS = M == 2 && TILES > 9 ? 2 : 4;
  // Whether one chunk of the MLP is copied at a time, whatever the slot holds: with two units there is no register left
  // to count them.
  static constexpr bool ONE_CHUNK = UNITS == 2;
  // Tiles of x in a turn of fc1's loop. At width 192 with more, two accumulators are spilled in every chunk (sm_90).
  static constexpr int FC1_GROUP = UNITS == 2 ? 3 : group_of(TILES);

  // Bytes that are copied at once: where a head begins, and from a chunk of the MLP on.
  MVIT_DEVICE int bytes_of_head() const {
    return layout.kv_parts() == 1 ? layout.head_chunk() : args.copies.kv * layout.kv_chunk();
  }
  MVIT_DEVICE int bytes_of_mlp(int chunk) const {
    if constexpr (ONE_CHUNK) return layout.mlp_chunk();
    const int left = args.hidden_chunks - chunk;
    return (left < args.copies.mlp ? left : args.copies.mlp) * layout.mlp_chunk();
  }

  MVIT_DEVICE void attention_half(int threads) {
    statistics();
    // Zero-initialised: registers first written under a condition would otherwise be kept live through the whole layer.
    Tile attended[M][kHeads][HEAD] = {};
    MVIT_ROLLED
    for (int head = 0; head < kHeads; ++head) {
      const int bytes_after_head = head + 1 < kHeads ? bytes_of_head() : args.copies.proj * layout.proj_chunk();
      const int bytes_after_kv = layout.joint() ? bytes_after_head : layout.q_chunk();
      Shared chunk = 0;
      {
        float kv[M][2 * HEAD][4] = {};
        MVIT_ROLLED
        for (int part = 0; part < layout.kv_parts(); ++part) {
          if (part == 0 || args.copies.kv == 1)
            chunk =
                ring.advance(part + args.copies.kv < layout.kv_parts() ? layout.kv_chunk() : bytes_after_kv, threads);
          else
            chunk += layout.kv_chunk();
          Products::template multiply_rows<layout.kv_tiles(), 2 * HEAD>(kv, part * layout.kv_tiles(), chunk);
        }
        normalise(kv, chunk + layout.kv_matrix());
        store_keys_and_values(kv);
      }
      Tile query[M][HEAD], out[M][HEAD];
      {
        if constexpr (layout.joint()) {
          chunk += layout.kv_chunk();
          sync_threads();  // keys and values are there
        } else {
          chunk = ring.advance(bytes_after_head, threads);
        }
        float q[M][HEAD][4] = {};
        Products::template multiply_rows<TILES, HEAD>(q, 0, chunk);
        normalise(q, chunk + layout.q_matrix());
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int n = 0; n < HEAD; ++n) pack_tile<T>(query[m][n], q[m][n]);
      }
      attend(out, query);
      MVIT_UNROLL
      // Registers cannot be indexed at run time: all heads' copies are compiled, and only this head's executes.
      for (int h = 0; h < kHeads; ++h)
        if (h == head)
          MVIT_UNROLL
          for (int m = 0; m < M; ++m)
            MVIT_UNROLL
            for (int n = 0; n < HEAD; ++n) attended[m][h][n][0] = out[m][n][0], attended[m][h][n][1] = out[m][n][1];
    }
    Shared chunk = 0;
    MVIT_ROLLED
    for (int part = 0; part < layout.proj_parts(); ++part) {
      if (part == 0 || args.copies.proj == 1)
        chunk = ring.advance(
            part + args.copies.proj < layout.proj_parts() ? layout.proj_chunk() : bytes_of_mlp(0), threads);
      else
        chunk += layout.proj_chunk();
      MVIT_ROLLED
      for (int tile = 0; tile < layout.proj_tiles(); ++tile)
        project(attended, part * layout.proj_tiles() + tile, chunk + tile * layout.proj_tile());
    }
  }

  // 16 columns of the out-projection.
  MVIT_DEVICE void project(const Tile (&attended)[M][kHeads][HEAD], int tile, Shared weights) const {
    const int lane = lane_index();
    const Shared biases = weights + kHeads * HEAD * 8 * 16 * 2 + lane % 4 * 8;
    const auto left = load_shared<Floats2>(biases), right = load_shared<Floats2>(biases + 32);
    float d[M][2][4];
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) {
      d[m][0][0] = d[m][0][2] = left.x, d[m][0][1] = d[m][0][3] = left.y;
      d[m][1][0] = d[m][1][2] = right.x, d[m][1][1] = d[m][1][3] = right.y;
    }
    MVIT_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const Shared from = weights + h * HEAD * 2 * kHalfFragmentBytes;
      MVIT_UNROLL
      for (int k = 0; k + 1 < HEAD; k += 2) {
        uint32_t b[2][2];
        load_fragments(b, from + k * kFragmentBytes);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int n = 0; n < 2; ++n) multiply<T>(d[m][n], attended[m][h][k], attended[m][h][k + 1], b[n]);
      }
      if constexpr (HEAD % 2 == 1) {
        const auto b = load_shared<Words2>(from + (HEAD - 1) * kFragmentBytes + lane * 8);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          multiply<T>(d[m][0], attended[m][h][HEAD - 1], b.x);
          multiply<T>(d[m][1], attended[m][h][HEAD - 1], b.y);
        }
      }
    }
    MVIT_UNROLL
    for (int m = 0; m < M; ++m) add_to_rows(m, tile, d[m][0], d[m][1]);
  }

  MVIT_DEVICE void mlp_half(int layer, int threads) {
    const int bytes_of_next = layer + 1 < args.layers ? bytes_of_head() : 0;
    statistics();
    float y[M][2 * TILES][4];
    const float* const fc2_bias = vector(layer);
    MVIT_UNROLL
    for (int n = 0; n < 2 * TILES; ++n) {
      const Floats2 two = vector_part(fc2_bias, n / 2, n % 2);
      MVIT_UNROLL
      for (int m = 0; m < M; ++m) y[m][n][0] = y[m][n][2] = two.x, y[m][n][1] = y[m][n][3] = two.y;
    }
    Shared fc1 = 0;
    int ahead = 0;  // chunks in the slot that come behind this one
    MVIT_ROLLED
    for (int part = 0; part < args.hidden_chunks; ++part) {
      if constexpr (ONE_CHUNK) {
        fc1 = ring.advance(part + 1 < args.hidden_chunks ? layout.mlp_chunk() : bytes_of_next, threads);
      } else if (ahead-- == 0) {
        const int next = part + args.copies.mlp;
        fc1 = ring.advance(next < args.hidden_chunks ? bytes_of_mlp(next) : bytes_of_next, threads);
        ahead = args.copies.mlp - 1;
      } else {
        fc1 += layout.mlp_chunk();
      }
      const Shared fc2 = fc1 + TILES * 4 * kFragmentBytes;
      Tile hidden[M][4];
      MVIT_UNROLL
      for (int first = 0; first < 4; first += UNITS) {
        float u[M][UNITS][4] = {};
        Products::template multiply_rows<TILES, 4, FC1_GROUP>(u, 0, fc1 + first * kFragmentBytes);
        normalise(u, fc2 + (TILES * 4 * kFragmentBytes + first * 64));
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int n = 0; n < UNITS; ++n) {
            MVIT_UNROLL
            for (int i = 0; i < 4; ++i) u[m][n][i] = silu_of_double<T>(u[m][n][i]);  // the packed fc1 is halved
            pack_tile<T>(hidden[m][first + n], u[m][n]);
          }
      }
      MVIT_UNROLL
      for (int n = 0; n < 2 * TILES; ++n) {
        uint32_t b[2][2];
        load_fragments(b, fc2 + n * 2 * kFragmentBytes);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          multiply<T>(y[m][n], hidden[m][0], hidden[m][1], b[0]);
          multiply<T>(y[m][n], hidden[m][2], hidden[m][3], b[1]);
        }
      }
    }
    MVIT_UNROLL
    for (int tile = 0; tile < TILES; ++tile)
      MVIT_UNROLL
      for (int m = 0; m < M; ++m) add_to_rows(m, tile, y[m][2 * tile], y[m][2 * tile + 1]);
  }
};

}  // namespace mvit
