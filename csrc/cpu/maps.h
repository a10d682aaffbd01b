// SPDX-License-Identifier: Apache-2.0
// Copies, bilinear resizes and means of float32 and bfloat16 maps for the frozen network. Plain C++: they take a thousandth of
// a network's time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "map.h"

namespace mvit {

// A float32 or bfloat16 map whose channels need not be adjacent; `map.data` points at pixel (0, 0) of one image.
struct PlacedMap {
  Map map;
  int64_t channel_stride;
  bool bf16;
};

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, uint16_t& out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void convert(float x, float& out) { out = x; }
inline void convert(uint16_t x, uint16_t& out) { out = x; }
inline void convert(float x, uint16_t& out) { from_float(x, out); }
inline void convert(uint16_t x, float& out) { out = to_float(x); }

// Calls f(a, b) with both data pointers cast to their element types, float or uint16_t (bfloat16 bits).
template <typename F>
void with_elements(const PlacedMap& a, const PlacedMap& b, const F& f) {
  auto *a4 = static_cast<float*>(a.map.data), *b4 = static_cast<float*>(b.map.data);
  auto *a2 = static_cast<uint16_t*>(a.map.data), *b2 = static_cast<uint16_t*>(b.map.data);
  if (a.bf16)
    b.bf16 ? f(a2, b2) : f(a2, b4);
  else
    b.bf16 ? f(a4, b2) : f(a4, b4);
}

// A row of an image as pixels of four channels, the fourth zero. A pixel is one store of 64 bits: channel by channel it
// took ten times as long, a tenth of XXS on matrix tiles.
inline void copy_image_row(const uint16_t* in, int64_t column, int64_t channel, uint16_t* out, int64_t width) {
  const uint16_t *red = in, *green = in + channel, *blue = in + 2 * channel;
  int64_t w = 0;
#if defined(__SSE2__)  // of planes, the usual input, eight pixels at a time: 17 µs at 256 px instead of 24
  for (; column == 1 && w + 8 <= width; w += 8) {
    const auto eight = [&](const uint16_t* plane) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + w)); };
    const __m128i r = eight(red), g = eight(green), b = eight(blue), zero = _mm_setzero_si128();
    const __m128i two[2][2] = {{_mm_unpacklo_epi16(r, g), _mm_unpacklo_epi16(b, zero)},
                               {_mm_unpackhi_epi16(r, g), _mm_unpackhi_epi16(b, zero)}};
    auto* const to = reinterpret_cast<__m128i*>(out + 4 * w);
    for (int half = 0; half < 2; ++half) {
      _mm_storeu_si128(to + 2 * half, _mm_unpacklo_epi32(two[half][0], two[half][1]));
      _mm_storeu_si128(to + 2 * half + 1, _mm_unpackhi_epi32(two[half][0], two[half][1]));
    }
  }
#endif
  for (; w < width; ++w) {
    const int64_t at = w * column;
    const uint64_t pixel = uint64_t{red[at]} | uint64_t{green[at]} << 16 | uint64_t{blue[at]} << 32;
    std::memcpy(out + 4 * w, &pixel, sizeof pixel);
  }
}

// Copies rows [begin, end) of `width` pixels. If `to` has more channels than `from`, the extra ones become zero. The
// channels of `to` are adjacent.
inline void copy_rows(const PlacedMap& from, int64_t from_channels, const PlacedMap& to, int64_t to_channels,
                      int64_t width, int64_t begin, int64_t end) {
  with_elements(from, to, [&](auto* source, auto* target) {
    using In = std::remove_pointer_t<decltype(source)>;
    using Out = std::remove_pointer_t<decltype(target)>;
    const int64_t column = from.map.column_stride, channel = from.channel_stride, to_column = to.map.column_stride;
    for (int64_t h = begin; h < end; ++h) {
      const In* __restrict in = source + h * from.map.row_stride;
      Out* __restrict out = target + h * to.map.row_stride;
      if (channel == 1 && column == from_channels && to_channels == from_channels && to_column == column) {
        // A run of memory, as a channels-last image is. Pixel by pixel it was 40 % of a float32 stem, 2.6 % of XXS.
        for (int64_t i = 0; i < width * column; ++i) convert(in[i], out[i]);
        continue;
      }
      if (column == 1 && from_channels == 3 && to_channels == 3 && to_column == 3) {
        // An image of three planes, the usual input: compile-time strides are five times as fast.
        const In *red = in, *green = in + channel, *blue = in + 2 * channel;
        for (int64_t w = 0; w < width; ++w) {
          convert(red[w], out[3 * w]);
          convert(green[w], out[3 * w + 1]);
          convert(blue[w], out[3 * w + 2]);
        }
        continue;
      }
      if constexpr (std::is_same_v<In, Out>) {
        if constexpr (std::is_same_v<In, uint16_t>)
          if (from_channels == 3 && to_channels == 4 && to_column == 4) {
            copy_image_row(in, column, channel, out, width);
            continue;
          }
        constexpr int64_t unit = 16 / sizeof(Out);
        if (channel == 1 && from_channels % unit == 0 && to_channels % unit == 0) {
          // By units of 16 bytes: a third of the time of a memcpy and a memset a pixel, or of single channels.
          for (int64_t w = 0; w < width; ++w) {
            const In* x = in + w * column;
            Out* y = out + w * to_column;
            for (int64_t c = 0; c < from_channels; c += unit) std::memcpy(y + c, x + c, 16);
            for (int64_t c = from_channels; c < to_channels; c += unit) std::memset(y + c, 0, 16);
          }
          continue;
        }
      }
      for (int64_t w = 0; w < width; ++w) {
        const In* x = in + w * column;
        Out* y = out + w * to_column;
        for (int64_t c = 0; c < from_channels; ++c) convert(x[c * channel], y[c]);
        for (int64_t c = from_channels; c < to_channels; ++c) from_float(0.0f, y[c]);
      }
    }
  });
}

