// SPDX-License-Identifier: Apache-2.0
// A feature map as the kernels see it: a pointer and strides.
#pragma once

#include <cstdint>

namespace mvit {

constexpr int64_t kTileReach = 32;  // pixels after a map's end that matrix tiles may read

// A (B, H, W, channels) tensor whose channels are adjacent; strides in elements.
struct Map {
  void* data;
  int64_t image_stride, row_stride, column_stride;
  // The channels of a pixel end at a multiple of this, with zeros up to it: who writes the map writes them, too.
  int64_t channel_step = 1;

  int64_t room(int64_t channels) const { return (channels + channel_step - 1) / channel_step * channel_step; }
};

}  // namespace mvit
