// SPDX-License-Identifier: Apache-2.0
// LayerNorm of a block of tokens as an operand of matrix tiles (transformer_tiles.h): `layer_norm` of token_lanes.h for all
// lanes of a block at once, so that its rows, which come from L2, are read in order, and with fewer instructions.
#pragma once

#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// operand = LN(panel) in V vectors of lanes; an even number of channels. And panel += later, the bias of the product that
// is added to it next, whose sums start with what is there.
template <int V>
MVIT_INLINE void normalise_lanes(bf16x2* operand, float* panel, int64_t channels, const float* weight, const float* bias,
                                 float eps, const float* later) {
  constexpr int kRows = 4;  // at once: an addition takes four cycles
  const Vec<float> count(static_cast<float>(channels));
  const auto row = [&](int64_t c, int v) { return load(panel + c * kLanes + v * kTile); };
  // total[v] = add(… add(add(0, a channel, v), another, v) …), in chains of every fourth channel.
  const auto sum_up = [&](auto& total, const auto& add) {
    Vec<float> sums[kRows][V];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = Vec<float>(0.0f);
    int64_t c = 0;
    for (; c + kRows <= channels; c += kRows)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[i][v] = add(sums[i][v], row(c + i, v), v);
    for (; c < channels; ++c)
      for (int v = 0; v < V; ++v) sums[0][v] = add(sums[0][v], row(c, v), v);
    for (int v = 0; v < V; ++v) total[v] = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
  };
  // As in normaliser_of, from the first value, so that equal values normalise to exactly 0.
  Vec<float> first[V], mean[V], rstd[V], squares[V];
  for (int v = 0; v < V; ++v) first[v] = row(0, v);
  sum_up(mean, [&](Vec<float> sum, Vec<float> x, int v) { return sum + (x - first[v]); });
  for (int v = 0; v < V; ++v) mean[v] = first[v] + mean[v] / count;
  sum_up(squares, [&](Vec<float> sum, Vec<float> x, int v) {
    const Vec<float> centred = x - mean[v];
    return fma(centred, centred, sum);
  });
  for (int v = 0; v < V; ++v) rstd[v] = Vec<float>(1.0f) / sqrt(squares[v] / count + Vec<float>(eps));
  for (int64_t c = 0; c < channels; c += 2, operand += kLanes) {
    Vec<float> y[2][V];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec<float> x = row(c + i, v);
        y[i][v] = fma((x - mean[v]) * rstd[v], Vec<float>(weight[c + i]), Vec<float>(bias[c + i]));
        store(panel + (c + i) * kLanes + v * kTile, x + Vec<float>(later[c + i]));
      }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store_first(operand + v * kTile, y[0][v], y[1][v], kTile);
  }
}

// In the first `lanes` lanes, whole vectors.
MVIT_INLINE void normalise(bf16x2* operand, float* panel, int64_t channels, const float* weight, const float* bias,
                           float eps, const float* later, int64_t lanes) {
  if (lanes > kTile)
    normalise_lanes<2>(operand, panel, channels, weight, bias, eps, later);
  else
    normalise_lanes<1>(operand, panel, channels, weight, bias, eps, later);
  clear_padding<Bf16Pairs>(operand, channels);
}

}  // namespace MVIT_ISA
}  // namespace mvit
