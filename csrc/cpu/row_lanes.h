// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels of the row-wise operators: blocks of rows as panels with one row per lane (see token_lanes.h),
// the helpers of forward, and the dispatch tables.
#pragma once

#include "rows.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

static_assert(kBlockRows == kLanes);

// Output channels that a product leaves in L1 before they are written: 12 KB. A multiple of every tile's rows and of
// every vector size.
template <typename P>
constexpr int64_t kOutChannels = 96 * P::kStep;

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

// An operand panel. Whoever takes it calls clear_padding on it once before the first product.
template <typename P>
MVIT_INLINE typename P::Operand* take_operand(Pieces& pieces, int64_t channels) {
  return pieces.template take<typename P::Operand>(P::rows_in_memory(channels) * kLanes);
}

// Where the operand made from a panel goes: in place if the types are the same, else into its own memory.
template <typename P>
MVIT_INLINE typename P::Operand* operand_beside(Pieces& pieces, typename P::Value* panel, int64_t channels) {
  if constexpr (P::kStep == 1)
    return panel;
  else
    return take_operand<P>(pieces, channels);
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
MVIT_INLINE void read_pairs(bf16x2* operand, const Rows& rows, const Block<float>& block, int64_t channels,
                            int64_t first_channel = 0) {
  constexpr int size = Vec<float>::size;
  for (int64_t i0 = 0; i0 < block.lanes; i0 += size) {
    const bfloat16* row[size] = {};
    const int64_t present = smaller(size, block.count - i0);
    tokens_of<const bfloat16>(rows, first_channel)
        .for_each(block.first + i0, present, [&](const bfloat16* p, int64_t i) { row[i] = p; });
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

// The way back: channels [first_channel, first_channel + channels) of the block's rows = panel, which has the rows of
// whole vectors of pairs.
MVIT_INLINE void write_pairs(const Rows& rows, const Block<float>& block, int64_t channels, int64_t first_channel,
                             const bf16x2* panel) {
  constexpr int size = Vec<float>::size;
  for (int64_t i0 = 0; i0 < block.count; i0 += size) {
    bfloat16* row[size] = {};
    const int64_t present = smaller(size, block.count - i0);
    tokens_of<bfloat16>(rows, first_channel).for_each(block.first + i0, present,
                                                      [&](bfloat16* p, int64_t i) { row[i] = p; });
    for (int64_t c0 = 0; c0 < channels; c0 += 2 * size) {
      const int width = static_cast<int>(smaller(size, (channels - c0) / 2));
      Vec<float> tile[size];
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) tile[i] = load(reinterpret_cast<const float*>(panel + (c0 / 2 + i) * kLanes + i0));
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i)
        if (i < present) store_first(reinterpret_cast<float*>(row[i] + c0), tile[i], width);
    }
  }
}

// tile += panel[row …][lane …]
template <int R, int V>
MVIT_INLINE void add_operand(Vec<float> (&tile)[R][V], const bf16x2* panel, int64_t row, int64_t lane) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 2)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      NativeBits bits;
      std::memcpy(&bits, panel + (row + r) / 2 * kLanes + lane + v * Vec<float>::size, sizeof bits);
      tile[r][v] = tile[r][v] + Vec<float>(Vec<float>::Native(bits << 16));
      if (r + 1 < R) tile[r + 1][v] = tile[r + 1][v] + Vec<float>(Vec<float>::Native(bits & 0xffff0000u));
    }
}
#endif

// Memory for results as operands hold them, in the rows that write_results reads. Pairs are rounded before they are
// transposed, so half as much is.
template <typename P>
MVIT_INLINE int64_t result_channels(int64_t channels) {
  return round_up(channels, P::kStep * Vec<typename P::Value>::size);
}

// Channels [first_channel, first_channel + channels) of the block's rows = results.
template <typename P, typename E>
MVIT_INLINE void write_results(const Rows& rows, const Block<typename P::Value>& block, int64_t channels,
                               int64_t first_channel, const typename P::Operand* results) {
  if constexpr (P::kStep == 1)
    write_columns(tokens_of<E>(rows, first_channel), block.first, block.count, channels, results, kLanes);
  else
    write_pairs(rows, block, channels, first_channel, results);
}

// An epilogue that stores its results for write_results.
template <typename P>
MVIT_INLINE auto store_results(typename P::Operand* results) {
  return [results](auto& tile, int64_t row, int64_t lane) {
    store_operand(results, kLanes, row, lane, kLanes - lane, tile);
  };
}

