// SPDX-License-Identifier: Apache-2.0
// The tokens of one (image, patch position) sequence, addressed in place in a (B, H, W, channels) map, without unfold;
// and the transposes between these rows and panels.
#pragma once

#include "vec.h"

namespace mvit {
namespace MVIT_ISA {

MVIT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
MVIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Token n is patch (n / columns, n % columns); its channels are adjacent.
template <typename E>
struct TokenRows {
  E* first;
  int64_t row_stride, column_stride;  // in elements, from one patch to the next
  int64_t columns;

  // visit(pointer to the channels of token begin + i, i) for i in [0, count).
  template <typename Visit>
  MVIT_INLINE void for_each(int64_t begin, int64_t count, const Visit& visit) const {
    int64_t column = begin % columns;
    E* row = first + begin / columns * row_stride;
    for (int64_t i = 0; i < count; ++i) {
      visit(row + column * column_stride, i);
      if (++column == columns) {
        column = 0;
        row += row_stride;
      }
    }
  }
};

// panel[i][0, ld) = factor · the channels of token begin + i, padded with zeros; ld is a multiple of the vector size.
// Writes up to the last vector that has a channel.
template <typename T, typename E>
MVIT_INLINE void pack_rows(T* panel, int64_t ld, const TokenRows<const E>& tokens, int64_t begin, int64_t count,
                           int64_t channels, Vec<T> factor) {
  tokens.for_each(begin, count, [&](const E* token, int64_t i) {
    for (int64_t c = 0; c < channels; c += Vec<T>::size)
      store(panel + i * ld + c, load_first(token + c, static_cast<int>(smaller(Vec<T>::size, channels - c))) * factor);
  });
}

// panel[c][i] = factor · channel c of token begin + i, for c in [0, round_up(channels, size)) and i in [0, ld); zero
// where there is no such channel or i >= count. ld is a multiple of the vector size.
template <typename T, typename E>
void pack_columns(T* panel, int64_t ld, const TokenRows<const E>& tokens, int64_t begin, int64_t count,
                  int64_t channels, Vec<T> factor) {
  constexpr int size = Vec<T>::size;
  for (int64_t i0 = 0; i0 < ld; i0 += size) {
    const E* token[size] = {};
    const int64_t present = smaller(size, count - i0);
    tokens.for_each(begin + i0, present, [&](const E* p, int64_t i) { token[i] = p; });
    for (int64_t c0 = 0; c0 < channels; c0 += size) {
      const int width = static_cast<int>(smaller(size, channels - c0));
      Vec<T> tile[size];
      if (present == size && width == size) {
#pragma GCC unroll 16
        for (int i = 0; i < size; ++i) tile[i] = load_first(token[i] + c0, size) * factor;
      } else {
        for (int i = 0; i < size; ++i)
          tile[i] = i < present ? load_first(token[i] + c0, width) * factor : Vec<T>(T(0));
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) store(panel + (c0 + i) * ld + i0, tile[i]);
    }
  }
}

// token begin + i = panel[i] · factor
template <typename T, typename E>
MVIT_INLINE void unpack_rows(const TokenRows<E>& tokens, int64_t begin, int64_t count, int64_t channels, const T* panel,
                             int64_t ld, Vec<T> factor) {
  tokens.for_each(begin, count, [&](E* token, int64_t i) {
    for (int64_t c = 0; c < channels; c += Vec<T>::size)
      store_first(token + c, load(panel + i * ld + c) * factor, static_cast<int>(smaller(Vec<T>::size, channels - c)));
  });
}

// panel[c][i] = channel c of token begin + i for i in [0, count) and c in [0, round_up(channels, size)); rows without a
// channel are zero. Other lanes of the panel are left unchanged.
template <typename T, typename E>
MVIT_INLINE void read_columns(T* panel, int64_t ld, const TokenRows<const E>& tokens, int64_t begin, int64_t count,
                              int64_t channels) {
  constexpr int size = Vec<T>::size;
  for (int64_t i0 = 0; i0 < count; i0 += size) {
    const E* token[size] = {};
    const int present = static_cast<int>(smaller(size, count - i0));
    tokens.for_each(begin + i0, present, [&](const E* p, int64_t i) { token[i] = p; });
    for (int64_t c0 = 0; c0 < channels; c0 += size) {
      const int width = static_cast<int>(smaller(size, channels - c0));
      Vec<T> tile[size];
      if (present == size && width == size) {
#pragma GCC unroll 16
        for (int i = 0; i < size; ++i) tile[i] = load_first(token[i] + c0, size);
      } else {
        for (int i = 0; i < size; ++i) tile[i] = i < present ? load_first(token[i] + c0, width) : Vec<T>(T(0));
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) store_first(panel + (c0 + i) * ld + i0, tile[i], present);
    }
  }
}

// Channels [c, c + width) of token begin + i = finish(panel[c …][i], i, c, width). The panel has
// round_up(channels, size) rows, readable to the end of the last vector.
template <typename T, typename E, typename Finish>
MVIT_INLINE void write_columns(const TokenRows<E>& tokens, int64_t begin, int64_t count, int64_t channels,
                               const T* panel, int64_t ld, const Finish& finish) {
  constexpr int size = Vec<T>::size;
  for (int64_t i0 = 0; i0 < count; i0 += size) {
    E* token[size] = {};
    const int64_t present = smaller(size, count - i0);
    tokens.for_each(begin + i0, present, [&](E* p, int64_t i) { token[i] = p; });
    for (int64_t c0 = 0; c0 < channels; c0 += size) {
      const int width = static_cast<int>(smaller(size, channels - c0));
      Vec<T> tile[size];
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) tile[i] = load(panel + (c0 + i) * ld + i0);
      transpose(tile);
      if (present == size && width == size) {
#pragma GCC unroll 16
        for (int i = 0; i < size; ++i) store_first(token[i] + c0, finish(tile[i], i0 + i, c0, size), size);
      } else {
        for (int i = 0; i < present; ++i) store_first(token[i] + c0, finish(tile[i], i0 + i, c0, width), width);
      }
    }
  }
}

template <typename T, typename E>
MVIT_INLINE void write_columns(const TokenRows<E>& tokens, int64_t begin, int64_t count, int64_t channels,
                               const T* panel, int64_t ld) {
  write_columns(tokens, begin, count, channels, panel, ld, [](Vec<T> x, int64_t, int64_t, int) { return x; });
}

// Channel c of token begin + i = panel[c][i] · factor[i]. The panel has round_up(channels, size) rows of ld columns, as
// has `factor`; ld is a multiple of the vector size.
template <typename T, typename E>
void unpack_columns(const TokenRows<E>& tokens, int64_t begin, int64_t count, int64_t channels, const T* panel,
                    int64_t ld, const T* factor) {
  constexpr int size = Vec<T>::size;
  for (int64_t i0 = 0; i0 < count; i0 += size) {
    E* token[size] = {};
    const int64_t present = smaller(size, count - i0);
    tokens.for_each(begin + i0, present, [&](E* p, int64_t i) { token[i] = p; });
    const Vec<T> scale = load(factor + i0);
    for (int64_t c0 = 0; c0 < channels; c0 += size) {
      const int width = static_cast<int>(smaller(size, channels - c0));
      Vec<T> tile[size];
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) tile[i] = load(panel + (c0 + i) * ld + i0) * scale;
      transpose(tile);
      if (present == size && width == size) {
#pragma GCC unroll 16
        for (int i = 0; i < size; ++i) store_first(token[i] + c0, tile[i], size);
      } else {
        for (int i = 0; i < present; ++i) store_first(token[i] + c0, tile[i], width);
      }
    }
  }
}

}  // namespace MVIT_ISA
}  // namespace mvit
