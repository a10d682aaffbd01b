// SPDX-License-Identifier: Apache-2.0
// Units of the transformer stack: whole sequences, laid out one after another in blocks of 32 token lanes, and the
// steps that read them from the map and write them back.
#pragma once

#include "token_lanes.h"
#include "transformer.h"

namespace mvit {
namespace MVIT_ISA {

// A sequence starts at a multiple of this many lanes, so that tiles of keys never straddle two blocks and, on matrix
// tiles, tiles of queries lie within one sequence.
#if defined(MVIT_TILES)
constexpr int64_t kSequenceStep = 16;
#else
constexpr int64_t kSequenceStep = 8;
#endif

MVIT_INLINE int64_t sequence_lanes(const TransformerShape& shape) { return round_up(shape.tokens(), kSequenceStep); }

inline int64_t unit_lanes(const TransformerShape& shape, int64_t sequences) {
  return sequences * sequence_lanes(shape);
}
MVIT_INLINE int64_t unit_blocks(const TransformerShape& shape, int64_t sequences) {
  return round_up(unit_lanes(shape, sequences), kLanes) / kLanes;
}

// visit(sequence, first token, tokens, lane) for every run of tokens of one sequence in a block, in order of lanes.
template <typename Visit>
MVIT_INLINE void for_each_run(const TransformerShape& shape, int64_t sequences, int64_t block, const Visit& visit) {
  const int64_t stride = sequence_lanes(shape), begin = block * kLanes, end = begin + kLanes;
  for (int64_t s = begin / stride; s < sequences && s * stride < end; ++s) {
    const int64_t first = begin > s * stride ? begin - s * stride : 0;
    const int64_t last = smaller(shape.tokens(), end - s * stride);
    if (first < last) visit(s, first, last - first, s * stride + first - begin);
  }
}

// Number of lanes of a block up to the last sequence's end.
MVIT_INLINE int64_t used_lanes(const TransformerShape& shape, int64_t sequences, int64_t block) {
  return smaller(kLanes, sequences * sequence_lanes(shape) - block * kLanes);
}

template <typename E>
MVIT_INLINE TokenRows<E> sequence_rows(const TransformerShape& shape, const Map& map, int64_t sequence) {
  const int64_t position = sequence % shape.positions(), image = sequence / shape.positions();
  const int64_t h = position / shape.patch_width, w = position % shape.patch_width;
  E* first = static_cast<E*>(map.data) + image * map.image_stride + h * map.row_stride + w * map.column_stride;
  return {first, shape.patch_height * map.row_stride, shape.patch_width * map.column_stride, shape.patch_columns};
}

// Elements of a block of the residual stream, [round_up(width, 16)][kLanes].
MVIT_INLINE int64_t stream_size(const TransformerShape& shape) { return round_up(shape.width, 16) * kLanes; }

// rows = the map's rows of a block; zero in lanes without a token.
template <typename E, typename T>
MVIT_INLINE void read_rows(const TransformerArgs& args, int64_t first_sequence, int64_t sequences, int64_t block,
                           T* rows) {
  const TransformerShape& shape = args.shape;
  for (int64_t i = 0; i < stream_size(shape); i += Vec<T>::size) store(rows + i, Vec<T>(T(0)));
  for_each_run(shape, sequences, block, [&](int64_t s, int64_t token, int64_t count, int64_t lane) {
    read_columns(rows + lane, kLanes, sequence_rows<const E>(shape, args.in, first_sequence + s), token, count,
                 shape.width);
  });
}

// The map's rows of a block = the final norm of `rows`; `panel` has room for a block of them.
template <typename E, typename T>
MVIT_INLINE void write_rows(const TransformerArgs& args, int64_t first_sequence, int64_t sequences, int64_t block,
                            const T* rows, T* panel) {
  const TransformerShape& shape = args.shape;
  if (args.final_norm_weight != nullptr) {
    layer_norm<Plain<T>>(panel, rows, shape.width, args.final_norm_weight, args.final_norm_bias, shape.eps,
                         round_up(used_lanes(shape, sequences, block), Vec<T>::size));
    rows = panel;
  }
  for_each_run(shape, sequences, block, [&](int64_t s, int64_t token, int64_t count, int64_t lane) {
    write_columns(sequence_rows<E>(shape, args.out, first_sequence + s), token, count, shape.width, rows + lane, kLanes);
  });
}

// The first step reads the map, each layer is two steps, the last step writes the map.
inline int64_t steps(const TransformerShape& shape) { return 2 + 2 * shape.layers; }

}  // namespace MVIT_ISA
}  // namespace mvit
