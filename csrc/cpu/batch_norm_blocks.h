// SPDX-License-Identifier: Apache-2.0
// How batch_norm_activation_kernel.cpp cuts a map into blocks of lines of vectors.
#pragma once

#include "batch_norm_activation.h"
#include "row_lanes.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int kUnroll = MVIT_VECTOR_BYTES == 64 ? 8 : 4;  // vectors of a row that are summed in registers
constexpr int64_t kNarrow = 8, kNarrowRows = 64, kWideRows = 128;

// Rows of few channels are taken several at once, as one line of kNarrow vectors; a block has 64 of these, or 128 of
// lines that are longer by themselves: 32 KB of float32 in AVX-512, which the second reading of a block finds in L1, and
// up to 256 KB of 512 channels, in L2.
template <typename T>
struct Blocks {
  Pixels pixels;
  int64_t together;           // rows of a line
  int64_t rows;               // of a block that is a part of an image
  int64_t parts;              // of an image, or 1
  int64_t images_of_a_block;  // whole ones, or 1
  int64_t count;

  explicit MVIT_INLINE Blocks(const Pixels& pixels) : pixels(pixels) {
    const int64_t narrow = kNarrow * Vec<T>::size / pixels.channels;
    together = smaller(narrow > 1 ? narrow : 1, pixels.rows);
    rows = together * (narrow > 1 ? kNarrowRows : kWideRows);
    parts = (pixels.rows + rows - 1) / rows;
    images_of_a_block = parts > 1 ? 1 : smaller(rows / pixels.rows, pixels.images);
    count = parts * ((pixels.images + images_of_a_block - 1) / images_of_a_block);
  }

  MVIT_INLINE int64_t line() const { return together * pixels.channels; }
  MVIT_INLINE int64_t room() const { return round_up(line(), Vec<T>::size); }  // for a line in scratch

  MVIT_INLINE int64_t rows_of(int64_t block) const {
    if (parts > 1) return smaller(rows, pixels.rows - block % parts * rows);
    return pixels.rows * smaller(images_of_a_block, pixels.images - block * images_of_a_block);
  }

  // The first value of a block.
  MVIT_INLINE int64_t start(int64_t block) const {
    return block / parts * images_of_a_block * pixels.image_stride + block % parts * rows * pixels.channels;
  }

  // Calls f(offset, lines, width) for stretches of adjacent lines, `width` values each.
  template <typename F>
  MVIT_INLINE void stretches(int64_t block, const F& f) const {
    const int64_t images = parts > 1 ? 1 : smaller(images_of_a_block, pixels.images - block * images_of_a_block);
    const int64_t of_an_image = parts > 1 ? rows_of(block) : pixels.rows;
    const int64_t lines = of_an_image / together, rest = of_an_image % together * pixels.channels;
    int64_t offset = start(block);
    for (int64_t i = 0; i < images; ++i, offset += pixels.image_stride) {
      if (lines > 0) f(offset, lines, line());
      if (rest > 0) f(offset + lines * line(), int64_t{1}, rest);
    }
  }
};

// `values`, one a channel, for each row of a line.
template <typename T>
MVIT_INLINE void repeat(T* line, const T* values, const Blocks<T>& blocks) {
  int64_t filled = blocks.pixels.channels;
  if (filled == 1) {  // planes
    for (int64_t i = 0; i < blocks.line(); i += Vec<T>::size) store(line + i, Vec<T>(*values));
    return;
  }
  std::memcpy(line, values, sizeof(T) * filled);
  while (filled < blocks.line()) {  // copies that double
    const int64_t more = smaller(filled, blocks.line() - filled);
    std::memcpy(line + filled, line, sizeof(T) * more);
    filled += more;
  }
}

// Calls f(i, n) for the vectors of `width` values: n values from i.
template <typename T, typename F>
MVIT_INLINE void vectors_of(int64_t width, const F& f) {
  constexpr int size = Vec<T>::size;
  int64_t i = 0;
  for (; i + size <= width; i += size) f(i, size);
  if (i < width) f(i, static_cast<int>(width - i));
}

// Adds up the rows of a line, pairwise, into its first row.
template <typename T>
MVIT_INLINE void add_rows(T* line, const Blocks<T>& blocks) {
  const int64_t channels = blocks.pixels.channels;
  for (int64_t rows = blocks.together; rows > 1; rows = (rows + 1) / 2) {
    const T* more = line + (rows + 1) / 2 * channels;
    vectors_of<T>(rows / 2 * channels,
                  [&](int64_t i, int n) { store_first(line + i, load_first(line + i, n) + load_first(more + i, n), n); });
  }
}

}  // namespace MVIT_ISA
}  // namespace mvit
