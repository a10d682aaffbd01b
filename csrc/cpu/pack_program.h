// SPDX-License-Identifier: Apache-2.0
// From a frozen network as it is stored, for any processor, to the program and the packed weights for this one.
//
// Stored words, all int64: kStoredVersion, a StoredType, the number of values, the number of steps; then of each value
// its channels, its border, the number of its parts and the width of each; then the steps, as in program.h: number of
// words, kind, source and target (value, first channel, channels), and the arguments of the kind:
//
//   copy, mean               none
//   convolution              kernel, stride, dilation, activation, weight (out, in, kernel, kernel), bias
//   inverted residual        hidden, stride, dilation, residual; expand, depthwise, project: each weight and bias
//   transformer              as in program.h: its addresses are of matrices as nn.Linear has them
//   to whole patches         patch height and width
//   to size of               a value
//   depthwise convolution    stride, dilation, activation, weight (channels, 3, 3), bias
//
// Weights and biases are addresses: byte offsets, multiples of 64, into the stored weights; -1 where a tensor is absent.
// Matrices and filters have the stored type, vectors (biases, norms) are float32. Parts of a value lie side by side, and
// a step writes or reads one part, or all. What depends on the processor is added here: the layout of maps for matrix
// tiles, a fourth channel of images for pairs, copies from and to bfloat16 where the arithmetic is float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "program.h"

namespace mvit {

constexpr int64_t kStoredVersion = 1;
enum class StoredType : int64_t { float32, bfloat16, float16 };  // float16 is computed in float32

class PackedProgram {
 public:
  // Throws if the words are not of a network, or weights lie outside `weights`; both must outlive the object.
  PackedProgram(Words stored, Bytes weights);

  const std::vector<int64_t>& words() const { return words_; }
  std::size_t bytes() const { return bytes_; }  // of the packed weights
  void write_weights(char* to) const;           // `to` is a multiple of 64, in memory that is as yet unused

 private:
  friend class Packing;

  struct Part {
    std::size_t offset;
    std::function<void(char*)> write;
  };

  std::vector<int64_t> words_;
  std::size_t bytes_ = 0;
  std::vector<Part> parts_;
};

}  // namespace mvit
