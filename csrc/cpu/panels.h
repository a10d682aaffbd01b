// SPDX-License-Identifier: Apache-2.0
// Packed weights for products with channels in the lanes: column panels of one to kTileVectors vectors,
// [panel][depth][columns]; and the loops, bias initialisation and stores of such products.
#pragma once

#include "activation.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// Splits [begin, end) into blocks of V vectors, 1 <= V <= kTileVectors, as even as possible, and calls
// body(std::integral_constant<int, V>, begin, present) for each. Four vectors become 2 + 2 rather than 3 + 1, because a
// tile of one vector is bound by its loads.
template <typename T, typename Body>
MVIT_INLINE void in_lane_blocks(int64_t begin, int64_t end, const Body& body) {
  constexpr int size = Vec<T>::size;
  while (begin < end) {
    const int64_t vectors = round_up(end - begin, size) / size;
    const int64_t blocks = round_up(vectors, kTileVectors) / kTileVectors;
    const int64_t width = round_up(vectors, blocks) / blocks;
    const int64_t present = smaller(width * size, end - begin);
    with_constant<kTileVectors>(width, [&](auto v) { body(v, begin, present); });
    begin += present;
  }
}

// Bump allocator over one block of memory; each piece starts on a cache line. Constructed from null it only counts
// bytes.
struct PanelPieces {
  uintptr_t at;

  explicit MVIT_INLINE PanelPieces(const void* memory) : at(reinterpret_cast<uintptr_t>(memory)) {}

  template <typename T>
  MVIT_INLINE T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(at);
    at += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
};

template <typename T>
MVIT_INLINE int64_t panel_count(int64_t columns) {
  constexpr int64_t width = kTileVectors * Vec<T>::size;
  return (columns + width - 1) / width;
}

// Elements of P::Operand in all panels. The panel that starts at column c starts at element c · P::rows(depth).
template <typename P>
MVIT_INLINE int64_t panels_size(int64_t columns, int64_t depth) {
  return round_up(columns, Vec<typename P::Value>::size) * P::rows(depth);
}

template <typename At>
MVIT_INLINE float operand_at(float*, int64_t, int64_t row, const At& at) {
  return at(row);
}
#if defined(MVIT_BF16_PAIRS)
template <typename At>
MVIT_INLINE bf16x2 operand_at(bf16x2*, int64_t depth, int64_t row, const At& at) {
  const uint32_t first = at(2 * row).bits, second = 2 * row + 1 < depth ? at(2 * row + 1).bits : 0;
  return {first | second << 16};
}
#endif

// Packs the weights at(column, k), k in [0, depth). Missing columns of the last vector are zero.
template <typename P, typename At>
void pack_panels(typename P::Operand* packed, int64_t columns, int64_t depth, const At& at) {
  in_lane_blocks<typename P::Value>(0, columns, [&](auto vectors, int64_t begin, int64_t present) {
    constexpr int64_t ld = decltype(vectors)::value * Vec<typename P::Value>::size;
    typename P::Operand* panel = packed + begin * P::rows(depth);
    for (int64_t row = 0; row < P::rows(depth); ++row)
      for (int64_t i = 0; i < ld; ++i)
        panel[row * ld + i] = i < present
                                  ? operand_at(packed, depth, row, [&](int64_t k) { return at(begin + i, k); })
                                  : typename P::Operand{};
  });
}

// Copies the bias, or zeros if it is null, padded to whole vectors.
MVIT_INLINE void pack_bias(float* packed, const float* bias, int64_t columns) {
  for (int64_t i = 0; i < round_up(columns, Vec<float>::size); ++i)
    packed[i] = bias != nullptr && i < columns ? bias[i] : 0.0f;
}

// tile[r][v] = bias[v]: initialises the accumulators.
template <int R, int V>
MVIT_INLINE void begin_with_bias(Vec<float> (&tile)[R][V], const float* bias) {
  Vec<float> row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = load(bias + v * Vec<float>::size);
  map_tile(tile, [&](Vec<float>, int, int v) { return row[v]; });
}

// tile = activation(tile). A NaN stays NaN: `maximum` returns its second argument then.
template <typename P, int R, int V>
MVIT_INLINE void activate(Vec<float> (&tile)[R][V], Activation activation) {
  if (activation == Activation::silu)
    map_tile(tile, [](Vec<float> x, int, int) { return silu_for<P>(x); });
  else if (activation == Activation::relu)
    map_tile(tile, [](Vec<float> x, int, int) { return maximum(Vec<float>(0.0f), x); });
}

// Stores the first `present` of V · size channels of tile row r at pixel(r).
template <int R, int V, typename Pixel>
MVIT_INLINE void store_pixels(const Vec<float> (&tile)[R][V], int64_t present, const Pixel& pixel) {
  constexpr int size = Vec<float>::size;
  const int last = static_cast<int>(present - (V - 1) * size);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    auto* p = pixel(r);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_first(p + v * size, tile[r][v], v + 1 < V ? size : last);
  }
}

}  // namespace MVIT_ISA
}  // namespace mvit
