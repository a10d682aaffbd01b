// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of batch_norm_activation (batch_norm_activation.cpp) and its kernels
// (batch_norm_activation_kernel.cpp).
#pragma once

#include <cstddef>

#include "isa.h"
#include "rows.h"

namespace mvit {

// `images` stretches of `rows` rows of `channels` adjacent values, all of which share statistics channel by channel. A
// channels-last map is one such stretch; a contiguous one is, for each channel, `images` planes with one value a row.
struct Pixels {
  int64_t images, image_stride, rows, channels;
};

// Forward (out, mean, rstd and variance are results) or backward (out is the gradient of x; mean and rstd are those of
// forward, and the gradients of weight and bias are results). Vectors are float, or double for float64.
struct BatchNormActivation {
  Pixels pixels;
  const void *x, *grad_out;
  void* out;
  const void *weight, *bias;
  void *mean, *rstd, *variance;
  void *grad_weight, *grad_bias;
  double eps;
  bool silu;
};

// Rows are processed in blocks of a size that depends on the widths alone. Each of the two passes over the map goes
// through all blocks; between them the sums of the first, one for each block, are combined in the order of the blocks. So
// bits do not depend on which thread processes which blocks.
struct BatchNormActivationPasses {
  int64_t (*blocks)(const Pixels&);
  std::size_t (*shared_bytes)(const Pixels&);   // the blocks' sums
  std::size_t (*scratch_bytes)(const Pixels&);  // of a thread
  void (*sum)(const BatchNormActivation&, int64_t begin, int64_t end, void* shared, void* scratch);
  void (*combine)(const BatchNormActivation&, void* shared, void* scratch);
  void (*write)(const BatchNormActivation&, int64_t begin, int64_t end, void* scratch);  // from the last to the first
  // Where each channel is its own `Pixels`: all of this for channels [begin, end), with the shared memory in `scratch`.
  void (*planes)(const BatchNormActivation&, int64_t begin, int64_t end, void* shared, void* scratch);
};

struct BatchNormActivationKernels {
  BatchNormActivationPasses forward[kRowArithmetics], backward[kRowArithmetics];
};

MVIT_DECLARE_KERNELS(BatchNormActivationKernels, batch_norm_activation);

}  // namespace mvit
