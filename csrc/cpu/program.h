// SPDX-License-Identifier: Apache-2.0
// The program of a frozen network (network.cpp): what mvit_kernels/nn/network.py writes, read, checked and laid out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "convolution.h"
#include "inverted_residual.h"
#include "tensors.h"
#include "transformer.h"

namespace mvit {

enum Kind : int64_t { kCopy, kConvolution, kInvertedResidual, kTransformer, kToWholePatches, kToSizeOf };

struct Value {
  int64_t channels, border;
  int64_t height = 0, width = 0;  // without the border; 0 until a step writes it
  int64_t storage = -1;           // values that are the same map under two names share one
  int first_step = -1, last_step = -1;
  std::size_t offset = 0;  // in the workspace

  std::size_t bytes(std::size_t element) const {
    return static_cast<std::size_t>((height + 2 * border) * (width + 2 * border) * channels) * element;
  }
};

// Some channels of a value.
struct Place {
  int64_t value, offset, channels;
};

struct Step {
  Kind kind;
  Place source, target;
  const int64_t* words;  // what more it has
  bool clears_border;    // it is the first to write a value that has one
};

// Value 0 is the input, the last one the output; the others lie in a workspace.
struct Program {
  bool pairs;  // maps and matrices in bfloat16, else all in float32
  std::vector<Value> values;
  std::vector<Step> steps;
  std::size_t workspace = 0;  // bytes

  Value& at(int64_t value) { return values[static_cast<std::size_t>(value)]; }
  const Value& at(int64_t value) const { return values[static_cast<std::size_t>(value)]; }
  int64_t last() const { return static_cast<int64_t>(values.size()) - 1; }
  std::size_t element() const { return pairs ? 2 : 4; }  // bytes

  const ConvolutionKernels& convolution_kernels() const;
  const InvertedResidualKernels& inverted_residual_kernels() const;
  const TransformerKernels& transformer_kernels() const;
};

// What a step's words say, for a source of the size that it has.
ConvolutionShape convolution_shape(const Program& program, const Step& step);
InvertedResidualShape inverted_residual_shape(const Program& program, const Step& step);
TransformerShape transformer_shape(const Program& program, const Step& step);

// A transformer's words: heads, inner, hidden, layers, the patch's height and width, eps, two places of the final norm,
// and twelve of each layer, in the order of TransformerLayer. A place is a number of bytes from the weights' begin, or
// negative for what is not there.
constexpr int64_t kTransformerWords = 9, kLayerWords = 12, kQkvBias = 3;

// The program of these words, which must outlive it. No step reads or writes what is not there; sizes are not part of it.
Program parse_program(const Tensor& words);

// Sizes of all values for the input x, and where they lie in the workspace.
void lay_out(Program& program, const Tensor& x);

// Every step's weights lie within these bytes.
void check_weights(const Program& program, const Tensor& weights);

}  // namespace mvit
