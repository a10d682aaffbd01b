// SPDX-License-Identifier: Apache-2.0
// The GEMM microkernel used by every product: a register tile of R rows × V vectors of the result stays in registers.
// The right operand is read as vectors, the left operand is broadcast element by element.
#pragma once

#include "vec.h"

namespace mvit {
namespace MVIT_ISA {

// Shape of the register tile. AVX-512 has 32 registers: 8 × 3 accumulators + 3 operands + 1 broadcast. AVX2 has 16:
// 6 × 2 + 2 + 1. Both leave the number of loads well below the number of FMAs. Six rows divide 24, 30, 36, 48 and 60
// exactly. NEON has 32: 8 × 2 + 2 and a register of A for each row (see `add_by_elements`); the 16 accumulators are what
// four pipes of four cycles' latency can fill.
#if MVIT_VECTOR_BYTES == 64
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(MVIT_NEON)
constexpr int kTileRows = 8, kTileVectors = 2;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

// Steps of k at a time. On NEON whole vectors of k have a loop of their own, so these are few.
#if defined(MVIT_NEON)
#define MVIT_UNROLL_STEPS _Pragma("GCC unroll 1")
#else
#define MVIT_UNROLL_STEPS _Pragma("GCC unroll 4")
#endif

enum class Operand { row_major, column_major };
// Whether to prefetch the next R rows of A. Eight short rows at a time are too many streams for the hardware
// prefetcher; without software prefetch, weights that come from L3 cost a fifth of a transformer's time.
enum class Next { unknown, rows };

// tile[r][v] = f(tile[r][v], r, v)
template <int R, int V, typename T, typename F>
MVIT_INLINE void map_tile(Vec<T> (&tile)[R][V], const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tile[r][v] = f(tile[r][v], r, v);
}

#if defined(MVIT_NEON)
// tile[r][v] += left[r][i] · b[i][v] for i in [kFirst, size)
template <int kFirst = 0, int R, int V, typename T>
MVIT_INLINE void add_elements(Vec<T> (&tile)[R][V], const Vec<T> (&left)[R], const T* b, int64_t ldb) {
  Vec<T> row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = load(b + v * Vec<T>::size);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tile[r][v] = fma_element<kFirst>(left[r], row[v], tile[r][v]);
  if constexpr (kFirst + 1 < Vec<T>::size) add_elements<kFirst + 1>(tile, left, b + ldb, ldb);
}

// The whole vectors of k in [begin, depth) of multiply_add, below; returns the first k left over. rows(r) is row r of A:
// one load of it serves `size` steps, each of which multiplies by one element. An 8 × 2 tile of floats loads 16 times
// for 64 FMAs, where a broadcast a row and step would be 40 loads.
template <int R, int V, Next kNext, typename T, typename Rows>
MVIT_INLINE int64_t add_by_elements(Vec<T> (&tile)[R][V], const Rows& rows, const T* b, int64_t ldb, int64_t depth,
                                    int64_t begin) {
  constexpr int size = Vec<T>::size, line = 64 / sizeof(T);
  // A copy, whose address no epilogue takes: Clang 22 otherwise keeps the tile in memory, with 32 paired stores for 64 FMAs.
  Vec<T> sums[R][V];
  map_tile(sums, [&](Vec<T>, int r, int v) { return tile[r][v]; });
  int64_t k = begin;
  for (; k + size <= depth; k += size) {
    if constexpr (kNext == Next::rows)
#pragma GCC unroll 8
      for (int i = 0; i < R * size; i += line) __builtin_prefetch(rows(R) + R * k + i);
    Vec<T> left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load(rows(r) + k);
    add_elements(sums, left, b + k * ldb, ldb);
  }
  map_tile(tile, [&](Vec<T>, int r, int v) { return sums[r][v]; });
  return k;
}

// tile[r][v] += column[r] · row[v] for r in [kFirst, R): a vector of the column serves `size` rows.
template <int kFirst = 0, int R, int V, typename T>
MVIT_INLINE void add_column(Vec<T> (&tile)[R][V], const T* column, const Vec<T> (&row)[V]) {
  constexpr int size = Vec<T>::size;
  const Vec<T> left = load(column + kFirst / size * size);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) tile[kFirst][v] = fma_element<kFirst % size>(left, row[v], tile[kFirst][v]);
  if constexpr (kFirst + 1 < R) add_column<kFirst + 1>(tile, column, row);
}
#endif

// tile[r][v] += Σ_k A(r, k) · B[k][v] for k in [begin, depth), ascending, one FMA each. The bits of an element
// therefore do not depend on the shape of the tile that computes it.
//   A(r, k) is a[r · lda + k] (row-major) or a[k · lda + r] (column-major); row k of B starts at b + k · ldb.
template <int R, int V, Operand kOrder, Next kNext = Next::unknown, typename T>
MVIT_INLINE void multiply_add(Vec<T> (&tile)[R][V], const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                              int64_t begin = 0) {
#if defined(MVIT_NEON)
  if constexpr (kOrder == Operand::row_major)
    begin = add_by_elements<R, V, kNext>(tile, [&](int r) { return a + r * lda; }, b, ldb, depth, begin);
#endif
MVIT_UNROLL_STEPS
  for (int64_t k = begin; k < depth; ++k) {
    if constexpr (kNext == Next::rows) __builtin_prefetch(a + R * lda + R * k);
    Vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * Vec<T>::size);
#if defined(MVIT_NEON)
    if constexpr (kOrder == Operand::column_major && R % Vec<T>::size == 0) {
      add_column(tile, a + k * lda, row);
      continue;
    }
#endif
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> scalar(kOrder == Operand::row_major ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = fma(scalar, row[v], tile[r][v]);
    }
  }
}

