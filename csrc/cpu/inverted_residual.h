// SPDX-License-Identifier: Apache-2.0
// What the front of inverted_residual (inverted_residual.cpp) and the frozen network tell its kernels
// (inverted_residual_kernel.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

struct InvertedResidualShape {
  int64_t in_height, in_width, in_channels, hidden, out_channels;
  int64_t stride, dilation;  // 1 or 2; any
  bool residual;             // add the input: stride 1 and out_channels = in_channels

  int64_t out_height() const { return (in_height - 1) / stride + 1; }
  int64_t out_width() const { return (in_width - 1) / stride + 1; }

  // The same with the least dilation: further than the map is wide and high, all taps but the middle one see zeros, and
  // scratch grows with the distance.
  InvertedResidualShape with_least_dilation() const {
    InvertedResidualShape shape = *this;
    const int64_t side = in_height > in_width ? in_height : in_width;
    if (dilation > side) shape.dilation = side;
    return shape;
  }

  // Whether scratch, the rows of all hidden channels that the filter sees at once, is a number of bytes.
  bool has_scratch() const {
    const double reach = 2.0 * static_cast<double>(dilation) + 32, row = static_cast<double>(in_width) + reach;
    return reach * row * static_cast<double>(hidden) < 0x1p48 && row * static_cast<double>(in_channels) < 0x1p48;
  }
};

// Contiguous: expand (hidden, in), depthwise (hidden, 3, 3) and project (out, hidden) of the arithmetic's dtype.
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
  Map in, out;  // no pixel of one is in the other; neither needs a border
  const void* packed;
};

struct InvertedResidualKernels {
  std::size_t (*packed_bytes)(const InvertedResidualShape&);  // of weights and biases, to be aligned to 64 bytes
  void (*pack)(const InvertedResidualShape&, const InvertedResidualWeights&, void* packed);
  std::size_t (*scratch_bytes)(const InvertedResidualShape&);
  // Output rows [begin, end) of one image. Each call expands the 2 · dilation input rows around its own once more, so
  // strips of a few rows are dear; the result does not depend on how the rows are split.
  void (*run)(const InvertedResidualArgs&, int64_t image, int64_t begin, int64_t end, void* scratch);
};

struct InvertedResidualTable {
  InvertedResidualKernels single;       // float32 maps and weights
  InvertedResidualKernels single_bf16;  // bfloat16 maps, float32 weights
  InvertedResidualKernels pairs;  // bfloat16 maps and weights, in_channels and hidden even; null functions where the set has none
};

MVIT_DECLARE_KERNELS(InvertedResidualTable, inverted_residual);

}  // namespace mvit
