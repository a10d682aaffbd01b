// SPDX-License-Identifier: Apache-2.0
// Products on matrix tiles (tiles.h): blocks of up to 32 × 32 results, each a start plus Σ_k A · B over steps of 32, and
// an epilogue on the float32 results.
//
// The tile unit and the vector units work side by side only if their instructions alternate: all products, then the
// epilogue, takes the sum of their times (163 + 124 ns for K = 256 and SiLU), since tile loads fill the scheduler. So a
// block is left in a buffer, and a piece of its epilogue, two rows, follows each product of the next block: 187 ns, and
// 161, 166 for K = 64, 128 (the epilogue alone: 106).
#pragma once

#include "tiles.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int kBlockSide = 2 * kTile;
constexpr int kPieceRows = 2;

// ---- where a block's tiles are: A and B by address, C's start ------------------------------------------------------

// Tiles of an operand: tile `i` (rows of A, columns of B), step k, at base + i · tile_bytes + k · step_bytes; its rows
// are row_bytes apart. Aligned to 64 bytes a load takes 2.2 to 2.7 ns from L1; across lines 6.2, from L2 6.2, L3 36.
struct TileOperand {
  const char* base;
  int64_t tile_bytes, step_bytes, row_bytes;

  MVIT_INLINE const char* at(int64_t i, int64_t step) const { return base + i * tile_bytes + step * step_bytes; }
};

// The same for an operand whose steps are anywhere: step k is at base + offsets[k] (bytes).
struct ScatteredTileOperand {
  const char* base;
  const int64_t* offsets;
  int64_t tile_bytes, row_bytes;

  MVIT_INLINE const char* at(int64_t i, int64_t step) const { return base + i * tile_bytes + offsets[step]; }
};

// C starts at zero, …
struct StartAtZero {
  template <int tile>
  MVIT_INLINE void load(int, int) const {
    zero_tile<tile>();
  }
};
// … or at float32 values in memory; row_bytes 0 repeats one row (a bias).
struct StartAt {
  const float* values;
  int64_t row_bytes;

  template <int tile>
  MVIT_INLINE void load(int m, int n) const {
    load_tile<tile>(reinterpret_cast<const char*>(values + n * kTile) + m * kTile * row_bytes, row_bytes);
  }
};

// ---- blocks ---------------------------------------------------------------------------------------------------------

// Results of a block and of the one before. Apart from TileProducts, whose members can only stay in registers if no asm
// statement sees its address. Not 4096 bytes apart: stores to the one would stall loads from the other.
template <int N>
struct alignas(64) TileResults {
  float first[kBlockSide * N * kTile];
  float between[(1024 + 64) / sizeof(float)];
  float second[kBlockSide * N * kTile];
};

// The products of a sequence of blocks of M × N tiles, M up to 2 and N fixed. Use: block(…) for each, then finish().
//
// Piece: the epilogue of one block, a small object made of pointers. piece(tile, row), with a constant `row`, gets the
// results `Vec<float> tile[2][N]` of rows [row, row + 2) from where it stands; advance(rows) moves it on. Both are inlined
// among the products, so they must be short: index arithmetic in them costs what the alternation gains.
template <int N, typename Piece>
class TileProducts {
 public:
  // C = start + Σ_{k < steps} A · B, in tiles of `rows` rows (of the configuration; 8 or 16). `piece` is called for the
  // first `present` rows of C (rounded up to two) during the next block or finish().
  template <int M, typename A, typename B, typename Start>
  MVIT_INLINE void block(const A& a, const B& b, int64_t steps, const Start& start, const Piece& piece, int present) {
    Pieces pieces = pieces_;
    multiply<M>(a, b, steps, start, pieces);
    store_all<M>(buffer_, N * kTile, pieces);
    pieces_ = {piece, buffer_, (present + kPieceRows - 1) / kPieceRows};
    buffer_ = other_;
    other_ = const_cast<float*>(pieces_.rows);
  }

  // C = start + Σ_k A · B in memory, rows `ld` floats apart; no epilogue.
  template <int M, typename A, typename B, typename Start>
  MVIT_INLINE void block_to(const A& a, const B& b, int64_t steps, const Start& start, float* c, int64_t ld) {
    Pieces pieces = pieces_;
    multiply<M>(a, b, steps, start, pieces);
    store_all<M>(c, ld, pieces);
    pieces_.left = 0;
  }

  MVIT_INLINE void finish() {
    Pieces pieces = pieces_;
    while (pieces.left > 0) pieces.run_one_if_any();
    pieces_.left = 0;
  }

  // `piece` is never called: only for a Piece without a default constructor.
  explicit MVIT_INLINE TileProducts(TileResults<N>& results, int rows = kTile, const Piece& piece = {})
      : pieces_{piece, nullptr, 0}, buffer_(results.first), other_(results.second), rows_(rows) {}

 private:
  // The pieces of the previous block that have not run yet. A local variable of each block: members would be loaded and
  // stored around every tile instruction, which costs more than the alternation gains. For the same reason it is passed
  // on as it is, not captured in lambdas, which GCC 12 leaves in memory.
  struct Pieces {
    Piece piece;
    const float* rows;
    int left;

