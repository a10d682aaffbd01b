// SPDX-License-Identifier: Apache-2.0
// What the row-wise operators' kernels share: blocks of rows as panels (see token_lanes.h), and what forward needs.
#pragma once

#include "rows.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

static_assert(kBlockRows == kLanes);

// Output channels that a product leaves in L1 before they are written: 12 KB of float, a multiple of every tile's rows and
// of every vector.
constexpr int64_t kOutChannels = 96;

// The pieces of one memory, each from a cache line on. Begun at null it only counts.
struct Pieces {
  std::uintptr_t next;

  explicit MVIT_INLINE Pieces(void* memory) : next(reinterpret_cast<std::uintptr_t>(memory)) {}
  template <typename T>
  MVIT_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += static_cast<std::uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
};

// Rows [first, first + count) of a tensor, in the first `count` lanes; `lanes` are whole vectors.
template <typename T>
struct Block {
  int64_t first, count, lanes;

  MVIT_INLINE Block(int64_t begin, int64_t rows)
      : first(begin), count(smaller(kLanes, rows - begin)), lanes(round_up(count, Vec<T>::size)) {}
};

template <typename E>
MVIT_INLINE TokenRows<E> tokens_of(const Rows& rows, int64_t channel = 0) {
  return {static_cast<E*>(rows.data) + channel, rows.row_stride, rows.column_stride, rows.columns};
}

// panel [round_up(channels, size)][kLanes] = the block's rows, zero where there is none
template <typename E, typename T>
MVIT_INLINE void read_block(T* panel, const Rows& rows, const Block<T>& block, int64_t channels) {
  if (block.count < kLanes) std::memset(panel, 0, sizeof(T) * round_up(channels, Vec<T>::size) * kLanes);
  read_columns(panel, kLanes, tokens_of<const E>(rows), block.first, block.count, channels);
}

// Where a panel becomes an operand: in its own place, or beside it.
template <typename P>
MVIT_INLINE typename P::Operand* operand_beside(Pieces& pieces, typename P::Value* panel, int64_t channels) {
  if constexpr (P::kStep == 1)
    return panel;
  else
    return pieces.template take<typename P::Operand>(P::rows(channels) * kLanes);
}

template <typename P>
MVIT_INLINE void store_operand_of(typename P::Operand* operand, const typename P::Value* panel, int64_t channels,
                                  int64_t lanes) {
  if constexpr (P::kStep > 1)
    for (int64_t lane = 0; lane < lanes; lane += Vec<typename P::Value>::size)
      fill_operand<P>(operand, channels, lane, [&](int64_t c) { return load(panel + c * kLanes + lane); });
}

// The tables of an operator, in RowArithmetic's order, from a template entry<P, E>().
#if defined(MVIT_BF16_PAIRS)
#define MVIT_ROW_PAIRS(entry) MVIT_ISA::entry<MVIT_ISA::Bf16Pairs, MVIT_ISA::bfloat16>()
#else
#define MVIT_ROW_PAIRS(entry) {}
#endif
#define MVIT_ROW_TABLE(entry)                                                                                  \
  {                                                                                                            \
    MVIT_ISA::entry<MVIT_ISA::Plain<float>, float>(), MVIT_ISA::entry<MVIT_ISA::Plain<float>, MVIT_ISA::bfloat16>(), \
        MVIT_ISA::entry<MVIT_ISA::Plain<double>, double>(), MVIT_ROW_PAIRS(entry)                              \
  }

}  // namespace MVIT_ISA
}  // namespace mvit
