// SPDX-License-Identifier: Apache-2.0
// What the front of linear_residual (linear_residual.cpp) tells its kernels (linear_residual_kernel.cpp).
#pragma once

#include "isa.h"
#include "rows.h"

namespace mvit {

// residual + x Wᵀ + b. The weight (out_channels, channels) is contiguous and in the arithmetic's type; vectors are float,
// double for float64.
struct LinearResidual {
  int64_t count, channels, out_channels;
  Rows x, residual, out;
  const void *weight, *bias;  // bias may be null
};

struct LinearResidualBackward {
  int64_t count, channels, out_channels;
  Rows grad_out, x, grad_x;
  const void* weight;
  void* grad_bias;    // as the vectors
  void* grad_weight;  // contiguous, in x's dtype
};

struct LinearResidualKernels {
  RowForward<LinearResidual> forward[kRowArithmetics];
  RowBackward<LinearResidualBackward> backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(LinearResidualKernels, linear_residual);

}  // namespace mvit