    // The i-th piece from here.
    MVIT_INLINE void run(int i) const {
      Vec<float> tile[kPieceRows][N];
      for (int r = 0; r < kPieceRows; ++r)
        for (int n = 0; n < N; ++n) tile[r][n] = load(rows + ((i * kPieceRows + r) * N + n) * kTile);
      piece(tile, i * kPieceRows);
    }
    MVIT_INLINE void advance(int count) {
      rows += count * kPieceRows * N * kTile;
      left -= count;
      piece.advance(count * kPieceRows);
    }
    MVIT_INLINE void run_one_if_any() {
      if (left <= 0) return;
      run(0);
      advance(1);
    }
  };

  // How many pieces follow the products of one step: of four products kQuarters / 4 each, none if it is 0.
  template <int product, int kQuarters>
  static MVIT_INLINE void between(Pieces& pieces) {
    constexpr int first = product * kQuarters / 4, last = (product + 1) * kQuarters / 4;
    if constexpr (first < last) pieces.run(first);
    if constexpr (first + 1 < last) pieces.run(first + 1);
  }

  template <int M, int kQuarters, typename A, typename B>
  static MVIT_INLINE void multiply_step(const A& a, const B& b, int64_t k, Pieces& pieces) {
    load_tile<6>(b.at(0, k), b.row_bytes);
    load_tile<4>(a.at(0, k), a.row_bytes);
    multiply_add_tiles<0, 4, 6>();
    between<0, kQuarters>(pieces);
    if constexpr (N > 1) {
      load_tile<7>(b.at(1, k), b.row_bytes);
      multiply_add_tiles<1, 4, 7>();
      between<1, kQuarters>(pieces);
    }
    if constexpr (M > 1) {
      load_tile<5>(a.at(1, k), a.row_bytes);
      multiply_add_tiles<2, 5, 6>();
      between<N, kQuarters>(pieces);
    }
    if constexpr (M > 1 && N > 1) {
      multiply_add_tiles<3, 5, 7>();
      between<3, kQuarters>(pieces);
    }
    pieces.advance(M * N * kQuarters / 4);
  }

  template <int M, typename A, typename B, typename Start>
  static MVIT_INLINE void multiply(const A& a, const B& b, int64_t steps, const Start& start, Pieces& pieces) {
    start.template load<0>(0, 0);
    if constexpr (N > 1) start.template load<1>(0, 1);
    if constexpr (M > 1) start.template load<2>(1, 0);
    if constexpr (M > 1 && N > 1) start.template load<3>(1, 1);
    // The pieces are spread over the steps as evenly as two, one, one half or one quarter a product do it.
    int64_t k = 0;
    if constexpr (M * N == 4) {
      if (pieces.left > 4 * steps)
        for (; k < steps && pieces.left >= 8; ++k) multiply_step<M, 8>(a, b, k, pieces);
      if (pieces.left > 2 * (steps - k))
        for (; k < steps && pieces.left >= 4; ++k) multiply_step<M, 4>(a, b, k, pieces);
      if (pieces.left > steps - k)
        for (; k < steps && pieces.left >= 2; ++k) multiply_step<M, 2>(a, b, k, pieces);
      for (; k < steps && pieces.left >= 1; ++k) multiply_step<M, 1>(a, b, k, pieces);
    } else {
      for (; k < steps && pieces.left >= 2 * M * N; ++k) multiply_step<M, 8>(a, b, k, pieces);
    }
    for (; k + 4 <= steps; k += 4) {
      multiply_step<M, 0>(a, b, k, pieces);
      multiply_step<M, 0>(a, b, k + 1, pieces);
      multiply_step<M, 0>(a, b, k + 2, pieces);
      multiply_step<M, 0>(a, b, k + 3, pieces);
      keep_vector_units_awake();
    }
    for (; k < steps; ++k) multiply_step<M, 0>(a, b, k, pieces);
  }

  // Stores the results, tile (m, n) at to + (m · 16 rows) + n · 16, and runs all pieces that are left.
  template <int M>
  MVIT_INLINE void store_all(float* to, int64_t ld, Pieces& pieces) const {
    const int64_t row_bytes = ld * static_cast<int64_t>(sizeof(float));
    float* const lower = to + rows_ * ld;
    mvit::MVIT_ISA::store_tile<0>(to, row_bytes);
    pieces.run_one_if_any();
    if constexpr (N > 1) {
      mvit::MVIT_ISA::store_tile<1>(to + kTile, row_bytes);
      pieces.run_one_if_any();
    }
    if constexpr (M > 1) {
      mvit::MVIT_ISA::store_tile<2>(lower, row_bytes);
      pieces.run_one_if_any();
    }
    if constexpr (M > 1 && N > 1) {
      mvit::MVIT_ISA::store_tile<3>(lower + kTile, row_bytes);
      pieces.run_one_if_any();
    }
    while (pieces.left > 0) pieces.run_one_if_any();
  }

  Pieces pieces_;
  float *buffer_, *other_;  // for the next block, and of the pieces
  const int rows_;
};

}  // namespace MVIT_ISA
}  // namespace mvit
