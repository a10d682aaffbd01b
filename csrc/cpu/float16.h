// SPDX-License-Identifier: Apache-2.0
// float16 on the CPU: widened to float32 at the entry of an operator, computed there, and rounded once at its end. Every
// float16 number is a float32 number, so only the last rounding is float16's. Kernels of its own would not pay:
// AVX512-FP16, twice float32's rate, is in some Intel processors alone, and sums in ten bits.
#pragma once

#include <cstddef>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace mvit {

inline Tensor converted(const Tensor& tensor, ScalarType from, ScalarType to) {
  return tensor.scalar_type() == from ? torch::stable::to(tensor, to) : tensor;
}

template <typename T>
const T& widened(const T& argument) {
  return argument;
}
inline Tensor widened(const Tensor& tensor) { return converted(tensor, ScalarType::Half, ScalarType::Float); }
inline std::optional<Tensor> widened(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(widened(*tensor)) : tensor;
}
inline std::vector<Tensor> widened(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> wide;
  for (const Tensor& tensor : tensors) wide.push_back(widened(tensor));
  return wide;
}

constexpr int kFloat32 = -1;  // a result that is float32 whatever x is: the statistics that backward takes

// `call` is the operator's front `kFunction`, and takes float16 too, decided by the dtype of the first argument (x or the
// result's gradient). kDtypeOf: for each result the argument whose dtype it has. Use:
//   TORCH_BOX((&WithFloat16<&linear_residual_backward, 1, 2, 2>::call))
template <auto kFunction, int... kDtypeOf>
struct WithFloat16;

template <typename Result, typename... Arguments, Result (*kFunction)(const Tensor&, Arguments...), int... kDtypeOf>
struct WithFloat16<kFunction, kDtypeOf...> {
  static Result call(const Tensor& first, Arguments... rest) {
    if (first.scalar_type() != ScalarType::Half) return kFunction(first, std::forward<Arguments>(rest)...);
    const auto arguments = std::forward_as_tuple(first, rest...);
    return rounded(kFunction(widened(first), widened(rest)...), dtype_of<kDtypeOf>(arguments)...);
  }

 private:
  template <int kArgument, typename Tuple>
  static ScalarType dtype_of(const Tuple& arguments) {
    if constexpr (kArgument == kFloat32)
      return ScalarType::Float;
    else
      return std::get<static_cast<std::size_t>(kArgument)>(arguments).scalar_type();
  }

  static Tensor rounded(const Tensor& result, ScalarType type) { return converted(result, ScalarType::Float, type); }

  template <typename... Tensors, typename... Types>
  static Result rounded(const std::tuple<Tensors...>& results, Types... types) {
    return std::apply([&](const auto&... result) { return Result(rounded(result, types)...); }, results);
  }
};

}  // namespace mvit
