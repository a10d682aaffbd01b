// SPDX-License-Identifier: Apache-2.0
// Conversions at both ends of a run (see images.h).
#include "images.h"

#include <algorithm>
#include <array>

#include "../cpu/half.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"

namespace mvit {
namespace {

// Elements that pay for waking a thread.
constexpr int64_t kGrain = 1 << 16;

struct Strides {
  int64_t image, channel, row, column;
};

Strides strides_of(mvit_layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == MVIT_NHWC) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// What a value becomes in a network of that type, as float32.
float rounded(float value, StoredType type) {
  if (type == StoredType::float16) return half_to_float(half_from_float(value));
  return value;
}

// By value of a pixel and channel: scaled to 1 and normalized, with torchvision's operations in their order.
using Normalized = std::array<std::array<float, 256>, kMaxChannels>;

Normalized normalized(const NetworkFile& file, int64_t channels) {
  Normalized table{};
  for (std::size_t c = 0; c < static_cast<std::size_t>(channels); ++c)
    for (std::size_t pixel = 0; pixel < 256; ++pixel)
      table[c][pixel] = (static_cast<float>(pixel) / 255.0f - file.mean[c]) / file.deviation[c];
  return table;
}

// Fills rows of (count, height, width, channels): `value(from element, channel)` is a float32 number.
template <typename Out, typename Value>
void fill(const Images& to, const Strides& from, const Value& value) {
  auto* out = static_cast<Out*>(to.data);
  const int64_t a_row = to.width * to.channels;
  run_parts(to.count * to.height, std::max<int64_t>(1, kGrain / a_row), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row / to.height * from.image + row % to.height * from.row;
      Out* pixel = out + row * a_row;
      for (int64_t w = 0; w < to.width; ++w, pixel += to.channels)
        for (int64_t c = 0; c < to.channels; ++c)
          from_float(value(first + w * from.column + c * from.channel, c), pixel[c]);
    }
  });
}

}  // namespace

Images read_images(const mvit_images& given, const NetworkFile& file, int64_t channels, bool wants_rows,
                   std::optional<Scratch>& memory) {
  Strides from = strides_of(given.layout, channels, given.height, given.width);
  const bool bf16 = file.type == StoredType::bfloat16;
  if (given.type == MVIT_FLOAT32 && file.type == StoredType::float32 && (from.channel == 1 || !wants_rows))
    return {const_cast<void*>(given.data), false, given.batch, channels, given.height, given.width,
            from.image, from.channel, from.row, from.column};
  const Strides to = strides_of(MVIT_NHWC, channels, given.height, given.width);
  memory.emplace(static_cast<std::size_t>(given.batch * to.image) * (bf16 ? 2 : 4), ScratchUse::call);
  const Images images{memory->data(), bf16, given.batch, channels, given.height, given.width,
                      to.image, to.channel, to.row, to.column};
  const auto convert = [&](const auto& value) {
    bf16 ? fill<uint16_t>(images, from, value) : fill<float>(images, from, value);
  };
  if (given.type == MVIT_FLOAT32) {
    const auto* values = static_cast<const float*>(given.data);
    convert([&](int64_t at, int64_t) { return rounded(values[at], file.type); });
  } else {
    const auto* pixels = static_cast<const uint8_t*>(given.data);
    if (file.reverses_channels) {
      pixels += (channels - 1) * from.channel;
      from.channel = -from.channel;
    }
    Normalized table = normalized(file, channels);
    for (auto& channel : table)
      for (float& value : channel) value = rounded(value, file.type);
    convert([&](int64_t at, int64_t c) { return table[static_cast<std::size_t>(c)][pixels[at]]; });
  }
  return images;
}

void write_result(const Images& made, const NetworkFile& file, mvit_layout layout, float* result) {
  const int64_t channels = file.channels;
  const Strides to = strides_of(layout, channels, made.height, made.width);
  const int64_t rows = made.count * made.height;
  run_parts(rows, std::max<int64_t>(1, kGrain / (made.width * channels)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = row / made.height * made.image_stride + row % made.height * made.row_stride;
      float* out = result + row / made.height * to.image + row % made.height * to.row;
      for (int64_t w = 0; w < made.width; ++w)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = from + w * made.column_stride + c;
          const float value = made.bf16 ? to_float(static_cast<const uint16_t*>(made.data)[at])
                                        : rounded(static_cast<const float*>(made.data)[at], file.type);
          out[w * to.column + c * to.channel] = value;
        }
    }
  });
}

}  // namespace mvit
