// SPDX-License-Identifier: Apache-2.0
// Interface between the frozen network (run_program.cpp) and the kernels of a depthwise 3×3 convolution by itself
// (depthwise_convolution_kernel.cpp), as detection heads have it. Inside an inverted residual it is depthwise.h's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "isa.h"
#include "map.h"

namespace mvit {

struct DepthwiseConvolutionShape {
  int64_t in_height, in_width, channels;
  int64_t stride, dilation;  // 1 or 2; any
  Activation activation;

  int64_t out_height() const { return (in_height - 1) / stride + 1; }
  int64_t out_width() const { return (in_width - 1) / stride + 1; }
  std::size_t weight_bytes() const { return 10 * static_cast<std::size_t>(channels) * sizeof(float); }
};

struct DepthwiseConvolutionArgs {
  DepthwiseConvolutionShape shape;
  Map in, out;           // must not overlap; `in` needs no border
  const float* weights;  // [nine taps, then the bias][channel]
};

struct DepthwiseConvolutionKernels {
  // Output rows [begin, end) of one image. A row's result does not depend on the others of the same call.
  void (*run)(const DepthwiseConvolutionArgs&, int64_t begin, int64_t end);
};

struct DepthwiseConvolutionTable {
  DepthwiseConvolutionKernels single;  // float32 maps
  DepthwiseConvolutionKernels pairs;   // bfloat16 maps; null if the instruction set has no pairs
};

MVIT_DECLARE_KERNELS(DepthwiseConvolutionTable, depthwise_convolution);

}  // namespace mvit
