// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of layer_norm_linear (layer_norm_linear.cpp) and its kernels
// (layer_norm_linear_kernel.cpp).
#pragma once

#include "isa.h"
#include "rows.h"

namespace mvit {

// act(LN(x) Wᵀ + b). weight: (out_channels, channels), contiguous, in the operand dtype of the arithmetic. Vectors,
// mean and rstd are float, or double for float64.
struct LayerNormLinear {
  int64_t count, channels, out_channels;
  Rows x, out;
  void *mean, *rstd;
  const void *norm_weight, *norm_bias, *weight, *bias;  // bias may be null
  double eps;
  bool silu;
};

struct LayerNormLinearBackward {
  int64_t count, channels, out_channels;
  Rows grad_out, x, grad_x;
  const void *mean, *rstd, *norm_weight, *norm_bias, *weight, *bias;  // bias may be null
  void *grad_norm_weight, *grad_norm_bias, *grad_bias;                // same dtype as the vectors
  void* grad_weight;                                                  // contiguous, in x's dtype
  bool silu;
};

struct LayerNormLinearKernels {
  RowForward<LayerNormLinear> forward[kRowArithmetics];
  RowBackward<LayerNormLinearBackward> backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(LayerNormLinearKernels, layer_norm_linear);

}  // namespace mvit
