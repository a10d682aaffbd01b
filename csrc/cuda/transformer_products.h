// SPDX-License-Identifier: Apache-2.0
// The stream of weights in the transformer kernel, and products of a warp's rows with them.
#pragma once

#include "fragments.h"
#include "transformer.h"
#include "transformer_rows.h"

namespace mvit {

// Double-buffered stream of weights: one slot is filled while the other is read.
struct Ring {
  const TransformerArgs& args;
  const unsigned char* next = args.weights;
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
    here = args.slot - here;
    if (bytes_of_next > 0) fetch(here, bytes_of_next, threads);
    return ready;
  }
};

template <typename T, int WIDTH, int HEAD_DIM, int M>
struct TransformerProducts : TransformerRows<T, WIDTH, HEAD_DIM, M> {
  using Rows = TransformerRows<T, WIDTH, HEAD_DIM, M>;
  using Rows::layout, Rows::group_of, Rows::norm_of, Rows::row_tile;

  Ring ring;

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
};

}  // namespace mvit
