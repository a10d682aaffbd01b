// SPDX-License-Identifier: Apache-2.0
// Device functions shared by the row-wise operators (layer_norm_linear, linear_residual, layer_norm_mlp): copies of
// rows and weights into shared memory, LayerNorm in place there, products, and SiLU. Widths are multiples of 8, so rows
// are copied 16 bytes at a time.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace mvit {

// Copies `rows` rows of `units` 16-byte units to rows of `stride` bytes, using `threads` threads. Row i is read from
// from + i · from_bytes; rows from valid_rows on and units from valid_units on become zero.
MVIT_DEVICE void copy_matrix(Shared to, Shared stride, const char* from, int64_t from_bytes, int rows, int units,
                             int64_t valid_rows, int valid_units, int thread, int threads) {
  const int row_step = threads / units, unit_step = threads - row_step * units;
  int row = thread / units, unit = thread - row * units;
  MVIT_ROLLED
  while (row < rows) {
    const bool valid = row < valid_rows && unit < valid_units;
    copy_async<16>(to + row * stride + 16 * unit, valid ? from + row * from_bytes + 16 * unit : from, valid);
    row += row_step;
    unit += unit_step;
    if (unit >= units) unit -= units, ++row;
  }
}

// LayerNorm's weight or bias, stored as float32 or as T.
template <typename T>
MVIT_DEVICE void load_parameters(float (&values)[8], const void* from, int first, bool in_float) {
  if (in_float) {
    MVIT_UNROLL
    for (int i = 0; i < 8; i += 4) {
      struct alignas(16) Four {
        float at[4];
      };
      const auto four = load_constant<Four>(static_cast<const char*>(from) + 4 * (first + i));
      for (int j = 0; j < 4; ++j) values[i + j] = four.at[j];
    }
  } else {
    const auto words = load_constant<Words4>(static_cast<const char*>(from) + 2 * first);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
    MVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = unpack_low<T>(pairs[i]);
      values[2 * i + 1] = unpack_high<T>(pairs[i]);
    }
  }
}

template <typename T>
MVIT_DEVICE void unpack_eight(float (&values)[8], const Words4& words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  MVIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_low<T>(pairs[i]);
    values[2 * i + 1] = unpack_high<T>(pairs[i]);
  }
}

MVIT_DEVICE float sum_of_eight_lanes(float value) {
  value += shuffle_xor(value, 1);
  value += shuffle_xor(value, 2);
  return value + shuffle_xor(value, 4);
}

// LayerNorm of 4 · PASSES rows in shared memory by one warp, in place: eight lanes per row, four rows per pass. Mean
// and variance take two passes over registers in float32; the one-pass formula cancels where the mean is large.
// Statistics of the first `valid_rows` rows are written to mean_to and rstd_to unless mean_to is null.
template <typename T, int PASSES>
MVIT_DEVICE void normalize_rows(Shared rows, Shared stride, const Norm& norm, int channels, float* mean_to,
                                float* rstd_to, int64_t valid_rows) {
  constexpr int kUnits = kMostNormChannels / 64;  // 16-byte units per lane
  const int lane = lane_index() % 8, quarter = lane_index() / 8, units = channels / 8;
  const auto count = static_cast<float>(channels);
  float means[PASSES], rstds[PASSES];
  MVIT_UNROLL
  for (int pass = 0; pass < PASSES; ++pass) {
    const int row = 4 * pass + quarter;
    float values[kUnits][8], sum = 0, squares = 0;
    MVIT_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      if (lane + 8 * i < units)
        unpack_eight<T>(values[i], load_shared<Words4>(rows + row * stride + 16 * (lane + 8 * i)));
      MVIT_UNROLL
      for (int j = 0; j < 8; ++j) sum += lane + 8 * i < units ? values[i][j] : 0;
    }
    means[pass] = mean_of(sum_of_eight_lanes(sum), count);
    MVIT_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      MVIT_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float centred = lane + 8 * i < units ? values[i][j] - means[pass] : 0;
        squares += centred * centred;
      }
    }
    rstds[pass] = 1 / sqrtf(sum_of_eight_lanes(squares) * (1.0f / count) + norm.eps);
    if (mean_to && lane == 0 && row < valid_rows) {
      store_global(mean_to + row, means[pass]);
      store_global(rstd_to + row, rstds[pass]);
    }
  }
  MVIT_ROLLED
  for (int unit = lane; unit < units; unit += 8) {
    float weight[8], bias[8];
    load_parameters<T>(weight, norm.weight, 8 * unit, norm.weight_in_float);
    load_parameters<T>(bias, norm.bias, 8 * unit, norm.bias_in_float);
    MVIT_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) {
      const Shared place = rows + (4 * pass + quarter) * stride + 16 * unit;
      float values[8];
      unpack_eight<T>(values, load_shared<Words4>(place));
      MVIT_UNROLL
      for (int j = 0; j < 8; ++j) values[j] = (values[j] - means[pass]) * rstds[pass] * weight[j] + bias[j];
      store_shared(place, Words4{pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                 pack<T>(values[4], values[5]), pack<T>(values[6], values[7])});
    }
  }
}

// sums (16 · TILES rows × 16 · COLUMNS) += left · rightᵀ over `depth` columns (a multiple of 8) in shared memory.
// Column tiles from `columns` on are skipped. If there are none, the branch is omitted and loads and products of
// different tiles overlap.
template <typename T, int TILES, int COLUMNS>
MVIT_DEVICE void multiply_shared(float (&sums)[TILES][COLUMNS][2][4], Shared left, Shared left_stride, Shared right,
                                 Shared right_stride, Shared right_step, int depth, int columns) {
  const auto step = [&](auto groups, auto all, int k) {
    constexpr int GROUPS = decltype(groups)::value;
    Rows16<GROUPS> rows[TILES];
    MVIT_UNROLL
    for (int m = 0; m < TILES; ++m) load_tile<false>(rows[m], left + 16 * m * left_stride + 2 * k, left_stride);
    MVIT_UNROLL
    for (int n = 0; n < COLUMNS; ++n) {
      if (!decltype(all)::value && n >= columns) continue;
      RightRows16<GROUPS> tile;
      load_right(tile, right + n * right_step + 2 * k, right_stride);
      MVIT_UNROLL
      for (int m = 0; m < TILES; ++m) multiply<T>(sums[m][n], rows[m], tile);
    }
  };
  int k = 0;
  if (columns >= COLUMNS) {
    MVIT_ROLLED
    for (; k + 16 <= depth; k += 16) step(std::integral_constant<int, 2>{}, std::true_type{}, k);
  } else {
    MVIT_ROLLED
    for (; k + 16 <= depth; k += 16) step(std::integral_constant<int, 2>{}, std::false_type{}, k);
  }
  if (k < depth) step(std::integral_constant<int, 1>{}, std::false_type{}, k);
}

// x · sigmoid(x). bfloat16 uses tanh.approx, whose error of 2^-11 is an eighth of the rounding error.
template <typename T>
MVIT_DEVICE float silu(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return fmaf(0.5f * x, tanh_approximate(0.5f * x), 0.5f * x);
  } else {
    return x * reciprocal_approximate(1 + exp2_approximate(-1.44269504f * x));
  }
}

}  // namespace mvit
