// SPDX-License-Identifier: Apache-2.0
// Attention on matrix tiles with the highest score subtracted from all: for queries whose numerators are too large or too
// small otherwise (attention_tiles.h). Trained networks have none, so nothing overlaps here.
#pragma once

#include "attention_tiles.h"

namespace mvit {
namespace MVIT_ISA {

// As attend_on_tiles, for one vector of queries.
__attribute__((noinline)) inline void attend_carefully(const AttentionArgs& args, const AttentionScratch& scratch) {
  const int64_t steps = steps_of(args.head_dim), rows = value_rows_of(args.head_dim);
  Numerators<1> none{nullptr, nullptr, 0};
  for (int64_t head = 0; head < args.heads; ++head) {
    Vec<float> highest(-__builtin_inff());
    for (int64_t begin = 0; begin < args.tokens; begin += kKeysAtOnce) {
      const int64_t keys = smaller(kKeysAtOnce, args.tokens - begin), blocks = steps_of(keys);
      multiply_scores<1, 0>({args.key + head * steps * args.key_step_size + begin * kTileDepth,
                             args.query + head * args.head_dim / 2 * kLanes, args.key_step_size, steps, tiles_of(keys)},
                            scratch.scores, none, 0);
      const Vec<float> before = highest;
      for (int64_t key = 0; key < keys; ++key) highest = maximum(highest, load(scratch.scores + key * kLanes));
      for (int64_t key = 0; key < blocks * kTileDepth; key += 2) {
        Vec<float> pair[2];
        for (int i = 0; i < 2; ++i)
          pair[i] = key + i < keys ? load(scratch.scores + (key + i) * kLanes) - highest : Vec<float>(-__builtin_inff());
        exp2_to_round(pair);
        const __m512i pairs = upper_halves(pair[0], pair[1]);
        std::memcpy(scratch.numerators[0] + key / 2 * kLanes, &pairs, sizeof pairs);
      }
      if (begin > 0) {
        const Vec<float> factor = exp2(before - highest);
        for (float* row = scratch.out; row < scratch.out + rows * kLanes; row += kLanes) store(row, load(row) * factor);
      }
      weigh_values<1>({args.value + begin / kTileDepth * args.value_block_size + head * rows * kTileDepth,
                       args.value_block_size, scratch.numerators[0], blocks, begin == 0},
                      rows, scratch.out, none, 0);
    }
    const Vec<float> inverse = Vec<float>(1.0f) / load(scratch.out + args.head_dim * kLanes);
    for (int64_t dim = 0; dim < args.head_dim; dim += 2)
      store_first(args.out + (head * args.head_dim + dim) / 2 * kLanes, load(scratch.out + dim * kLanes) * inverse,
                  load(scratch.out + (dim + 1) * kLanes) * inverse, kTile);
  }
}

// Vectors with one of these queries, a bit each. (Which other sequences share the block makes no difference.)
MVIT_INLINE void attend_again(const AttentionArgs& args, uint32_t queries, const AttentionScratch& scratch) {
  for (int64_t lane = 0; lane < kLanes; lane += kTile)
    if ((queries >> lane & 0xffff) != 0) {
      AttentionArgs of = args;
      of.query += lane;
      of.out += lane;
      attend_carefully(of, scratch);
    }
}

}  // namespace MVIT_ISA
}  // namespace mvit