#if defined(MVIT_BF16_PAIRS)
// The same for bfloat16 pairs; `depth` counts pairs. Each step adds two products to a float32 sum.
//   A(r, k) is the pair at a[r · lda + 2k] (row-major; lda in bfloat16) or a[2 (k · lda + r)] (column-major; in pairs).
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

template <int R, int V, typename T>
MVIT_INLINE void clear(Vec<T> (&tile)[R][V]) {
  map_tile(tile, [](Vec<T>, int, int) { return Vec<T>(T(0)); });
}

// tile[r][v] = p[r][v] + tile[r][v]
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

// Long sums are blocked: each block is summed from zero, then added. The error of a single chain of K products grows
// with K, that of blocks of b with sqrt(K · b + K² / b). For few rows MKL sums in 16 or more lanes, which is 2.5 times
// as accurate as a chain at K = 192 and 3.7 times at K = 2048. Even blocks of at most 40 are within a factor of 1.3 of
// that up to K = 320 (blocks of 48: 1.4); beyond that longer blocks are used. The cost is one addition from and to L1
// per 40 or 56 products.
constexpr int64_t kBlock = 40, kLongBlock = 56;

// Not for bfloat16 pairs: the effect is negligible next to the rounding of the operands.
template <typename Weight>
constexpr bool sums_in_blocks = sizeof(Weight) > 2;

// Number of steps in a block of a sum over `depth`: blocks as even as possible, in multiples of four (multiply_add is
// unrolled by four), so that the branch predictor learns the loop exit. One misprediction per block costs 5 % of a
// product.
template <typename Weight>
MVIT_INLINE int64_t block_of(int64_t depth) {
  const int64_t most = depth <= 8 * kBlock ? kBlock : kLongBlock, blocks = (depth + most - 1) / most;
  return sums_in_blocks<Weight> && blocks > 1 ? ((depth + blocks - 1) / blocks + 3) / 4 * 4 : depth;
}

// Blocked sum over [0, depth): add_steps(begin, end) adds one range to the tile. The first block starts from the tile's
// current values.
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

// multiply_add in blocks; pass block_of(depth) as `block`.
template <int R, int V, Operand kOrder, Next kNext = Next::unknown, typename A, typename B, typename T>
MVIT_INLINE void multiply_add_in_blocks(Vec<T> (&tile)[R][V], const A* a, int64_t lda, const B* b, int64_t ldb,
                                        int64_t depth, int64_t block) {
  add_in_blocks(tile, depth, block, [&](int64_t begin, int64_t end) {
    multiply_add<R, V, kOrder, kNext>(tile, a, lda, b, ldb, end, begin);
  });
}

// One out-of-line function per tile shape. Inlined into a whole kernel, the accumulators compete for registers with
// everything else that is live, and GCC 12 spills them: half the speed on AVX2.
template <int n, typename Body>
__attribute__((noinline)) void step(const Body& body, int64_t begin) {
  body(std::integral_constant<int, n>{}, begin);
}

// Calls body(std::integral_constant<int, n>, begin) over [0, count) in steps of n = kStep, then the remainder in halves
// of it: few tile shapes to compile, and any count works.
template <int kStep, typename Body>
MVIT_INLINE void in_steps(int64_t count, const Body& body, int64_t begin = 0) {
  for (; begin + kStep <= count; begin += kStep) step<kStep>(body, begin);
  if constexpr (kStep > 1) {
    if (begin < count) in_steps<kStep / 2>(count, body, begin);
  }
}

// Calls body(std::integral_constant<int, n>) with n = count, 1 <= count <= kMost.
template <int kMost, typename Body>
MVIT_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>{});
}

}  // namespace MVIT_ISA
}  // namespace mvit
