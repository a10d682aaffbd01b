// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mvit {

// A (B, H, W, channels) tensor with adjacent channels; strides in elements.
struct Map {
  void* data;
  int64_t image_stride, row_stride, column_stride;
};

}  // namespace mvit
