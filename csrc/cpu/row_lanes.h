// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels of the row-wise operators: blocks of rows as panels with one row per lane (see token_lanes.h),
// the helpers of forward, and the dispatch tables.
#pragma once

#include "rows.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

static_assert(kBlockRows == kLanes);

// Output channels that a product leaves in L1 before they are written: 12 KB of float. A multiple of every tile's rows
// and of every vector size.
constexpr int64_t kOutChannels = 96;

// Bump allocator over one block of memory; each piece starts on a cache line. Constructed from null it only counts
// bytes.
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

// Rows [first, first + count) of a tensor, in the first `count` lanes; `lanes` is `count` rounded up to whole vectors.
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

// panel [round_up(channels, size)][kLanes] = the block's rows; zero in lanes without a row.
template <typename E, typename T>
MVIT_INLINE void read_block(T* panel, const Rows& rows, const Block<T>& block, int64_t channels) {
  if (block.count < kLanes) std::memset(panel, 0, sizeof(T) * round_up(channels, Vec<T>::size) * kLanes);
  read_columns(panel, kLanes, tokens_of<const E>(rows), block.first, block.count, channels);
}

// Where the operand made from a panel goes: in place if the types are the same, else into its own memory.
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

#if defined(MVIT_BF16_PAIRS)
// operand [channels / 2][kLanes] = the block's rows, zero in lanes without a row. Transposes 32-bit words of two
// channels.
MVIT_INLINE void read_pairs(bf16x2* operand, const Rows& rows, const Block<float>& block, int64_t channels) {
  constexpr int size = Vec<float>::size;
  for (int64_t i0 = 0; i0 < block.lanes; i0 += size) {
    const bfloat16* row[size] = {};
    const int64_t present = smaller(size, block.count - i0);
    tokens_of<const bfloat16>(rows).for_each(block.first + i0, present,
                                             [&](const bfloat16* p, int64_t i) { row[i] = p; });
    for (int64_t c0 = 0; c0 < channels; c0 += 2 * size) {
      const int width = static_cast<int>(smaller(size, (channels - c0) / 2));
      Vec<float> tile[size];
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i)
        tile[i] = i < present ? load_first(reinterpret_cast<const float*>(row[i] + c0), width) : Vec<float>(0.0f);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i)
        if (i < width) store(reinterpret_cast<float*>(operand + (c0 / 2 + i) * kLanes + i0), tile[i]);
    }
  }
}
#endif

// Reads the block's rows as an operand; zero in lanes without a row.
template <typename P, typename E>
MVIT_INLINE void read_operand(typename P::Operand* operand, const Rows& rows, const Block<typename P::Value>& block,
                              int64_t channels) {
  if constexpr (P::kStep == 1)
    read_block<E>(operand, rows, block, channels);
  else
    read_pairs(operand, rows, block, channels);
}

// The dispatch tables of an operator, in RowArithmetic's order, from a template entry<P, E>().
#define MVIT_ROW_TABLE(entry)                                                                                         \
  {                                                                                                                   \
    MVIT_PLAIN_ENTRY(MVIT_ISA::entry<MVIT_ISA::Plain<float>, float>()),                                               \
        MVIT_PLAIN_ENTRY(MVIT_ISA::entry<MVIT_ISA::Plain<float>, MVIT_ISA::bfloat16>()),                              \
        MVIT_PLAIN_ENTRY(MVIT_ISA::entry<MVIT_ISA::Plain<double>, double>()),                                         \
        MVIT_PAIRS_ENTRY(MVIT_ISA::entry<MVIT_ISA::Bf16Pairs, MVIT_ISA::bfloat16>())                                  \
  }

}  // namespace MVIT_ISA
}  // namespace mvit
