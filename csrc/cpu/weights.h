// SPDX-License-Identifier: Apache-2.0
// Weights in the form that kernels read: contiguous, matrices in the operand dtype of the arithmetic, vectors in
// float32 (float64 if the matrices are float64).
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "tensors.h"

namespace mvit {

// Returns pointers into the tensors themselves if their layout and dtype fit, else into copies that live as long as the
// reader.
class WeightReader {
 public:
  WeightReader(const char* op, ScalarType matrices) : op_(op), matrices_(matrices) {}

  const void* matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, op_,
                    ": a weight is not of ", rows, " x ", columns);
    return read(tensor, matrices_);
  }

  const void* filters(const Tensor& tensor, int64_t out, int64_t in, int64_t kernel) {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == out && tensor.size(1) == in && tensor.size(2) == kernel &&
                        tensor.size(3) == kernel,
                    op_, ": a convolution's weight is not of ", out, " x ", in, " x ", kernel, " x ", kernel);
    return read(tensor, matrices_);
  }

  const float* vector(const Tensor& tensor, int64_t size) { return static_cast<const float*>(values(tensor, size)); }

  // The same in the dtype that vectors have for this arithmetic.
  const void* values(const Tensor& tensor, int64_t size) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op_, ": a bias or norm weight is not of ", size,
                    " values");
    return read(tensor, matrices_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  }

 private:
  const void* read(const Tensor& tensor, ScalarType type) {
    const ScalarType from = tensor.scalar_type();
    STD_TORCH_CHECK(tensor.is_cpu() && (from == type || (from == ScalarType::BFloat16 && type == ScalarType::Float)),
                    op_, ": a weight is of another dtype or device than x");
    kept_.push_back(tensor.is_contiguous() ? tensor : contiguous(tensor));
    const void* data = kept_.back().const_data_ptr();
    if (from == type) return data;
    const int64_t count = tensor.numel();
    converted_.push_back(std::make_unique<float[]>(static_cast<std::size_t>(count)));
    const auto* bits = static_cast<const uint16_t*>(data);
    float* values = converted_.back().get();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(values + i, &wide, sizeof wide);
    }
    return values;
  }

  const char* op_;
  ScalarType matrices_;
  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<float[]>> converted_;
};

}  // namespace mvit
