// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of linear_residual (linear_residual.cpp) and its kernels
// (linear_residual_kernel.cpp).
#pragma once

#include "isa.h"
#include "rows.h"

namespace mvit {

// residual + x Wᵀ + b. weight: (out_channels, channels), contiguous, in the operand dtype of the arithmetic. Vectors
// are float, or double for float64.
struct LinearResidual {
  int64_t count, channels, out_channels;
  Rows x, residual, out;
  const void *weight, *bias;  // bias may be null
};

struct LinearResidualBackward {
  int64_t count, channels, out_channels;
  Rows grad_out, x, grad_x;
  const void* weight;
  void* grad_bias;    // same dtype as the vectors
  void* grad_weight;  // contiguous, in x's dtype
};

struct LinearResidualKernels {
  RowForward<LinearResidual> forward[kRowArithmetics];
  RowBackward<LinearResidualBackward> backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(LinearResidualKernels, linear_residual);

}  // namespace mvit
