// SPDX-License-Identifier: Apache-2.0
// Interface between the front ends of the row-wise operators (layer_norm_linear, linear_residual, layer_norm_mlp) and
// their kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mvit {

// The rows of a (..., channels) tensor. Row i starts (i / columns) · row_stride + (i % columns) · column_stride
// elements after the first, and its channels are adjacent. This covers contiguous tensors, slices of channels, and maps
// cropped along one side.
struct Rows {
  void* data;
  int64_t row_stride, column_stride, columns;
};

// Dtype of the rows in memory and of the products; the index into each operator's dispatch tables. bfloat16 converts to
// float32 arithmetic.
enum class RowArithmetic { float32, bfloat16, float64, bfloat16_pairs };
constexpr int kRowArithmetics = 4;

// Rows are processed in blocks of this size, one row per lane (kLanes in token_lanes.h).
constexpr int64_t kBlockRows = 32;

// A call first prepares its shared memory: the weights in the form that products read, where that is another than they
// lie in. The parts of this are independent.
template <typename Args>
struct RowForward {
  std::size_t (*shared_bytes)(const Args&);
  std::size_t (*scratch_bytes)(const Args&);  // per thread
  int64_t (*parts)(const Args&);
  void (*prepare)(const Args&, int64_t begin, int64_t end, void* shared);
  void (*blocks)(const Args&, int64_t begin, int64_t end, void* shared, void* scratch);
};

// Backward goes through the rows in steps. Each step first processes all its blocks, which gives the gradients of the
// rows themselves. Then all tiles of the parameters' gradients accumulate the step's rows, in groups of `group_rows`:
// each group is summed from zero and then added. The result is therefore bit-identical for any number of groups per
// step and any assignment of blocks and tiles to threads.

struct RowStep {
  int64_t begin, rows;
  int64_t capacity;  // the most rows of any step; determines the layout of the shared memory
  bool first, last;
};

template <typename Args>
struct RowBackward {
  int64_t group_rows;
  std::size_t (*shared_bytes)(const Args&, int64_t capacity);  // memory that lasts across blocks, tiles and steps
  std::size_t (*scratch_bytes)(const Args&);                   // per thread, for blocks
  int64_t (*parts)(const Args&);
  void (*prepare)(const Args&, int64_t capacity, int64_t begin, int64_t end, void* shared);  // before the first step
  void (*blocks)(const Args&, const RowStep&, int64_t begin, int64_t end, void* shared, void* scratch);
  int64_t (*tiles)(const Args&);
  void (*tile_range)(const Args&, const RowStep&, int64_t begin, int64_t end, void* shared);
};

}  // namespace mvit
