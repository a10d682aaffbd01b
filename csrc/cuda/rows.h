// SPDX-License-Identifier: Apache-2.0
// Interface between the bindings of the row-wise operators and their kernels: arguments, and launch plans with their
// threads and shared memory. Rows and weights are contiguous and aligned to 16 bytes; widths are multiples of 8.
#pragma once

#include <cstdint>

#include "shared_rows.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

constexpr int kMostNormChannels = 256;  // normalised rows pass through registers

struct Norm {
  const void *weight, *bias;
  bool weight_in_float, bias_in_float;  // else in x's dtype
  float eps;
};

// act(LN(x) Wᵀ + b), or residual + x Wᵀ + b.
struct RowProduct {
  const void *x, *weight, *bias;  // bias may be null
  void* out;
  int64_t count;  // number of rows
  int channels, out_channels;
  bool silu;               // layer_norm_linear only
  Norm norm;               // layer_norm_linear only
  float *mean, *rstd;      // layer_norm_linear only
  const void* residual;    // linear_residual only
};

// x + fc2(silu(fc1(LN(x)))).
struct RowMlp {
  const void *x, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  void* out;
  int64_t count;
  int channels, hidden_channels;
  Norm norm;
  float *mean, *rstd;
};

// Kernel launches are in row_product.h and layer_norm_mlp.h.

}  // namespace mvit
