// SPDX-License-Identifier: Apache-2.0
// Interface between the frozen network (run_program.cpp) and the dense-convolution kernels (convolution_kernel.cpp):
// shapes, arguments and the dispatch table. There is no public convolution operator.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "isa.h"
#include "map.h"

namespace mvit {

struct ConvolutionShape {
  int64_t in_height, in_width, in_channels, out_channels;
  int64_t kernel, stride, dilation;  // 1 or 3; 1 or 2; any
  Activation activation;

  int64_t out_height() const { return (in_height - 1) / stride + 1; }
  int64_t out_width() const { return (in_width - 1) / stride + 1; }
};

struct ConvolutionArgs {
  ConvolutionShape shape;
  // data points at pixel (0, 0); kernel 3 needs a border of `dilation` zero pixels on every side. On matrix tiles `in` has
  // a channel_step of 32, or 16 or 4 for as many channels, and memory for kTileReach more pixels after its end.
  Map in;
  Map out;  // must not overlap `in`
  const void* packed;
};

// Work is divided into units: column panels × output rows, with the rows of one panel consecutive; on matrix tiles whole rows
// where the map is large. There are many rows, or, for small maps with many channels, many panels. A unit's result does not
// depend on which units run in the same call.
struct ConvolutionKernels {
  // Size of packed weights and bias; align the buffer to 64 bytes.
  std::size_t (*packed_bytes)(const ConvolutionShape&);
  // weight: (out, in, kernel, kernel), contiguous, in the operand dtype of the arithmetic. bias may be null.
  void (*pack)(const ConvolutionShape&, const void* weight, const float* bias, void* packed);
  int64_t (*units)(const ConvolutionShape&);
  std::size_t (*scratch_bytes)(const ConvolutionShape&);
  void (*run)(const ConvolutionArgs&, int64_t image, int64_t begin, int64_t end, void* scratch);
};

struct ConvolutionTable {
  ConvolutionKernels single;  // float32 maps and weights
  // bfloat16 maps and weights, in_channels even; null functions if the instruction set has no pairs. On matrix tiles where
  // it has them.
  ConvolutionKernels pairs;
};

MVIT_DECLARE_KERNELS(ConvolutionTable, convolution);

}  // namespace mvit
