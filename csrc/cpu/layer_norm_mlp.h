// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of layer_norm_mlp (layer_norm_mlp.cpp) and its kernels (layer_norm_mlp_kernel.cpp).
#pragma once

#include "isa.h"
#include "rows.h"

namespace mvit {

// x + fc2(silu(fc1(LN(x)))). Weights are contiguous, in the operand dtype of the arithmetic. Vectors, mean and rstd are
// float, or double for float64.
struct LayerNormMlp {
  int64_t count, channels, hidden;
  Rows x, out;
  void *mean, *rstd;
  const void *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  double eps;
};

struct LayerNormMlpBackward {
  int64_t count, channels, hidden;
  Rows grad_out, x, grad_x;
  const void *mean, *rstd, *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight;
  void *grad_norm_weight, *grad_norm_bias, *grad_fc1_bias, *grad_fc2_bias;  // same dtype as the vectors
  void *grad_fc1_weight, *grad_fc2_weight;                                  // contiguous, in x's dtype
};

struct LayerNormMlpKernels {
  RowForward<LayerNormMlp> forward[kRowArithmetics];
  RowBackward<LayerNormMlpBackward> backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(LayerNormMlpKernels, layer_norm_mlp);

}  // namespace mvit
