// SPDX-License-Identifier: Apache-2.0
// What the fronts of the row-wise operators (layer_norm_linear, linear_residual, layer_norm_mlp) and their kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mvit {

// The rows of a (..., channels) tensor: row i begins (i / columns) · row_stride + (i % columns) · column_stride elements
// after the first, and its channels are adjacent. A contiguous tensor, a slice of its channels, and a map cropped along
// one side are such.
struct Rows {
  void* data;
  int64_t row_stride, column_stride, columns;
};

// What rows are in memory, and what products are made of: the index of each operator's tables.
enum class RowArithmetic { float32, bfloat16, float64, bfloat16_pairs };
constexpr int kRowArithmetics = 4;

// Rows are worked on in blocks of this many, one a lane (kLanes of token_lanes.h).
constexpr int64_t kBlockRows = 32;

template <typename Args>
struct RowForward {
  std::size_t (*scratch_bytes)(const Args&);
  void (*block)(const Args&, int64_t block, void* scratch);
};

// Backward goes through the rows in steps. In each, all blocks are worked on first: they give the rows' own gradients.
// Then all tiles of the parameters' gradients take in the step's rows, in groups of kGroupRows: a group's sum is made from
// zero and then added, so a step may have any number of groups, and any thread any block or tile, and no bit changes.
constexpr int64_t kGroupRows = 128;

struct RowStep {
  int64_t begin, rows;
  int64_t capacity;  // of the shared memory: the most rows of a step
  bool first, last;
};

template <typename Args>
struct RowBackward {
  std::size_t (*shared_bytes)(const Args&, int64_t capacity);  // memory that lasts from block to tile and step to step
  std::size_t (*scratch_bytes)(const Args&);                   // of one block
  void (*prepare)(const Args&, int64_t capacity, void* shared);  // once, before the first step
  void (*block)(const Args&, const RowStep&, int64_t block, void* shared, void* scratch);
  int64_t (*tiles)(const Args&);
  void (*tile)(const Args&, const RowStep&, int64_t tile, void* shared);
};

}  // namespace mvit
