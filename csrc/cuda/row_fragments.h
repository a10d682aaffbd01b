// SPDX-License-Identifier: Apache-2.0
// A warp's rows in registers, as left operands of tensor-core products: loaded from shared memory, normalised there,
// and multiplied by weights that stay in shared memory.
#pragma once

#include "row_values.h"

namespace mvit {

// 16 rows of up to TILES tiles of 16 channels. The functions below take how many tiles there are: where that is TILES,
// as in kernels of one width, the compiler drops all branches.
template <int TILES>
using RowFragments = uint32_t[TILES][4];

// Copies `rows` rows to rows of `stride` bytes, a warp one, two or four of them at once, so that nothing is divided.
// Row i is read from from + source(i) · row_bytes; rows for which source(i) is at least valid_rows, and units from
// valid_units on, become zero.
template <typename Source>
MVIT_DEVICE void copy_rows(int rows, Shared to, Shared stride, const char* from, int row_bytes, int valid_rows,
                           int units, int valid_units, int warp, int warps, const Source& source) {
  const int log_lanes = units <= 8 ? 3 : units <= 16 ? 4 : 5;  // lanes of a row
  const int first = (32 * warp + lane_index()) >> log_lanes, step = 32 * warps >> log_lanes;
  MVIT_ROLLED
  for (int unit = lane_index() & ((1 << log_lanes) - 1); unit < units; unit += 32) {
    const bool valid = unit < valid_units;
    MVIT_UNROLL_BY_4
    for (int i = first; i < rows; i += step) {
      const int row = source(i);
      copy_async<16>(to + i * stride + 16 * unit, from + row * row_bytes + 16 * unit, valid && row < valid_rows);
    }
  }
}

template <int TILES>
MVIT_DEVICE void load_rows(RowFragments<TILES>& rows, Shared at, Shared stride, int tiles) {
  const Shared place = at + lane_index() % 16 * stride + 16 * (lane_index() / 16);
  MVIT_UNROLL
  for (int k = 0; k < TILES; ++k) {
    if (k >= tiles) break;
    load_matrices(rows[k], place + 32 * k);
  }
}

// LayerNorm's weight and bias, first as they are (`raw`), then as float32 and a channel's beside each other
// (`parameters`). Each thread converts what it has copied.
MVIT_DEVICE void copy_parameters(Shared raw, const Norm& norm, int channels, int thread, int threads) {
  MVIT_UNROLL
  for (int which = 0; which < 2; ++which) {
    const auto* from = static_cast<const char*>(which ? norm.bias : norm.weight);
    const int units = channels * ((which ? norm.bias_in_float : norm.weight_in_float) ? 4 : 2) / 16;
    MVIT_ROLLED
    for (int unit = thread; unit < units; unit += threads)
      copy_async<16>(raw + 4 * which * channels + 16 * unit, from + 16 * unit);
  }
}
template <typename T>
MVIT_DEVICE void convert_parameters(Shared parameters, Shared raw, const Norm& norm, int channels, int thread,
                                    int threads) {
  MVIT_UNROLL
  for (int which = 0; which < 2; ++which) {
    const bool in_float = which ? norm.bias_in_float : norm.weight_in_float;
    const Shared from = raw + 4 * which * channels, to = parameters + 4 * which;
    const int units = channels * (in_float ? 4 : 2) / 16;
    MVIT_ROLLED
    for (int unit = thread; unit < units; unit += threads) {
      if (in_float) {
        const auto four = load_shared<Floats4>(from + 16 * unit);
        const float values[4] = {four.x, four.y, four.z, four.w};
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) store_shared(to + 8 * (4 * unit + i), values[i]);
      } else {
        float values[8];
        unpack_eight<T>(values, load_shared<Words4>(from + 16 * unit));
        MVIT_UNROLL
        for (int i = 0; i < 8; ++i) store_shared(to + 8 * (8 * unit + i), values[i]);
      }
    }
  }
}

