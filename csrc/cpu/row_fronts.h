// SPDX-License-Identifier: Apache-2.0
// Shared by the front ends of the row-wise operators: tensors as rows, choice of the arithmetic, memory and threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "isa.h"
#include "rows.h"
#include "scratch.h"
#include "tensors.h"
#include "weights.h"

namespace mvit {

// ---- tensors --------------------------------------------------------------------------------------------------------

// Describes the tensor as Rows; false if its strides do not allow it.
inline bool find_rows(const Tensor& tensor, Rows& rows) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t axis = static_cast<int64_t>(sizes.size()) - 1;
  if (sizes[axis] > 1 && strides[axis] != 1) return false;
  struct {
    int64_t size = 1, stride = 0;
  } inner, outer;
  for (--axis; axis >= 0; --axis) {
    if (sizes[axis] == 1) continue;
    for (auto* level : {&inner, &outer}) {
      if (level->size == 1) {
        *level = {sizes[axis], strides[axis]};
        break;
      }
      if (level == &inner && outer.size != 1) continue;
      if (strides[axis] == level->size * level->stride) {
        level->size *= sizes[axis];
        break;
      }
      if (level == &outer) return false;
    }
  }
  // Inputs are only read: const_data_ptr does not trigger the copy of a lazily copied tensor.
  rows = {const_cast<void*>(tensor.const_data_ptr()), outer.stride, inner.stride,
          outer.size == 1 ? INT64_MAX : inner.size};
  return true;
}

// The rows of an argument. Strides that Rows cannot express are copied first, as PyTorch's own linear does.
class RowsOf {
 public:
  RowsOf(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == x.scalar_type(), op, ": ", name,
                    " is not of x's dtype and device");
    if (find_rows(tensor, rows_)) return;
    copy_ = contiguous(tensor);
    find_rows(copy_, rows_);
  }
  operator Rows() const { return rows_; }

 private:
  Rows rows_{};
  Tensor copy_;
};

// The rows of a contiguous output tensor.
inline Rows output_rows(const Tensor& tensor, int64_t channels) {
  return {tensor.mutable_data_ptr(), 0, channels, INT64_MAX};
}

inline int64_t row_count(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, op, ": x has no axes; (..., channels) is wanted");
  int64_t count = 1;
  const auto sizes = x.sizes();
  for (std::size_t axis = 0; axis + 1 < sizes.size(); ++axis) count = product(op, "rows of x", {count, sizes[axis]});
  return count;
}

// Checks that `tensor` has x's leading axes and `channels` channels.
inline void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t channels) {
  const auto sizes = tensor.sizes(), wanted = x.sizes();
  bool same = sizes.size() == wanted.size() && sizes[sizes.size() - 1] == channels;
  for (std::size_t axis = 0; same && axis + 1 < sizes.size(); ++axis) same = sizes[axis] == wanted[axis];
  STD_TORCH_CHECK(same, op, ": ", name, " is not of x's leading axes and ", channels, " channels");
}

// An uninitialised tensor with x's leading axes: (..., channels), or (...) for kNoChannels.
inline Tensor new_rows(const Tensor& x, int64_t channels, ScalarType type) {
  constexpr std::size_t kMostAxes = 64;  // PyTorch's limit
  int64_t sizes[kMostAxes];
  const auto of_x = x.sizes();
  STD_TORCH_CHECK(of_x.size() <= kMostAxes, "a tensor of more than 64 axes");
  std::copy(of_x.begin(), of_x.end(), sizes);
  sizes[of_x.size() - 1] = channels;
  return new_empty(x, sizes, static_cast<int64_t>(of_x.size()) - (channels < 0), type);
}
constexpr int64_t kNoChannels = -1;

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// `even`: whether all widths are even, which bfloat16 pairs require. They are used if the instruction set has them.
inline RowArithmetic arithmetic_of(const char* op, ScalarType type, bool even) {
  switch (type) {
    case ScalarType::Float:
      return RowArithmetic::float32;
    case ScalarType::Double:
      return RowArithmetic::float64;
    case ScalarType::BFloat16:
      return even && this_cpu_has_bf16_pairs() ? RowArithmetic::bfloat16_pairs : RowArithmetic::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CPU kernels take float32, bfloat16, float16 and float64");
  }
}

inline ScalarType matrix_type(RowArithmetic arithmetic) {
  return arithmetic == RowArithmetic::float64          ? ScalarType::Double
         : arithmetic == RowArithmetic::bfloat16_pairs ? ScalarType::BFloat16
                                                       : ScalarType::Float;
}

// Dtype of vectors, statistics and sums.
inline ScalarType wide_type(RowArithmetic arithmetic) {
  return arithmetic == RowArithmetic::float64 ? ScalarType::Double : ScalarType::Float;
}

