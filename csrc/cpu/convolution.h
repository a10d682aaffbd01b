// SPDX-License-Identifier: Apache-2.0
// What the frozen network tells the dense convolution's kernels (convolution_kernel.cpp). No public operator has one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

struct ConvolutionShape {
  int64_t in_height, in_width, in_channels, out_channels;
  int64_t kernel, stride, dilation;  // 1 or 3; 1 or 2; any
  bool silu;                         // of the result

  int64_t out_height() const { return (in_height - 1) / stride + 1; }
  int64_t out_width() const { return (in_width - 1) / stride + 1; }
};

struct ConvolutionArgs {
  ConvolutionShape shape;
  Map in;   // data is pixel (0, 0); for kernel 3 there are `dilation` columns and rows of zeros all round it
  Map out;  // no pixel of it is one of `in`
  const void* packed;
};

// The work is shared out in units, column panels × output rows, the rows of one panel adjacent: many rows or, for small
// maps of many channels, many panels. A unit's result does not depend on the units that it is run with.
struct ConvolutionKernels {
  std::size_t (*packed_bytes)(const ConvolutionShape&);  // of weights and bias, to be aligned to 64 bytes
  // weight (out, in, kernel, kernel), contiguous, of the arithmetic's dtype; bias may be null
  void (*pack)(const ConvolutionShape&, const void* weight, const float* bias, void* packed);
  int64_t (*units)(const ConvolutionShape&);
  void (*run)(const ConvolutionArgs&, int64_t image, int64_t begin, int64_t end);
};

struct ConvolutionTable {
  ConvolutionKernels single;  // float32 maps and weights
  ConvolutionKernels pairs;   // bfloat16 maps and weights, in_channels even; null functions where the set has none
};

MVIT_DECLARE_KERNELS(ConvolutionTable, convolution);

}  // namespace mvit
