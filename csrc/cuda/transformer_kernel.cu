// SPDX-License-Identifier: Apache-2.0
// transformer: the whole stack in one launch. The rows of a sequence are read once, stay on chip through all layers and
// the final LayerNorm, and are written once.
//
// A block owns whole sequences; a warp owns M tiles of 16 rows of one of them, and everything but attention involves
// only a warp's own rows. Shared memory holds the residual stream in 16 bits, key and value of one head for all rows,
// and a ring of two slots through which the weights are streamed. There is one barrier per chunk, which also orders the
// exchange of keys and values between warps. LayerNorm is folded into the next product: with W' = γ∘W, rounded,
//
//     LN(x) Wᵀ + b  =  rstd · (x W'ᵀ − mean · ΣW') + (W β + b)
//
// where ΣW' sums each row of W'. Products of 16-bit numbers are exact in float32, so what cancels where the mean is
// large is no more than the rounding error of x itself.
#include <cmath>
#include <limits>
#include <type_traits>

#include "fragments.h"
#include "launch.h"
#include "transformer.h"
#include "transformer_rows.h"

namespace mvit {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Double-buffered stream of weights: one slot is filled while the other is read.
template <int SLOT>
struct Ring {
  const unsigned char* next;
  Shared here = 0;

  MVIT_DEVICE void fetch(Shared to, int bytes, int threads) {
    MVIT_ROLLED
    for (int i = thread_index() * 16; i < bytes; i += threads * 16) copy_async<16>(to + i, next + i);
    commit_copies();
    next += bytes;
  }

  // Waits until the chunk fetched before is visible to all threads, then starts fetching the next one, of bytes_of_next
  // bytes, into the slot that all threads have finished reading.
  MVIT_DEVICE Shared advance(int bytes_of_next, int threads) {
    wait_copies<0>();
    sync_threads();
    const Shared ready = here;
    here = SLOT - here;
    if (bytes_of_next > 0) fetch(here, bytes_of_next, threads);
    return ready;
  }
};

template <typename T, int WIDTH, int HEAD_DIM, int M>
struct Transformer : TransformerRows<T, WIDTH, HEAD_DIM, M> {
  using Rows = TransformerRows<T, WIDTH, HEAD_DIM, M>;
  using Rows::args, Rows::own, Rows::layout, Rows::TILES, Rows::ROWS;
  using Rows::group_of, Rows::tiles_from, Rows::norm_of, Rows::row_tile;
  using Rows::add_to_rows, Rows::statistics, Rows::vector, Rows::vector_part;
  static constexpr int HEAD = layout.head() / 8;  // tiles of 8 columns per head
  // Tiles of hidden units computed at once: at width 192 the registers suffice for only two.
  static constexpr int UNITS = M == 2 && TILES > 9 ? 2 : 4;
  // Tiles of x in a turn of fc1's loop. At width 192 with four, two accumulators are spilled in every chunk (sm_90).
  static constexpr int FC1_GROUP = UNITS == 2 ? 6 : group_of(TILES);

  Ring<layout.slot()> ring;

  // ------------------------------------------------------------------------------------------------ products with x

  // d += x · W' over COUNT tiles of x, starting at `first`: N tiles of eight columns, out of STEP in the weights.
  template <int COUNT, int STEP, int GROUP = group_of(COUNT), int N>
  MVIT_DEVICE void multiply_rows(float (&d)[M][N][4], int first, Shared weights) const {
    MVIT_ROLLED
    for (int group = 0; group < COUNT; group += GROUP)
      MVIT_UNROLL
      for (int k = group; k < group + GROUP; ++k) {
        uint32_t a[M][4], b[N][2];
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) {
          const auto w = load_shared<Words4>(row_tile(m, first + k));
          a[m][0] = w.x, a[m][1] = w.y, a[m][2] = w.z, a[m][3] = w.w;
        }
        load_fragments(b, weights + k * STEP * kFragmentBytes);
        MVIT_UNROLL
        for (int n = 0; n < N; ++n)
          MVIT_UNROLL
          for (int m = 0; m < M; ++m) mma<T>(d[m][n], a[m], b[n]);
      }
  }