// Source pixels of one row or column of a resized map, as in F.interpolate(mode="bilinear", align_corners=False).
struct Between {
  int64_t lower, upper;
  float weight;  // of `upper`

  Between(int64_t at, int64_t from, int64_t to) {
    const float scale = static_cast<float>(from) / static_cast<float>(to);
    float position = (static_cast<float>(at) + 0.5f) * scale - 0.5f;
    if (position < 0) position = 0;
    lower = static_cast<int64_t>(position);
    if (lower > from - 1) lower = from - 1;
    weight = position - static_cast<float>(lower);
    upper = lower < from - 1 && weight > 0 ? lower + 1 : lower;  // a pixel of weight 0 is not read: it could be NaN
  }
};

// Zeroes channels [begin, end) of a pixel.
inline void zero_channels(const PlacedMap& pixel, int64_t begin, int64_t end) {
  with_elements(pixel, pixel, [&](auto*, auto* y) {
    for (int64_t c = begin; c < end; ++c) from_float(0.0f, y[c]);
  });
}

// Channels of `to` from `channels` to `to_channels` become zero.
inline void resize_rows(const PlacedMap& from, int64_t from_height, int64_t from_width, const PlacedMap& to,
                        int64_t to_height, int64_t to_width, int64_t channels, int64_t to_channels, int64_t begin,
                        int64_t end) {
  with_elements(from, to, [&](auto* source, auto* target) {
    for (int64_t h = begin; h < end; ++h) {
      const Between row(h, from_height, to_height);
      const auto* upper = source + row.lower * from.map.row_stride;
      const auto* lower = source + row.upper * from.map.row_stride;
      for (int64_t w = 0; w < to_width; ++w) {
        const Between column(w, from_width, to_width);
        const int64_t left = column.lower * from.map.column_stride, right = column.upper * from.map.column_stride;
        auto* y = target + h * to.map.row_stride + w * to.map.column_stride;
        for (int64_t c = 0; c < channels; ++c) {
          const float top = to_float(upper[left + c]) * (1 - column.weight) + to_float(upper[right + c]) * column.weight;
          const float low = to_float(lower[left + c]) * (1 - column.weight) + to_float(lower[right + c]) * column.weight;
          from_float(top * (1 - row.weight) + low * row.weight, y[c]);
        }
        for (int64_t c = channels; c < to_channels; ++c) from_float(0.0f, y[c]);
      }
    }
  });
}

// Means of channels [begin, end) over all pixels, summed in double: rounded once, whatever the size of the map.
inline void mean_channels(const PlacedMap& from, int64_t height, int64_t width, const PlacedMap& to, int64_t begin,
                          int64_t end) {
  constexpr int64_t kSums = 64;
  with_elements(from, to, [&](auto* source, auto* target) {
    for (int64_t c = begin; c < end; c += kSums) {
      const int64_t channels = end - c < kSums ? end - c : kSums;
      double sums[kSums] = {};
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < width; ++w) {
          const auto* x = source + h * from.map.row_stride + w * from.map.column_stride + c;
          for (int64_t i = 0; i < channels; ++i) sums[i] += static_cast<double>(to_float(x[i]));
        }
      const double pixels = static_cast<double>(height) * static_cast<double>(width);
      for (int64_t i = 0; i < channels; ++i) from_float(static_cast<float>(sums[i] / pixels), target[c + i]);
    }
  });
}

}  // namespace mvit