// Mean and 1 / σ of row lane % (16 · ROWS) in shared memory. Two passes in float32; the one-pass formula cancels where
// the mean is large. Even and odd 16-byte units are summed for themselves, by two lanes where a warp has 16 rows, so
// that the order of sums is one whatever ROWS is.
template <typename T, int ROWS>
MVIT_DEVICE void row_statistics(Shared rows, Shared stride, int channels, float eps, float& mean, float& rstd) {
  const Shared row = rows + lane_index() % (16 * ROWS) * stride;
  const int units = channels / 8;
  const auto count = static_cast<float>(channels);
  const auto sum_of = [&](auto&& of_value) {
    const auto part = [&](int odd) {
      float sum = 0;
      MVIT_UNROLL_BY_4
      for (int unit = odd; unit < units; unit += 2) {
        float x[8];
        unpack_eight<T>(x, load_shared<Words4>(row + 16 * unit));
        MVIT_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = of_value(x[i]);
        sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
      return sum;
    };
    if constexpr (ROWS == 2) return part(0) + part(1);
    const float own = part(lane_index() / 16);
    return own + shuffle_xor(own, 16);
  };
  mean = mean_of(sum_of([](float x) { return x; }), count);
  const float squares = sum_of([&](float x) { return (x - mean) * (x - mean); });
  rstd = 1 / sqrtf(squares * (1.0f / count) + eps);
}

// LayerNorm of rows whose statistics lane % (16 · ROWS) has. Row i of a lane is lane / 4 + 8 · i. Padding stays zero.
template <typename T, int ROWS, int TILES>
MVIT_DEVICE void normalize(RowFragments<TILES> (&rows)[ROWS], int tiles, Shared parameters, int channels, float mean,
                           float rstd) {
  float means[2 * ROWS], rstds[2 * ROWS];
  MVIT_UNROLL
  for (int i = 0; i < 2 * ROWS; ++i) {
    means[i] = shuffle(mean, lane_index() / 4 + 8 * i);
    rstds[i] = shuffle(rstd, lane_index() / 4 + 8 * i);
  }
  const Shared place = parameters + 16 * (lane_index() % 4);
  MVIT_UNROLL
  for (int k = 0; k < 2 * TILES; ++k) {  // 8 channels
    if (k / 2 >= tiles || (k % 2 == 1 && k / 2 + 1 == tiles && 8 * k >= channels)) break;
    const auto two = load_shared<Floats4>(place + 64 * k);  // weight and bias of a pair's channels
    MVIT_UNROLL
    for (int i = 0; i < 2 * ROWS; ++i) {
      uint32_t& pair = rows[i / 2][k / 2][k % 2 * 2 + i % 2];
      pair = pack<T>((unpack_low<T>(pair) - means[i]) * rstds[i] * two.x + two.y,
                     (unpack_high<T>(pair) - means[i]) * rstds[i] * two.z + two.w);
    }
  }
}

// sums (ROWS times 16 × 32) += rows · weightsᵀ, the next weights on their way meanwhile. Each tile of 8 columns is 8
// rows of weights in shared memory.
template <typename T, int ROWS, int TILES>
MVIT_DEVICE void multiply_group(float (&sums)[ROWS][4][4], const RowFragments<TILES> (&rows)[ROWS], Shared weights,
                                Shared stride, int tiles) {
  const int lane = lane_index();
  const Shared place = weights + (lane % 8 + lane / 16 * 8) * stride + 16 * (lane / 8 % 2);
  uint32_t right[2][2][4];
  const auto load = [&](int k) {
    MVIT_UNROLL
    for (int i = 0; i < 2; ++i) load_matrices(right[k % 2][i], place + 16 * i * stride + 32 * k);
  };
  load(0);
  MVIT_UNROLL
  for (int k = 0; k < TILES; ++k) {
    const bool more = k + 1 < TILES && k + 1 < tiles;
    if (more) load(k + 1);
    MVIT_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      const uint32_t(&pair)[4] = right[k % 2][tile / 2];
      const uint32_t b[2] = {pair[tile % 2 * 2], pair[tile % 2 * 2 + 1]};
      MVIT_UNROLL
      for (int m = 0; m < ROWS; ++m) mma<T>(sums[m][tile], rows[m][k], b);
    }
    if (!more) break;
  }
}

}  // namespace mvit