  // The part of LayerNorm that follows the product.
  template <int N>
  MVIT_DEVICE void normalise(float (&d)[M][N][4], Shared vectors) const {
    Floats2 norm[M][2];
    MVIT_UNROLL
    for (int m = 0; m < M; ++m)
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) norm[m][half] = load_shared<Floats2>(norm_of(m, half));
    MVIT_UNROLL
    for (int n = 0; n < N; ++n) {
      const auto v = load_shared<Floats4>(vectors + (n * 4 + lane_index() % 4) * 16);
      MVIT_UNROLL
      for (int m = 0; m < M; ++m)
        MVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          float(&y)[4] = d[m][n];
          y[2 * half] = (y[2 * half] - norm[m][half].x * v.x) * norm[m][half].y + v.z;
          y[2 * half + 1] = (y[2 * half + 1] - norm[m][half].x * v.y) * norm[m][half].y + v.w;
        }
    }
  }

  // ------------------------------------------------------------------------------------------------------ attention

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

  // ------------------------------------------------------------------------------------------------------- the layer

  MVIT_DEVICE void attention_half(int threads) {
    statistics();
    // Zero-initialised: registers first written under a condition would otherwise be kept live through the whole layer.
    Tile attended[M][kHeads][HEAD] = {};
    MVIT_ROLLED
    for (int head = 0; head < kHeads; ++head) {
      const int bytes_after_head = head + 1 < kHeads ? layout.head_chunk() : layout.proj_chunk();
      const int bytes_after_kv = layout.joint() ? bytes_after_head : layout.q_chunk();
      Shared chunk = 0;
      {
        float kv[M][2 * HEAD][4] = {};
        MVIT_ROLLED
        for (int part = 0; part < layout.kv_parts(); ++part) {
          chunk = ring.advance(part + 1 < layout.kv_parts() ? layout.kv_chunk() : bytes_after_kv, threads);
          multiply_rows<layout.kv_tiles(), 2 * HEAD>(kv, part * layout.kv_tiles(), chunk);
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
        multiply_rows<TILES, HEAD>(q, 0, chunk);
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
    MVIT_ROLLED
    for (int part = 0; part < layout.proj_parts(); ++part) {
      const int bytes_of_next = part + 1 < layout.proj_parts() ? layout.proj_chunk() : layout.mlp_chunk();
      const Shared chunk = ring.advance(bytes_of_next, threads);
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

  // silu(2u); the packed fc1 is halved. silu(h) = h/2 · (1 + tanh(h/2)) takes a single special-function instruction.
  // tanh.approx is accurate to 11 bits, which is enough for bfloat16 but not for float16.
  static MVIT_DEVICE float silu_of_double(float u) {
    if constexpr (std::is_same_v<T, Half>)
      return 2 * u * reciprocal_approximate(1 + exp2_approximate(-2.8853900817779268f * u));  // 2 log2 e
    else
      return u + u * tanh_approximate(u);
  }

  MVIT_DEVICE void mlp_half(int layer, int threads) {
    const int bytes_of_next = layer + 1 < args.layers ? layout.head_chunk() : 0;
    statistics();
    float y[M][2 * TILES][4];
    const float* const fc2_bias = vector(layer);
    MVIT_UNROLL
    for (int n = 0; n < 2 * TILES; ++n) {
      const Floats2 two = vector_part(fc2_bias, n / 2, n % 2);
      MVIT_UNROLL
      for (int m = 0; m < M; ++m) y[m][n][0] = y[m][n][2] = two.x, y[m][n][1] = y[m][n][3] = two.y;
    }
    MVIT_ROLLED
    for (int part = 0; part < args.hidden_chunks; ++part) {
      const Shared fc1 = ring.advance(part + 1 < args.hidden_chunks ? layout.mlp_chunk() : bytes_of_next, threads);
      const Shared fc2 = fc1 + TILES * 4 * kFragmentBytes;
      Tile hidden[M][4];
      MVIT_UNROLL
      for (int first = 0; first < 4; first += UNITS) {
        float u[M][UNITS][4] = {};
        multiply_rows<TILES, 4, FC1_GROUP>(u, 0, fc1 + first * kFragmentBytes);
        normalise(u, fc2 + (TILES * 4 * kFragmentBytes + first * 64));
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int n = 0; n < UNITS; ++n) {
            MVIT_UNROLL
            for (int i = 0; i < 4; ++i) u[m][n][i] = silu_of_double(u[m][n][i]);
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

template <typename T, int WIDTH, int HEAD_DIM, int M>
MVIT_KERNEL(kMostWarps * 32, 1) transformer_kernel(const TransformerArgs args) {
  constexpr TransformerLayout layout{WIDTH, HEAD_DIM};
  const int threads = args.warps * 32;
  Transformer<T, WIDTH, HEAD_DIM, M> transformer{{args}, {args.weights}};
  transformer.ring.fetch(0, layout.head_chunk(), threads);
  transformer.read_rows();
  MVIT_ROLLED
  for (int layer = 0; layer < args.layers; ++layer) {
    transformer.attention_half(threads);
    transformer.mlp_half(layer, threads);
  }
  transformer.write_rows();
}

template <typename T, int WIDTH, int HEAD_DIM, int M>
int launch_transformer(const TransformerArgs& args, CUstream_st* stream) {
  const int bytes = TransformerLayout{WIDTH, HEAD_DIM}.shared_bytes(args.warps * 16 * M);
  return launch(transformer_kernel<T, WIDTH, HEAD_DIM, M>, dim3(args.blocks()), 32 * args.warps, bytes, stream, args);
}

// Heads are a quarter of the width, or 8 as in Kornia. Warps of 32 rows serve widths up to 192, beyond which registers
// do not suffice. Warps of 16 rows serve all widths; up to 192 they are for sequences of at most 16 tokens, with heads
// of a quarter of the width only.
template <int WIDTH>
TransformerLaunch* find_transformer(int64_t head_dim, int64_t tiles, bool half) {
  constexpr int most_tiles = WIDTH <= 192 ? 2 : 1;
  if (head_dim == WIDTH / 4 && tiles == 1)
    return half ? launch_transformer<Half, WIDTH, WIDTH / 4, 1> : launch_transformer<BFloat16, WIDTH, WIDTH / 4, 1>;
  if (head_dim == WIDTH / 4 && tiles == most_tiles)
    return half ? launch_transformer<Half, WIDTH, WIDTH / 4, most_tiles>
                : launch_transformer<BFloat16, WIDTH, WIDTH / 4, most_tiles>;
  if (head_dim == 8 && tiles == most_tiles)
    return half ? launch_transformer<Half, WIDTH, 8, most_tiles> : launch_transformer<BFloat16, WIDTH, 8, most_tiles>;
  return nullptr;
}

#ifdef MVIT_WIDTH  // set by CMakeLists.txt; files that include this one need only the templates
template TransformerLaunch* find_transformer<MVIT_WIDTH>(int64_t head_dim, int64_t tiles, bool half);
#endif

}  // namespace mvit
