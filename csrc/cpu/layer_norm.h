// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of layer_norm (layer_norm.cpp) and its kernels (layer_norm_kernel.cpp).
#pragma once

#include "isa.h"
#include "rows.h"

namespace mvit {

// LayerNorm over the channels of each row. Vectors and statistics are float, or double for float64.
struct LayerNorm {
  int64_t count, channels;
  Rows x, out;
  const void *norm_weight, *norm_bias;
  void *mean, *rstd;
  double eps;
};

// The same again, from the statistics that it returned.
struct LayerNormFromStatistics {
  int64_t count, channels;
  Rows x, out;
  const void *mean, *rstd, *norm_weight, *norm_bias;
};

struct LayerNormBackward {
  int64_t count, channels;
  Rows grad_out, x, grad_x;
  const void *mean, *rstd, *norm_weight;
  void *grad_norm_weight, *grad_norm_bias;  // same dtype as the vectors
};

struct LayerNormKernels {
  RowForward<LayerNorm> forward[kRowArithmetics];
  RowForward<LayerNormFromStatistics> from_statistics[kRowArithmetics];
  RowBackward<LayerNormBackward> backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(LayerNormKernels, layer_norm);

}  // namespace mvit
