// SPDX-License-Identifier: Apache-2.0
// The inner loop of every small matrix product: a tile of R rows × V vectors of the result stays in registers.
#pragma once

#include "vec.h"

namespace mvit {
namespace MVIT_ISA {

// Registers of a tile. AVX-512 has 32 of 16 lanes: 8 × 3 accumulators + 3 operands + 1 broadcast; AVX2 has 16:
// 6 × 2 + 2 + 1. Both leave the loads well behind the arithmetic. Six rows divide 24, 30, 36, 48 and 60 exactly.
#if MVIT_VECTOR_BYTES == 64
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

enum class Operand { row_major, column_major };
// Whether to ask for the R rows of A after these meanwhile. Eight short rows at a time are too many beginnings for the
// processor to foresee; weights that must come from L3 then cost a fifth of a transformer's time.
enum class Next { unknown, rows };

// tile[r][v] += Σ_k A(r, k) · B[k][v] for k in [begin, depth), ascending, one fused multiply-add each: the bits of an
// element do not depend on the shape of the tile that computes it.
//   A(r, k) is a[r · lda + k] (row-major) or a[k · lda + r] (column-major); B's row k begins at b + k · ldb.
template <int R, int V, Operand kOrder, Next kNext = Next::unknown, typename T>
MVIT_INLINE void multiply_add(Vec<T> (&tile)[R][V], const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                              int64_t begin = 0) {
#pragma GCC unroll 4
  for (int64_t k = begin; k < depth; ++k) {
    if constexpr (kNext == Next::rows) __builtin_prefetch(a + R * lda + R * k);
    Vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * Vec<T>::size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> scalar(kOrder == Operand::row_major ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = fma(scalar, row[v], tile[r][v]);
    }
  }
}

#if defined(MVIT_BF16_PAIRS)
// The same for pairs of bfloat16, `depth` pairs: each step adds two products to a float32 sum.
//   A(r, k) is the pair at a[r · lda + 2k] (row-major: lda counts bfloat16) or a[2 (k · lda + r)] (column-major: pairs).
template <int R, int V, Operand kOrder, Next kNext = Next::unknown>
MVIT_INLINE void multiply_add(Vec<float> (&tile)[R][V], const bfloat16* a, int64_t lda, const bf16x2* b, int64_t ldb,
                              int64_t depth, int64_t begin = 0) {
  for (int64_t k = begin; k < depth; ++k) {
    if constexpr (kNext == Next::rows) __builtin_prefetch(a + R * lda + 2 * R * k);
    __m512bh row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) std::memcpy(&row[v], b + k * ldb + v * Vec<float>::size, sizeof row[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + (kOrder == Operand::row_major ? r * lda + 2 * k : 2 * (k * lda + r)), sizeof pair);
      const __m512bh scalar = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = Vec<float>(_mm512_dpbf16_ps(tile[r][v].native, scalar, row[v]));
    }
  }
}
#endif

// tile[r][v] = f(tile[r][v], r, v)
template <int R, int V, typename T, typename F>
MVIT_INLINE void map_tile(Vec<T> (&tile)[R][V], const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tile[r][v] = f(tile[r][v], r, v);
}

template <int R, int V, typename T>
MVIT_INLINE void clear(Vec<T> (&tile)[R][V]) {
  map_tile(tile, [](Vec<T>, int, int) { return Vec<T>(T(0)); });
}

// tile[r][v] = p's element + tile[r][v]
template <int R, int V, typename T>
MVIT_INLINE void add_tile(Vec<T> (&tile)[R][V], const T* p, int64_t ld) {
  map_tile(tile, [&](Vec<T> x, int r, int v) { return load(p + r * ld + v * Vec<T>::size) + x; });
}

template <int R, int V, typename T>
MVIT_INLINE void store_tile(T* p, int64_t ld, const Vec<T> (&tile)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(p + r * ld + v * Vec<T>::size, tile[r][v]);
}

// Long sums are sums of blocks: each from zero, then added. The error of one chain of K products grows with K, that of
// blocks of b with sqrt(K · b + K² / b). MKL multiplies few rows with sums of 16 or more lanes: 2.5 times as exact as a
// chain at K = 192, 3.7 times at 2048. Even blocks of at most 40 are within 1.3 of that up to K = 320 (of 48, 1.4), longer
// ones from there on. What it costs: an addition in 40 or 56, from and to L1.
constexpr int64_t kBlock = 40, kLongBlock = 56;

// Not of bfloat16 pairs: next to their own rounding it would go unseen.
template <typename Weight>
constexpr bool sums_in_blocks = sizeof(Weight) > 2;

// The steps of one block of `depth`: as even as can be, in fours as multiply_add takes them, for loops whose end the
// processor foresees (missed once a block, ends cost 5 % of a product).
template <typename Weight>
MVIT_INLINE int64_t block_of(int64_t depth) {
  const int64_t most = depth <= 8 * kBlock ? kBlock : kLongBlock, blocks = (depth + most - 1) / most;
  return sums_in_blocks<Weight> && blocks > 1 ? ((depth + blocks - 1) / blocks + 3) / 4 * 4 : depth;
}

// The sum over [0, depth), of which add_steps(begin, end) adds a part to the tile, in blocks; the first one begins with what
// the tile holds.
template <int R, int V, typename T, typename Step>
MVIT_INLINE void add_in_blocks(Vec<T> (&tile)[R][V], int64_t depth, int64_t block, const Step& add_steps) {
  constexpr int64_t ld = V * Vec<T>::size;
  T sums[R * ld];
  for (int64_t k = 0;;) {
    const int64_t end = k + block < depth ? k + block : depth;
    add_steps(k, end);
    if (k > 0) add_tile(tile, sums, ld);
    if (end == depth) return;
    store_tile(sums, ld, tile);
    clear(tile);
    k = end;
  }
}

// multiply_add in blocks, of block_of(depth).
template <int R, int V, Operand kOrder, Next kNext = Next::unknown, typename A, typename B, typename T>
MVIT_INLINE void multiply_add_in_blocks(Vec<T> (&tile)[R][V], const A* a, int64_t lda, const B* b, int64_t ldb,
                                        int64_t depth, int64_t block) {
  add_in_blocks(tile, depth, block, [&](int64_t begin, int64_t end) {
    multiply_add<R, V, kOrder, kNext>(tile, a, lda, b, ldb, end, begin);
  });
}

// A function of its own for each shape of tile: inlined into a whole kernel the accumulators compete for registers with
// all that the kernel holds, and GCC 12 spills them (half the speed on AVX2).
template <int n, typename Body>
__attribute__((noinline)) void step(const Body& body, int64_t begin) {
  body(std::integral_constant<int, n>{}, begin);
}

// body(std::integral_constant<int, n>, begin) over [0, count) in steps of n = kStep, the rest in halves of it: few
// shapes of tile to compile, and any count.
template <int kStep, typename Body>
MVIT_INLINE void in_steps(int64_t count, const Body& body, int64_t begin = 0) {
  for (; begin + kStep <= count; begin += kStep) step<kStep>(body, begin);
  if constexpr (kStep > 1) {
    if (begin < count) in_steps<kStep / 2>(count, body, begin);
  }
}

// body(std::integral_constant<int, n>) for n = count, which is from 1 to kMost.
template <int kMost, typename Body>
MVIT_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>{});
}

}  // namespace MVIT_ISA
}  // namespace mvit
