// SPDX-License-Identifier: Apache-2.0
// The parts of LibTorch's stable ABI (2.10) that the front ends use, and helpers on tensors and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "subnormals.h"

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
  STABLE_TORCH_ERROR_CODE_CHECK(
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

// Calls body(begin, end) for parts of [0, items) on PyTorch's thread pool, so that torch.set_num_threads is respected.
// On every thread subnormal numbers are zero inside (subnormals.h). A thread gets at least so many items that
// flops_per_item × items >= 2^18 operations, about 2 µs of one core; for less, waking a thread does not pay.
template <typename Body>
void parallel_for(int64_t items, double flops_per_item, const Body& body) {
  constexpr double worth_a_thread = 1 << 18;
  const double grain = flops_per_item > 0 ? worth_a_thread / flops_per_item : 1;
  torch::stable::parallel_for(0, items, grain < 1 ? 1 : static_cast<int64_t>(grain), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    body(begin, end);
  });
}

}  // namespace mvit
