// SPDX-License-Identifier: Apache-2.0
// A warp's 16 rows in registers, as left operands of tensor-core products: loaded from shared memory, normalised there,
// and multiplied by weights that stay in shared memory.
#pragma once

#include "row_tiles.h"

namespace mvit {

constexpr int kDepthTiles = 16;  // of 16 channels, which is what 128 registers a thread allow

using RowFragments = uint32_t[kDepthTiles][4];

// The way of one of `threads` threads through rows of `units` 16-byte units. It divides here, before any loop.
struct Walk {
  int row, unit, row_step, unit_step, units;
};
MVIT_DEVICE Walk walk_of(int units, int thread, int threads) {
  const int row = thread / units, row_step = threads / units;
  return {row, thread - row * units, row_step, threads - row_step * units, units};
}

// Copies `rows` rows to rows of `stride` bytes. Row i is read from from + source(i) · row_bytes; rows for which source(i)
// is at least valid_rows, and units from valid_units on, become zero.
template <typename Source>
MVIT_DEVICE void copy_rows(Walk at, int rows, Shared to, Shared stride, const char* from, int row_bytes,
                           int valid_rows, int valid_units, const Source& source) {
  MVIT_ROLLED
  while (at.row < rows) {
    const int row = source(at.row);
    const bool valid = row < valid_rows && at.unit < valid_units;
    copy_async<16>(to + at.row * stride + 16 * at.unit, from + (valid ? row * row_bytes + 16 * at.unit : 0), valid);
    at.row += at.row_step;
    at.unit += at.unit_step;
    if (at.unit >= at.units) at.unit -= at.units, ++at.row;
  }
}

MVIT_DEVICE void load_rows(RowFragments& rows, Shared at, Shared stride, int tiles) {
  const Shared place = at + lane_index() % 16 * stride + 16 * (lane_index() / 16);
  MVIT_UNROLL
  for (int k = 0; k < kDepthTiles; ++k) {
    if (k >= tiles) break;
    load_matrices(rows[k], place + 32 * k);
  }
}

// LayerNorm's parameters as float32: weight and bias of a channel beside each other, for `normalize`.
template <typename T>
MVIT_DEVICE void store_parameters(Shared to, const Norm& norm, int channels, int thread, int threads) {
  const auto value = [](const void* from, int c, bool in_float) {
    return in_float ? load_constant<float>(static_cast<const char*>(from) + 4 * c)
                    : unpack<T>(load_constant<T>(static_cast<const char*>(from) + 2 * c));
  };
  MVIT_ROLLED
  for (int c = thread; c < channels; c += threads) {
    const float weight = value(norm.weight, c, norm.weight_in_float), bias = value(norm.bias, c, norm.bias_in_float);
    store_shared(to + 8 * c, Floats2{weight, bias});
  }
}

// LayerNorm. Row `half` of a lane is lane / 4 + 8 · half; four lanes have a row. Mean and variance take two passes in
// float32; the one-pass formula cancels where the mean is large. Padding is in neither sum and stays zero.
template <typename T>
MVIT_DEVICE void normalize(RowFragments& rows, Shared parameters, int channels, float eps, float (&mean)[2],
                           float (&rstd)[2]) {
  const auto count = static_cast<float>(channels);
  const auto for_pairs = [&](auto&& visit) {  // of both rows, 8 channels after the other
    MVIT_UNROLL
    for (int i = 0; i < 2 * kDepthTiles; ++i) {
      if (8 * i >= channels) break;
      visit(i, rows[i / 2][i % 2 * 2], rows[i / 2][i % 2 * 2 + 1]);
    }
  };
  float sums[2][2] = {}, squares[2][2] = {};  // of a row's low and high halves of pairs
  for_pairs([&](int, uint32_t first, uint32_t second) {
    sums[0][0] += unpack_low<T>(first), sums[0][1] += unpack_high<T>(first);
    sums[1][0] += unpack_low<T>(second), sums[1][1] += unpack_high<T>(second);
  });
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half) mean[half] = mean_of(sum_of_row(sums[half][0] + sums[half][1]), count);
  for_pairs([&](int, uint32_t first, uint32_t second) {
    const float centred[4] = {unpack_low<T>(first) - mean[0], unpack_high<T>(first) - mean[0],
                              unpack_low<T>(second) - mean[1], unpack_high<T>(second) - mean[1]};
    MVIT_UNROLL
    for (int i = 0; i < 4; ++i) squares[i / 2][i % 2] += centred[i] * centred[i];
  });
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half)
    rstd[half] = 1 / sqrtf(sum_of_row(squares[half][0] + squares[half][1]) * (1.0f / count) + eps);
  const Shared place = parameters + 16 * (lane_index() % 4);
  for_pairs([&](int i, uint32_t& first, uint32_t& second) {
    const auto two = load_shared<Floats4>(place + 64 * i);  // weight and bias of a pair's channels
    first = pack<T>((unpack_low<T>(first) - mean[0]) * rstd[0] * two.x + two.y,
                    (unpack_high<T>(first) - mean[0]) * rstd[0] * two.z + two.w);
    second = pack<T>((unpack_low<T>(second) - mean[1]) * rstd[1] * two.x + two.y,
                     (unpack_high<T>(second) - mean[1]) * rstd[1] * two.z + two.w);
  });
}

// sums (16 × 32) += rows · weightsᵀ over `tiles` tiles of 16 channels (at most kDepthTiles of them), the next weights on
// their way meanwhile. Each tile of 8 columns is 8 rows of weights in shared memory.
template <typename T>
MVIT_DEVICE void multiply_group(float (&sums)[4][4], const RowFragments& rows, Shared weights, Shared stride,
                                int tiles) {
  const int lane = lane_index();
  const Shared place = weights + (lane % 8 + lane / 16 * 8) * stride + 16 * (lane / 8 % 2);
  uint32_t right[2][2][4];
  const auto load = [&](int k) {
    MVIT_UNROLL
    for (int i = 0; i < 2; ++i) load_matrices(right[k % 2][i], place + 16 * i * stride + 32 * k);
  };
  load(0);
  MVIT_UNROLL
  for (int k = 0; k < kDepthTiles; ++k) {
    const bool more = k + 1 < kDepthTiles && k + 1 < tiles;
    if (more) load(k + 1);
    MVIT_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      const uint32_t(&pair)[4] = right[k % 2][tile / 2];
      const uint32_t b[2] = {pair[tile % 2 * 2], pair[tile % 2 * 2 + 1]};
      mma<T>(sums[tile], rows[k], b);
    }
    if (!more) break;
  }
}

}  // namespace mvit
