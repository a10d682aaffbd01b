// SPDX-License-Identifier: Apache-2.0
// float16 by integer arithmetic: for memory, not for kernels. Subnormal numbers are kept, whatever the processor's mode.
#pragma once

#include <cstdint>
#include <cstring>

namespace mvit {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t exponent = half >> 10 & 0x1f, fraction = half & 0x3ff, bits;
  if (exponent == 0x1f) {  // infinity, NaN
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent > 0) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else if (fraction == 0) {
    bits = sign;
  } else {  // subnormal: shift the leading one out
    for (exponent = 113; (fraction & 0x400) == 0; fraction <<= 1) --exponent;
    bits = sign | exponent << 23 | (fraction & 0x3ff) << 13;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t half_from_float(float value) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond 65504
  const auto rounded = [](uint32_t number, uint32_t shift) {
    return (number + (uint32_t{1} << (shift - 1)) - 1 + (number >> shift & 1)) >> shift;
  };
  if (size >= 0x38800000) return static_cast<uint16_t>(sign | rounded(size - 0x38000000, 13));
  const uint32_t exponent = size >> 23;
  if (exponent < 102) return static_cast<uint16_t>(sign);  // below half of the smallest subnormal, 2^-24
  return static_cast<uint16_t>(sign | rounded((size & 0x7fffff) | 0x800000, 126 - exponent));
}

}  // namespace mvit
