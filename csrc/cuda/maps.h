// SPDX-License-Identifier: Apache-2.0
// Maps (B, H, W, C) of 16-bit floats as bindings check them: what a kernel reads in place, and the map that a caller
// gives it to write.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace mvit {

constexpr int kUnit = 16;    // bytes that kernels read and write at a time
constexpr int kElement = 2;  // bytes of an element

// Whether a map's channels are adjacent and every pixel begins at a whole unit.
inline bool has_whole_units(const Tensor& map) {
  bool whole = reinterpret_cast<uintptr_t>(map.const_data_ptr()) % kUnit == 0 && map.stride(3) == 1;
  for (int axis = 0; axis < 3; ++axis) whole &= map.size(axis) == 1 || map.stride(axis) % (kUnit / kElement) == 0;
  return whole;
}

// Bytes from a map's first element to behind its last one.
inline uintptr_t extent(const Tensor& map) {
  int64_t last = 0;
  for (int axis = 0; axis < 4; ++axis) last += (map.size(axis) - 1) * map.stride(axis);
  return static_cast<uintptr_t>(last + 1) * kElement;
}

// Whether two maps, neither of them empty, may have an element in common. Maps whose bytes lie in one range have none
// if they are different channels of pixels that are equally far apart, as the parts of a joined map are.
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  if (first + extent(a) <= second || second + extent(b) <= first) return false;
  const int64_t pitch = a.stride(2);
  if (pitch == 0) return true;
  for (int axis = 0; axis < 3; ++axis)
    if (a.stride(axis) % pitch != 0 || b.stride(axis) % pitch != 0) return true;
  const auto pixel = static_cast<uintptr_t>(pitch) * kElement;
  const uintptr_t apart = (second - first % pixel) % pixel;  // from a's channels to b's
  return apart < static_cast<uintptr_t>(a.size(3)) * kElement || apart + b.size(3) * kElement > pixel;
}

// The map that a kernel is to write: (images, height, width, channels), of x's dtype and device. No pixel may lie in
// another one, nor in x.
inline void check_out(const char* op, const Tensor& out, const Tensor& x, int64_t images, int64_t height, int64_t width,
                      int64_t channels) {
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == images && out.size(1) == height && out.size(2) == width &&
                      out.size(3) == channels,
                  op, ": out must be (", images, ", ", height, ", ", width, ", ", channels, ") for this x");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), op, ": out is not of x's dtype; give one that is");
  STD_TORCH_CHECK(out.get_device_index() == x.get_device_index(), op, ": out is on device ", out.get_device_index(),
                  " and x on ", x.get_device_index(), "; give one on x's");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(has_whole_units(out), op,
                  ": out has pixels that do not begin at a multiple of 16 bytes, or channels that are not adjacent; its "
                  "strides are (", out.stride(0), ", ", out.stride(1), ", ", out.stride(2), ", ", out.stride(3), ")");
  int64_t inside = channels;  // elements from the first to the last of what an axis counts
  for (int axis = 2; axis >= 0; --axis) {
    STD_TORCH_CHECK(out.size(axis) == 1 || out.stride(axis) >= inside, op, ": out's pixels lie in one another: axis ",
                    axis, " has stride ", out.stride(axis), ", and ", inside, " or more is wanted");
    inside += (out.size(axis) - 1) * out.stride(axis);
  }
  STD_TORCH_CHECK(!may_overlap(x, out), op, ": out lies in x's memory, which other blocks still read; give another map");
}

}  // namespace mvit
