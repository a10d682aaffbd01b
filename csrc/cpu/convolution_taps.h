// SPDX-License-Identifier: Apache-2.0
// Which taps of a 3×3 convolution see the map: so that the others are left out, on tiles and elsewhere.
#pragma once

#include "convolution.h"
#include "vec.h"

namespace mvit {
namespace MVIT_ISA {

// Whether the positions [first, last] · stride, moved by taps -1, 0 and 1 times the dilation, meet [0, side): a bit a
// tap.
MVIT_INLINE unsigned taps_inside(const ConvolutionShape& shape, int64_t first, int64_t last, int64_t side) {
  unsigned inside = 0;
  for (int64_t tap = 0; tap < 3; ++tap) {
    const int64_t move = (tap - 1) * shape.dilation;
    if (last * shape.stride + move >= 0 && first * shape.stride + move < side) inside |= 1u << tap;
  }
  return inside;
}

}  // namespace MVIT_ISA
}  // namespace mvit
