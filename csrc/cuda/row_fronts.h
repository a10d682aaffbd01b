// SPDX-License-Identifier: Apache-2.0
// Shared by the bindings of the row-wise operators: argument checks, tensors as rows, and the launch of
// row_product_kernel.cu.
#pragma once

#include <algorithm>
#include <vector>

#include "row_product.h"
#include "tensors.h"

namespace mvit {

// Blocks of 16 rows are far below the grid limit; Triton's limit is the same.
constexpr int64_t kMostRows = int64_t{1} << 31;

// A contiguous tensor, aligned to 16 bytes: the argument itself if it already is one.
inline Tensor dense(const Tensor& tensor) {
  const Tensor rows = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// Checks the arguments of one operator against x, makes them dense, and keeps them alive as long as this object.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& x) : op_(op), x_(x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, op,
                    ": the CUDA kernels take bfloat16 and float16");
    STD_TORCH_CHECK(x.dim() > 0, op, ": x has no axes; (..., channels) is wanted");
    const auto sizes = x.sizes();
    for (int64_t axis = 0; axis + 1 < x.dim(); ++axis)
      STD_TORCH_CHECK(!__builtin_mul_overflow(count_, sizes[axis], &count_) && count_ < kMostRows, op, ": x has too many ",
                      "rows for the CUDA kernels, which take fewer than ", kMostRows);
    channels("x", x.size(-1));
  }

  int64_t count() const { return count_; }
  bool is_half() const { return x_.scalar_type() == ScalarType::Half; }

  int channels(const char* name, int64_t size) const {
    STD_TORCH_CHECK(size > 0 && size % 8 == 0 && size < (1 << 20), op_,
                    ": the CUDA kernels take widths that are multiples of 8, and ", name, " has ", size);
    return static_cast<int>(size);
  }

  const void* read(const char* name, const Tensor& tensor, std::vector<int64_t> sizes) {
    const auto found = tensor.sizes();
    STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), op_, ": ", name,
                    " has another shape than x and the weights ask for");
    check_device(name, tensor);
    STD_TORCH_CHECK(tensor.scalar_type() == x_.scalar_type(), op_, ": ", name, " is not of x's dtype");
    kept_.push_back(dense(tensor));
    return kept_.back().const_data_ptr();
  }

  // Same leading axes as x, and `channels` channels.
  const void* read_rows(const char* name, const Tensor& tensor, int64_t channels) {
    return read(name, tensor, sizes_with(channels));
  }

  Norm norm(const Tensor& weight, const Tensor& bias, double eps) {
    Norm norm{};
    norm.weight = parameter("norm_weight", weight, norm.weight_in_float);
    norm.bias = parameter("norm_bias", bias, norm.bias_in_float);
    norm.eps = static_cast<float>(eps);
    STD_TORCH_CHECK(x_.size(-1) <= kMostNormChannels, op_, ": the CUDA kernels normalise rows of up to ",
                    kMostNormChannels, " channels, not of ", x_.size(-1));
    return norm;
  }

  // Uninitialised results with x's leading axes; statistics are float32 and have no channel axis.
  Tensor new_rows(int64_t channels) const { return torch::stable::new_empty(x_, sizes_with(channels)); }
  Tensor new_statistics() const {
    std::vector<int64_t> sizes = sizes_with(0);
    sizes.pop_back();
    return torch::stable::new_empty(x_, sizes, ScalarType::Float);
  }

 private:
  std::vector<int64_t> sizes_with(int64_t channels) const {
    const auto of_x = x_.sizes();
    std::vector<int64_t> sizes(of_x.begin(), of_x.end());
    sizes.back() = channels;
    return sizes;
  }

  void check_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.get_device_index() == x_.get_device_index(), op_, ": ", name,
                    " is not on x's device");
  }

  const void* parameter(const char* name, const Tensor& tensor, bool& in_float) {
    in_float = tensor.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(in_float || tensor.scalar_type() == x_.scalar_type(), op_, ": ", name,
                    " is neither float32 nor of x's dtype");
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == x_.size(-1), op_, ": ", name, " is not of x's width");
    check_device(name, tensor);
    kept_.push_back(dense(tensor));
    return kept_.back().const_data_ptr();
  }

  const char* op_;
  Tensor x_;
  int64_t count_ = 1;
  std::vector<Tensor> kept_;
};

inline void run_row_product(const char* op, const RowProduct& args, bool half, const Device& device) {
  if (args.count == 0) return;
  const Limits limits(op);
  const RowProductPlan plan = plan_row_product(args, limits.multiprocessors, limits.shared_bytes);
  STD_TORCH_CHECK(plan.shared_bytes <= limits.shared_bytes, op, ": rows of ", args.channels, " channels want ",
                  plan.shared_bytes, " bytes of shared memory, and this GPU has ", limits.shared_bytes);
  const auto launch = half ? launch_row_product<true> : launch_row_product<false>;
  check_launch(op, launch(args, plan, device.stream()));
}

}  // namespace mvit
