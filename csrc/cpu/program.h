// SPDX-License-Identifier: Apache-2.0
// The program of a frozen network: int64 words, which pack_program.cpp makes for this processor and run_program.cpp runs.
// Here are its parsed form, and the functions that check it and lay it out in memory. Nothing of it needs torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "convolution.h"
#include "depthwise_convolution.h"
#include "errors.h"
#include "inverted_residual.h"
#include "transformer.h"

namespace mvit {

enum Kind : int64_t {
  kCopy,
  kConvolution,
  kInvertedResidual,
  kTransformer,
  kToWholePatches,
  kToSizeOf,
  kDepthwiseConvolution,
  kMean,
};

constexpr int64_t kProgramVersion = 2;
constexpr int64_t kStepWords = 8;  // of every step: length, kind, source and target

// Upper bound of channels, hidden units, borders and dilations: the product of two of them and nine kernel taps does not
// overflow.
constexpr int64_t kMost = int64_t{1} << 24;
inline bool is_size(int64_t n) { return n > 0 && n <= kMost; }

struct Value {
  int64_t channels, border;
  int64_t column_stride = channels, channel_step = 1;  // in the workspace, as in Map
  int64_t height = 0, width = 0;  // without the border; 0 until a step writes the value
  int64_t storage = -1;           // values that are aliases of one map share a storage
  int first_step = -1, last_step = -1;
  std::size_t offset = 0;  // in the workspace, in bytes

  std::size_t bytes(std::size_t element) const {
    return static_cast<std::size_t>((height + 2 * border) * (width + 2 * border) * column_stride) * element + reach(element);
  }
  // What kernels may read after its end: part of a vector, or a tile's pixels (see ConvolutionArgs).
  std::size_t reach(std::size_t element) const {
    return 64 + (channel_step > 1 ? static_cast<std::size_t>(kTileReach * column_stride) * element : 0);
  }
};

// A range of adjacent channels of a value.
struct Place {
  int64_t value, offset, channels;
};

struct Step {
  Kind kind;
  Place source, target;
  const int64_t* words;  // the arguments of its kind
  bool clears_border;    // first writer of a value with a border
  bool renames;          // a resize that changes nothing: the target is another name of the source
};

// Value 0 is the input, the last value the output; all others are in a workspace.
struct Program {
  bool pairs;  // maps and matrices in bfloat16, else everything in float32
  bool tiles;  // multiplied on matrix tiles: pixels of maps in the workspace end at multiples of 32 channels
  std::vector<Value> values;
  std::vector<Step> steps;
  std::size_t workspace = 0;  // bytes

  Value& at(int64_t value) { return values[static_cast<std::size_t>(value)]; }
  const Value& at(int64_t value) const { return values[static_cast<std::size_t>(value)]; }
  int64_t last() const { return static_cast<int64_t>(values.size()) - 1; }
  std::size_t element() const { return pairs ? 2 : 4; }  // bytes

  const ConvolutionKernels& convolution_kernels() const;
  const DepthwiseConvolutionKernels& depthwise_convolution_kernels() const;
  const InvertedResidualKernels& inverted_residual_kernels() const;
  const TransformerKernels& transformer_kernels() const;
};

// Shapes from a step's words and the size of its source.
ConvolutionShape convolution_shape(const Program& program, const Step& step);
DepthwiseConvolutionShape depthwise_convolution_shape(const Program& program, const Step& step);
InvertedResidualShape inverted_residual_shape(const Program& program, const Step& step);
TransformerShape transformer_shape(const Program& program, const Step& step);

// Words of a transformer step: heads, inner, hidden, layers, patch height and width, eps, two addresses for the final
// norm, and twelve addresses per layer, in the order of TransformerLayer. An address is a byte offset into the weights,
// or negative if the tensor is absent.
constexpr int64_t kTransformerWords = 9, kLayerWords = 12, kQkvBias = 3;

// Raises an error that names the offending step.
struct StepCheck {
  int64_t index;
  const Step& step;

  void operator()(bool holds, const char* what) const {
    MVIT_CHECK(holds, "network: step ", index, " of the program, of kind ", static_cast<int64_t>(step.kind), ", ", what);
  }
};

struct Words {
  const int64_t* data;
  int64_t count;
};

struct Bytes {
  const char* data;
  std::size_t count;
};

// A batch of maps, float32 or bfloat16, of any strides (in elements).
struct Images {
  void* data;
  bool bf16;
  int64_t count, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

// Parses `words`, which must outlive the result. Guarantees that no step reads or writes a value or channel that does
// not exist; sizes are not checked here.
Program parse_program(Words words);

// Computes the sizes of all values for the input x and their offsets in the workspace.
void lay_out(Program& program, const Images& x);

// Checks that every step's weights lie within `weights`.
void check_weights(const Program& program, Bytes weights);

// Runs the program, parsed and laid out for x, with weights that were checked. `out` has the sizes of the last value,
// and x's dtype.
void run_program(const Program& program, const Images& x, const Images& out, const char* weights);

}  // namespace mvit