// Reads the block's rows as an operand; zero in lanes without a row.
template <typename P, typename E>
MVIT_INLINE void read_operand(typename P::Operand* operand, const Rows& rows, const Block<typename P::Value>& block,
                              int64_t channels) {
  if constexpr (P::kStep == 1)
    read_block<E>(operand, rows, block, channels);
  else
    read_pairs(operand, rows, block, channels);
}

// normalised = LN(panel) of the block's rows, whose statistics become args.mean and args.rstd: backward reads them.
template <typename P, typename Args, typename T = typename P::Value>
MVIT_INLINE void normalise_block(typename P::Operand* normalised, const T* panel, const Block<T>& block,
                                 const Args& args) {
  T mean[kLanes], rstd[kLanes];
  layer_norm<P>(normalised, panel, args.channels, static_cast<const T*>(args.norm_weight),
                static_cast<const T*>(args.norm_bias), static_cast<T>(args.eps), block.lanes, mean, rstd);
  std::memcpy(static_cast<T*>(args.mean) + block.first, mean, sizeof(T) * block.count);
  std::memcpy(static_cast<T*>(args.rstd) + block.first, rstd, sizeof(T) * block.count);
}

// ---- weights --------------------------------------------------------------------------------------------------------

// W (rows, columns), contiguous, or its transpose, as the left operand of products: as it lies in memory, or in a form
// made from it in memory that is shared by all threads. This form consists of independent parts.
template <typename P, bool kTransposed = false>
struct LeftWeights {
  static constexpr bool kMade = packs_weights<P> || (kTransposed && P::kStep > 1);
  using Weight = typename P::Weight;
  const Weight* weights;
  int64_t rows, columns;
  Weight* made = nullptr;

  LeftWeights(Pieces& pieces, const void* weights, int64_t rows, int64_t columns)
      : weights(static_cast<const Weight*>(weights)), rows(rows), columns(columns) {
    if constexpr (kMade)
      made = pieces.take<Weight>(!packs_weights<P> ? rows * columns
                                 : kTransposed     ? packed_weights_size<P>(columns, rows)
                                                   : packed_weights_size<P>(rows, columns));
  }

  int64_t parts() const {
    if (!kMade) return 0;
    return round_up(kTransposed && packs_weights<P> ? columns : rows, kRowsOfAPart) / kRowsOfAPart;
  }
  // Makes those of [begin, end) that are parts of it, and makes [begin, end) relative to the next operand's parts.
  void make(int64_t& begin, int64_t& end) const {
    const int64_t count = parts(), last = smaller(end, count);
    if (begin < last) {
      if constexpr (packs_weights<P> && kTransposed)
        pack_transposed_weights<P>(made, weights, rows, columns, begin, last);
      else if constexpr (packs_weights<P>)
        pack_weights<P>(made, weights, rows, columns, begin, last);
      else if constexpr (kMade)
        for (int64_t row = begin * kRowsOfAPart; row < smaller(last * kRowsOfAPart, rows); row += 2) make_pairs(row);
    }
    begin = begin < count ? 0 : begin - count;
    end = end < count ? 0 : end - count;
  }

  // product<P> of rows [first, first + n) of W (or Wᵀ); `first` is a multiple of 16, and 0 for Wᵀ.
  template <typename Epilogue>
  MVIT_INLINE void product(const typename P::Operand* panel, int64_t first, int64_t n, int64_t lanes,
                           const Epilogue& epilogue) const {
    const int64_t channels = kTransposed ? rows : columns;
    const int64_t ld = kTransposed && !packs_weights<P> ? columns : weight_ld<P>(channels);
    mvit::MVIT_ISA::product<P, kTransposed ? Operand::column_major : Operand::row_major>(
        (kMade ? made : weights) + first * ld, ld, panel, n, channels, lanes, epilogue);
  }

 private:
  static constexpr int64_t kRowsOfAPart = 16;

  // pairs[row / 2][c] = {W[row][c], W[row + 1][c]}: what multiply_add takes as column_major.
  MVIT_INLINE void make_pairs(int64_t row) const {
    if constexpr (P::kStep > 1)
      for (int64_t c = 0; c < columns; c += Vec<float>::size) {
        const int width = static_cast<int>(smaller(Vec<float>::size, columns - c));
        const Weight* const w = weights + row * columns + c;
        store_first(reinterpret_cast<typename P::Operand*>(made + row * columns) + c, load_first(w, width),
                    load_first(w + columns, width), width);
      }
  }
};

template <typename P>
using TransposedWeights = LeftWeights<P, true>;

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
