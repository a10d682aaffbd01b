// SPDX-License-Identifier: Apache-2.0
// The parts of LibTorch's stable ABI (2.10) that the front ends use, and helpers on tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "parallel.h"

namespace mvit {

using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::Tensor;

// An uninitialised contiguous CPU tensor. PyTorch's deterministic mode fills it with NaN, as it does for torch.empty.
// torch::stable::new_empty does the same through the boxed dispatcher, which costs a microsecond more.
inline Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t axes, ScalarType type) {
  auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes, axes, &dtype, &layout, &device, -1, nullptr, &result));
  return Tensor(result);
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_empty(like, sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

// Product of sizes, checked for overflow: a tensor without elements can have arbitrarily large sizes.
inline int64_t product(const char* op, const char* of_what, std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors)
    STD_TORCH_CHECK(!__builtin_mul_overflow(result, factor, &result), op, ": ", of_what, " are too many to be counted");
  return result;
}

}  // namespace mvit