inline const void* statistics(const char* op, const char* name, const Tensor& tensor, int64_t count, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == count && tensor.scalar_type() == type && tensor.is_contiguous(),
                  op, ": ", name, " is not the one that the forward operator returned");
  return tensor.const_data_ptr();
}

// ---- gradients of parameters ----------------------------------------------------------------------------------------

// Gradient of a vector, returned in the vector's own dtype; kernels accumulate it in the wide type.
class VectorGradient {
 public:
  VectorGradient(const Tensor& like, int64_t size, ScalarType type, ScalarType wide)
      : tensor(new_empty(like, {size}, type)), size_(size) {
    if (type != wide) sums_ = std::make_unique<float[]>(static_cast<std::size_t>(size));
  }
  void* sums() const { return sums_ ? sums_.get() : tensor.mutable_data_ptr(); }
  const Tensor& finish() const {
    if (sums_) {
      auto* values = static_cast<torch::headeronly::BFloat16*>(tensor.mutable_data_ptr());
      for (int64_t i = 0; i < size_; ++i) values[i] = torch::headeronly::BFloat16(sums_[i]);
    }
    return tensor;
  }

  const Tensor tensor;

 private:
  int64_t size_;
  std::unique_ptr<float[]> sums_;
};

// Gradient of a parameter when there are no rows.
inline void fill_with_zeros(const Tensor& tensor) {
  const std::size_t bytes = tensor.scalar_type() == ScalarType::Double     ? 8
                            : tensor.scalar_type() == ScalarType::BFloat16 ? 2
                                                                           : 4;
  const auto count = static_cast<std::size_t>(tensor.numel());
  if (count > 0) std::memset(tensor.mutable_data_ptr(), 0, bytes * count);  // an empty tensor has a null pointer
}

// ---- threads --------------------------------------------------------------------------------------------------------

// Shares out the preparation of shared memory. A part copies some 8 KB, which takes half a microsecond.
template <typename Prepare>
void prepare_in_parts(int64_t parts, const Prepare& prepare) {
  constexpr double flops_of_a_part = 1 << 16;
  if (parts > 0) parallel_for(parts, flops_of_a_part, prepare);
}

template <typename Args>
void run_forward(const RowForward<Args>& kernels, const Args& args, double flops_of_a_row) {
  if (args.count == 0) return;  // widths are arbitrary in this case
  const std::size_t bytes = kernels.scratch_bytes(args), shared_bytes = kernels.shared_bytes(args);
  const int64_t blocks = (args.count + kBlockRows - 1) / kBlockRows;
  const auto run = [&](void* shared) {
    parallel_for(blocks, flops_of_a_row * static_cast<double>(std::min(kBlockRows, args.count)),
                 [&](int64_t begin, int64_t end) {
                   const Scratch memory(bytes);
                   kernels.blocks(args, begin, end, shared, memory.data());
                 });
  };
  if (shared_bytes == 0) return run(nullptr);
  const Scratch shared_memory(shared_bytes, ScratchUse::shared);
  prepare_in_parts(kernels.parts(args), [&](int64_t begin, int64_t end) {
    kernels.prepare(args, begin, end, shared_memory.data());
  });
  run(shared_memory.data());
}

template <typename Args>
void run_backward(const RowBackward<Args>& kernels, const Args& args, double flops_of_a_row) {
  // Eight blocks per thread. With two, the accumulators of a 240 x 480 gradient travel to L3 and back more often (2 %
  // slower); 16 are no faster.
  const int64_t threads = thread_count();
  const int64_t group = kernels.group_rows;
  const int64_t capacity = std::min(args.count, (8 * threads * kBlockRows + group - 1) / group * group);
  const std::size_t bytes = kernels.scratch_bytes(args);
  const Scratch shared_memory(kernels.shared_bytes(args, capacity), ScratchUse::shared);
  void* const shared = shared_memory.data();
  prepare_in_parts(kernels.parts(args),
                   [&](int64_t begin, int64_t end) { kernels.prepare(args, capacity, begin, end, shared); });
  const int64_t tiles = kernels.tiles(args);
  for (int64_t begin = 0; begin < args.count; begin += capacity) {
    const int64_t end = std::min(begin + capacity, args.count);
    const RowStep step{begin, end - begin, capacity, begin == 0, end == args.count};
    // Half for the blocks, half for the tiles.
    const double flops = flops_of_a_row * static_cast<double>(step.rows) / 2;
    const int64_t blocks = (step.rows + kBlockRows - 1) / kBlockRows;
    parallel_for(blocks, flops / static_cast<double>(blocks), [&](int64_t first, int64_t last) {
      const Scratch memory(bytes);
      kernels.blocks(args, step, first, last, shared, memory.data());
    });
    parallel_for(tiles, flops / static_cast<double>(tiles),
                 [&](int64_t first, int64_t last) { kernels.tile_range(args, step, first, last, shared); });
  }
}

}  // namespace mvit
