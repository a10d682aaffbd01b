// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of inverted_residual (inverted_residual.cpp), the frozen network (run_program.cpp) and
// the kernels (inverted_residual_kernel.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

struct InvertedResidualShape {
  int64_t in_height, in_width, in_channels, hidden, out_channels;
  int64_t stride, dilation;  // 1 or 2; any
  bool residual;             // add the input; requires stride 1 and out_channels = in_channels

  int64_t out_height() const { return (in_height - 1) / stride + 1; }
  int64_t out_width() const { return (in_width - 1) / stride + 1; }

  // The same convolution with the smallest equivalent dilation. Beyond the larger side of the map all taps but the
  // centre one read zeros, and scratch memory grows with the dilation.
  InvertedResidualShape with_least_dilation() const {
    InvertedResidualShape shape = *this;
    const int64_t side = in_height > in_width ? in_height : in_width;
    if (dilation > side) shape.dilation = side;
    return shape;
  }

  // Whether the scratch size (all expanded rows that the filter reads at once) fits in an integer.
  bool has_scratch() const {
    const double reach = 2.0 * static_cast<double>(dilation) + 32, row = static_cast<double>(in_width) + reach;
    return reach * row * static_cast<double>(hidden) < 0x1p48 && row * static_cast<double>(in_channels) < 0x1p48;
  }
};

// All contiguous: expand (hidden, in), depthwise (hidden, 3, 3) and project (out, hidden), in the operand dtype of the
// arithmetic.
struct InvertedResidualWeights {
  const void* expand;
  const float* expand_bias;
  const void* depthwise;
  const float* depthwise_bias;
  const void* project;
  const float* project_bias;
};

struct InvertedResidualArgs {
  InvertedResidualShape shape;
  // Must not overlap; neither needs a border. Where in.channel_step is 32 or 16, matrix tiles read it in place, and
  // up to kTileReach (map.h) pixels after its end.
  Map in, out;
  const void* packed;
};

struct InvertedResidualKernels {
  // Size of packed weights and biases; align the buffer to 64 bytes.
  std::size_t (*packed_bytes)(const InvertedResidualShape&);
  void (*pack)(const InvertedResidualShape&, const InvertedResidualWeights&, void* packed);
  std::size_t (*scratch_bytes)(const InvertedResidualShape&);
  // Computes output rows [begin, end) of one image. Each call recomputes the expansion of the 2 · dilation input rows
  // around its own, so strips of only a few rows are expensive. The result does not depend on how the rows are split.
  void (*run)(const InvertedResidualArgs&, int64_t image, int64_t begin, int64_t end, void* scratch);
};

struct InvertedResidualTable {
  InvertedResidualKernels single;       // float32 maps and weights
  InvertedResidualKernels single_bf16;  // bfloat16 maps, float32 weights
  // bfloat16 maps and weights; in_channels and hidden even, except on matrix tiles; null functions if the instruction set
  // has neither
  InvertedResidualKernels pairs;
};

MVIT_DECLARE_KERNELS(InvertedResidualTable, inverted_residual);

}  // namespace mvit
