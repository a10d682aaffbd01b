// SPDX-License-Identifier: Apache-2.0
// A feature map as the kernels see it: a pointer and strides.
#pragma once

#include <cstdint>

namespace mvit {

// A (B, H, W, channels) tensor whose channels are adjacent; strides in elements.
struct Map {
  void* data;
  int64_t image_stride, row_stride, column_stride;
};

}  // namespace mvit
