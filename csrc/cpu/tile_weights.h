// SPDX-License-Identifier: Apache-2.0
// Weights as products with tokens in the lanes (token_lanes.h) read them. Where matrix tiles multiply, W is packed as
// tiles first; everywhere else it is read as it lies in memory.
//
// Packed: [row tile][step] tiles of 16 rows × 32 columns, whole and aligned, zero where W has no row or column. (Rows
// that lie across cache lines would take 6.2 ns to load instead of 2.4.) Row r, a multiple of 16, starts at element
// r · weight_ld, so a product can begin there.
#pragma once

#include "token_rows.h"

#if defined(MVIT_TILES)
#include "tile_product.h"
#endif

namespace mvit {
namespace MVIT_ISA {

#if defined(MVIT_TILES)
template <typename P>
constexpr bool packs_weights = P::kStep > 1;
#else
template <typename P>
constexpr bool packs_weights = false;
#endif

// Held by a thread while it multiplies: matrix tiles, where there are any.
#if defined(MVIT_TILES)
using ProductUnit = Tiles;
#else
struct ProductUnit {
  MVIT_INLINE ProductUnit() {}  // not trivial, so that an unused one is no warning
};
#endif

// Leading dimension of W (rows, columns) as `product` reads it.
template <typename P>
MVIT_INLINE int64_t weight_ld(int64_t columns) {
  return packs_weights<P> ? round_up(columns, 32) : columns;
}

// Elements of the packed form; 0 where there is none.
template <typename P>
MVIT_INLINE int64_t packed_weights_size(int64_t rows, int64_t columns) {
  return packs_weights<P> ? round_up(rows, 16) * weight_ld<P>(columns) : 0;
}

// Which of the two `product` reads.
template <typename P>
MVIT_INLINE const typename P::Weight* weights_of(const typename P::Weight* packed, const void* weights) {
  return packs_weights<P> ? packed : static_cast<const typename P::Weight*>(weights);
}

// Number of row tiles of a matrix, the units that packing can be shared out in.
template <typename P>
MVIT_INLINE int64_t row_tiles(int64_t rows) {
  return packs_weights<P> ? round_up(rows, 16) / 16 : 0;
}

// Packs row tiles [begin, end) of W (rows, columns), contiguous, to their places in `packed` (aligned to 64 bytes).
template <typename P>
void pack_weights(typename P::Weight* packed, const void* weights, int64_t rows, int64_t columns, int64_t begin,
                  int64_t end) {
#if defined(MVIT_TILES)
  if constexpr (packs_weights<P>) {
    const auto* w = static_cast<const char*>(weights);
    char* to = reinterpret_cast<char*>(packed + begin * kTile * weight_ld<P>(columns));
    for (int64_t row = begin * kTile; row < end * kTile; row += kTile)
      for (int64_t column = 0; column < columns; column += kTileDepth, to += kTileBytes)
        for (int64_t r = 0; r < kTile; ++r) {
          const int64_t width = row + r < rows ? smaller(kTileDepth, columns - column) : 0;
          // In words of two columns.
          store(reinterpret_cast<float*>(to + r * 64),
                width == 0 ? Vec<float>(0.0f)
                           : load_first(reinterpret_cast<const float*>(w + 2 * ((row + r) * columns + column)),
                                        static_cast<int>(width / 2)));
        }
  }
#endif
}

// The same for Wᵀ: row tiles [begin, end) of it, 16 columns of W (rows, columns) each.
template <typename P>
void pack_transposed_weights(typename P::Weight* packed, const void* weights, int64_t rows, int64_t columns,
                             int64_t begin, int64_t end) {
#if defined(MVIT_TILES)
  if constexpr (packs_weights<P>) {
    const auto* w = static_cast<const bfloat16*>(weights);
    char* to = reinterpret_cast<char*>(packed + begin * kTile * weight_ld<P>(rows));
    for (int64_t column = begin * kTile; column < end * kTile; column += kTile) {
      const int width = static_cast<int>(smaller(kTile, columns - column));
      for (int64_t row = 0; row < rows; row += kTileDepth, to += kTileBytes) {
        const auto bits_of = [&](int64_t r) {
          return r < rows ? NativeBits(load_first(w + r * columns + column, width).native) : NativeBits{};
        };
        Vec<float> words[kTile];  // {W[2r][c], W[2r + 1][c]}
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r)
          words[r] = Vec<float>::Native(bits_of(row + 2 * r) >> 16 | bits_of(row + 2 * r + 1));
        transpose(words);
#pragma GCC unroll 16
        for (int c = 0; c < kTile; ++c) store(reinterpret_cast<float*>(to + c * 64), words[c]);
      }
    }
  }
#endif
}

#if defined(MVIT_TILES)
// An epilogue as pieces of two rows. It is copied into each block, so that what it captures by value stays in
// registers; what it captures by reference is read from memory again for every piece.
template <int N, typename Epilogue>
struct EpiloguePiece {
  Epilogue epilogue;
  int64_t row;

  MVIT_INLINE EpiloguePiece(const Epilogue& epilogue, int64_t row) : epilogue(epilogue), row(row) {}
  EpiloguePiece(const EpiloguePiece&) = default;
  // Lambdas cannot be assigned. (This is placement new without the standard library's.)
  static MVIT_INLINE void* operator new(std::size_t, void* here) { return here; }
  MVIT_INLINE EpiloguePiece& operator=(const EpiloguePiece& other) { return *new (this) EpiloguePiece(other); }

  MVIT_INLINE void advance(int rows) { row += rows; }
  MVIT_INLINE void operator()(Vec<float> (&tile)[kPieceRows][N], int r) const { epilogue(tile, row + r, int64_t{0}); }
};

// `product` of token_lanes.h for N vectors of lanes.
template <int N, typename Epilogue>
__attribute__((noinline)) void multiply_on_tiles(const bfloat16* weights, int64_t ldw, const bf16x2* panel, int64_t ldp,
                                                 int64_t n, int64_t channels, const Epilogue& epilogue) {
  using Piece = EpiloguePiece<N, Epilogue>;
  TileResults<N> results;
  TileProducts<N, Piece> products(results, kTile, Piece(epilogue, 0));
  const int64_t steps = round_up(channels, kTileDepth) / kTileDepth;
  const TileOperand b{reinterpret_cast<const char*>(panel), 64, kTile * 4 * ldp, 4 * ldp};
  for (int64_t row = 0; row < n; row += kBlockSide) {
    const TileOperand a{reinterpret_cast<const char*>(weights + row * ldw), 2 * kTile * ldw, kTileBytes, 64};
    const int present = static_cast<int>(smaller(kBlockSide, n - row));
    if (present > kTile)
      products.template block<2>(a, b, steps, StartAtZero{}, Piece(epilogue, row), present);
    else
      products.template block<1>(a, b, steps, StartAtZero{}, Piece(epilogue, row), present);
  }
  products.finish();
}
#endif

}  // namespace MVIT_ISA
}  // namespace mvit
