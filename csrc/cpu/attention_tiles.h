// SPDX-License-Identifier: Apache-2.0
// Attention on matrix tiles (tiles.h), with queries in the lanes: Sᵀ = K Qᵀ, the softmax down its columns, Oᵀ = Vᵀ Pᵀ.
//
// The exponentials take longer than both products, and run beside the tile unit only if pieces of them follow its
// instructions one by one (tile_product.h). So heads overlap: while the scores of one head become numerators of its
// softmax, in place, the products of the next head's scores overwrite those that are done, 16 keys at a time; and the
// maxima of these are taken beside the products of numerators and values.
#pragma once

#include "tiles.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// Scores of 128 keys × 32 queries are 16 KB, their numerators 8 KB, keys and values of a head about 24 KB: an L1. (256
// at a time take 15 % longer.) Longer sequences take several times as many keys, counted from the sequence's start.
constexpr int64_t kKeysAtOnce = 128;

// Up to 32 queries of one sequence, in one block, and its keys and values, in all heads.
struct AttentionArgs {
  int64_t tokens, heads, head_dim;
  // [heads · head_dim / 2 pairs, and finite ones up to a whole step][kLanes], scaled by log2(e) / sqrt(head_dim)
  const bf16x2* query;
  const bfloat16* key;      // [heads][steps of 32 dims][key_step_size / 32][32]: a key a row, zero after its last dim
  const bfloat16* value;    // [blocks of 32 keys][value_block_size / 32][32]: a dim a row, zero after the last key
  int64_t key_step_size, value_block_size;  // elements
  bf16x2* out;              // [heads · head_dim / 2 pairs][kLanes]
};

struct AttentionScratch {
  float* scores;       // [kKeysAtOnce][kLanes]
  bf16x2* numerators;  // [kKeysAtOnce / 2][kLanes]
  float* out;          // [round_up(head_dim, 16)][kLanes]
};

MVIT_INLINE int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }
MVIT_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

constexpr int64_t kPanelRowBytes = kLanes * 4;  // of float32 and of pairs

// 2^x rounded to bfloat16, to nearest. exp2_for's polynomial is within [1, 2), where half a unit of bfloat16 is 2^-8:
// with that added to its constant, rounding is to drop the lower half. Converting and permuting pairs instead makes
// attention take a ninth longer.
MVIT_INLINE NativeBits rounded_exp2(Vec<float> x) {
  const Vec<float> rest(_mm512_maskz_reduce_ps(-1, x.native, _MM_FROUND_TO_NEG_INF));  // 0 for infinity
  Vec<float> p(0.07802452f);
  p = fma(p, rest, Vec<float>(0.22606716f));
  p = fma(p, rest, Vec<float>(0.69583354f));
  p = fma(p, rest, Vec<float>(0.99992522f + 0x1p-8f));
  return NativeBits(_mm512_maskz_scalef_ps(-1, p.native, x.native)) & 0xffff0000u;
}

// Numerators of 16 keys, in eight pieces of a pair of keys: 2^(score - highest). V vectors of queries.
template <int V>
struct Numerators {
  static constexpr int kPieces = kTile / 2;

  const float* scores;
  bf16x2* to;
  Vec<float> highest[V], sum[V];

  template <int first, int last>
  MVIT_INLINE void run() {
#pragma GCC unroll 8
    for (int i = first; i < last; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const float* const pair = scores + 2 * i * kLanes + v * kTile;
        const NativeBits even = rounded_exp2(load(pair) - highest[v]);
        const NativeBits odd = rounded_exp2(load(pair + kLanes) - highest[v]);
        sum[v] = sum[v] + (Vec<float>(NativeFloat(even)) + Vec<float>(NativeFloat(odd)));
        const NativeBits both = even >> 16 | odd;
        std::memcpy(to + i * kLanes + v * kTile, &both, sizeof both);
      }
  }
  MVIT_INLINE void advance() {
    scores += kTile * kLanes;
    to += kPieces * kLanes;
  }
};

// The products of a head's scores: `groups` of 16 keys.
struct Scores {
  const bfloat16* key;
  const bf16x2* query;
  int64_t key_step_size, steps, groups;
};

// Scores of 16 keys in tiles C and C + 1, with pieces of as many numerators shared out after the products. (What is
// captured in a lambda GCC 12 leaves in memory, to be stored and loaded around every asm statement; hence the
// numerators are passed on as they are.) A tile load costs as much as a product, so queries stay in tiles if they fit:
// kSteps is the number of steps, or 0 for any, where nothing runs in between.
template <int V, int kSteps>
struct ScoreProducts {
  static constexpr int kPieces = Numerators<V>::kPieces;

  static MVIT_INLINE void load_queries(const bf16x2* query) {
    load_tile<4>(query, kPanelRowBytes);
    if constexpr (V > 1) load_tile<5>(query + kTile, kPanelRowBytes);
    if constexpr (kSteps > 1) load_tile<6>(query + kTile * kLanes, kPanelRowBytes);
    if constexpr (kSteps > 1 && V > 1) load_tile<7>(query + kTile * kLanes + kTile, kPanelRowBytes);
  }

  // The first kRun pieces run in between.
  template <int C, int kRun>
  static MVIT_INLINE void multiply(const Scores& of, const bfloat16* key, Numerators<V>& pieces) {
    constexpr int each = kSteps > 0 ? kRun / (kSteps * V) : 0;
    zero_tile<C>();
    if constexpr (V > 1) zero_tile<C + 1>();
    if constexpr (kSteps == 0) {
      for (int64_t k = 0; k < of.steps; ++k) {
        load_queries(of.query + k * kTile * kLanes);
        load_tile<2>(key + k * of.key_step_size, 64);
        multiply_add_tiles<C, 2, 4>();
        if constexpr (V > 1) multiply_add_tiles<C + 1, 2, 5>();
      }
      pieces.template run<0, kRun>();
      return;
    }
    load_tile<2>(key, 64);
    multiply_add_tiles<C, 2, 4>();
    pieces.template run<0, each>();
    if constexpr (V > 1) {
      multiply_add_tiles<C + 1, 2, 5>();
      pieces.template run<each, 2 * each>();
    }
    if constexpr (kSteps > 1) {
      load_tile<3>(key + of.key_step_size, 64);
      multiply_add_tiles<C, 3, 6>();
      pieces.template run<V * each, (V + 1) * each>();
    }
    if constexpr (kSteps > 1 && V > 1) {
      multiply_add_tiles<C + 1, 3, 7>();
      pieces.template run<3 * each, 4 * each>();
    }
  }

  template <int C>
  static MVIT_INLINE void store_scores(float* to) {
    store_tile<C>(to, kPanelRowBytes);
    if constexpr (V > 1) store_tile<C + 1>(to + kTile, kPanelRowBytes);
  }
};

// The numerators of `groups` groups of 16 keys, and the scores of the next head, which overwrite theirs.
template <int V, int kSteps>
__attribute__((noinline)) void numerators_and_next_scores(Numerators<V>& numerators, int64_t groups,
                                                          const Scores& next_scores, float* scores) {
  using Products = ScoreProducts<V, kSteps>;
  constexpr int kPieces = Numerators<V>::kPieces;
  constexpr int64_t kGroupKeys = kTile * kTileDepth, kGroupScores = kTile * kLanes;
  const Scores next = next_scores;
  const bfloat16* key = next.key;
  Numerators<V> now = numerators;
  int64_t left = next.groups;
  if (kSteps > 0 && left > 0) Products::load_queries(next.query);
  if constexpr (kSteps == 1) {
    // Two groups take turns in tiles 0, 1 and 6, 7, so that the store of the one, which waits for its products, comes
    // half a group later.
    bool stored = true;
    for (; groups >= 2 && left >= 2; groups -= 2, left -= 2) {
      Products::template multiply<0, kPieces / 2>(next, key, now);
      if (!stored) Products::template store_scores<6>(scores - kGroupScores);
      now.template run<kPieces / 2, kPieces>();
      now.advance();
      Products::template multiply<6, kPieces / 2>(next, key + kGroupKeys, now);
      Products::template store_scores<0>(scores);
      now.template run<kPieces / 2, kPieces>();
      now.advance();
      key += 2 * kGroupKeys;
      scores += 2 * kGroupScores;
      stored = false;
    }
    if (!stored) Products::template store_scores<6>(scores - kGroupScores);
  }
  for (; groups > 0 && left > 0; --groups, --left, key += kGroupKeys, scores += kGroupScores) {
    Products::template multiply<0, kPieces>(next, key, now);
    Products::template store_scores<0>(scores);
    now.advance();
  }
  for (; groups > 0; --groups) {
    now.template run<0, kPieces>();
    now.advance();
  }
  for (; left > 0; --left, key += kGroupKeys, scores += kGroupScores) {
    Products::template multiply<0, 0>(next, key, now);
    Products::template store_scores<0>(scores);
  }
  numerators = now;
}

// The highest of scores, in pieces of eight keys.
template <int V>
struct Highest {
  const float* scores;
  int64_t left;
  Vec<float> value[V];

  MVIT_INLINE void piece_if_any() {
    if (left <= 0) return;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vec<float> of_pair[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        of_pair[i] = maximum(load(scores + 2 * i * kLanes + v * kTile),
                             load(scores + (2 * i + 1) * kLanes + v * kTile));
      value[v] = maximum(value[v], maximum(maximum(of_pair[0], of_pair[1]), maximum(of_pair[2], of_pair[3])));
    }
    scores += 8 * kLanes;
    --left;
  }
};

// out[16 M dims][V · 16 queries] += Vᵀ Pᵀ over `steps` blocks of 32 keys, or = if it is the first of the sequence.
template <int V, int M, int kPieces>
MVIT_INLINE void weigh_values(const bfloat16* value, int64_t value_block_size, const bf16x2* numerators, int64_t steps,
                              bool first, float* out, Highest<V>& pieces) {
  constexpr int64_t tile = kTile * kTileDepth;
  if (first) {
    zero_tile<0>();
    if constexpr (V > 1) zero_tile<1>();
    if constexpr (M > 1) zero_tile<2>();
    if constexpr (M > 1 && V > 1) zero_tile<3>();
  } else {
    load_tile<0>(out, kPanelRowBytes);
    if constexpr (V > 1) load_tile<1>(out + kTile, kPanelRowBytes);
    if constexpr (M > 1) load_tile<2>(out + kTile * kLanes, kPanelRowBytes);
    if constexpr (M > 1 && V > 1) load_tile<3>(out + kTile * kLanes + kTile, kPanelRowBytes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    load_tile<6>(numerators, kPanelRowBytes);
    load_tile<4>(value, 64);
    multiply_add_tiles<0, 4, 6>();
    for (int i = 0; i < kPieces; ++i) pieces.piece_if_any();
    if constexpr (V > 1) {
      load_tile<7>(numerators + kTile, kPanelRowBytes);
      multiply_add_tiles<1, 4, 7>();
      for (int i = 0; i < kPieces; ++i) pieces.piece_if_any();
    }
    if constexpr (M > 1) {
      load_tile<5>(value + tile, 64);
      multiply_add_tiles<2, 5, 6>();
      for (int i = 0; i < kPieces; ++i) pieces.piece_if_any();
    }
    if constexpr (M > 1 && V > 1) {
      multiply_add_tiles<3, 5, 7>();
      for (int i = 0; i < kPieces; ++i) pieces.piece_if_any();
    }
    numerators += kTile * kLanes;
    value += value_block_size;
  }
  store_tile<0>(out, kPanelRowBytes);
  if constexpr (V > 1) store_tile<1>(out + kTile, kPanelRowBytes);
  if constexpr (M > 1) store_tile<2>(out + kTile * kLanes, kPanelRowBytes);
  if constexpr (M > 1 && V > 1) store_tile<3>(out + kTile * kLanes + kTile, kPanelRowBytes);
}

template <int V>
__attribute__((noinline)) void weigh_values_and_next_highest(int64_t head_dim, const bfloat16* value,
                                                             int64_t value_block_size, const bf16x2* numerators,
                                                             int64_t steps, bool first, float* out,
                                                             Highest<V>& next_highest) {
  Highest<V> pieces = next_highest;
  int64_t dim = 0;
  for (; dim + kTile < head_dim; dim += 2 * kTile)
    weigh_values<V, 2, 1>(value + dim * kTileDepth, value_block_size, numerators, steps, first, out + dim * kLanes,
                          pieces);
  if (dim < head_dim)
    weigh_values<V, 1, 2>(value + dim * kTileDepth, value_block_size, numerators, steps, first, out + dim * kLanes,
                          pieces);
  while (pieces.left > 0) pieces.piece_if_any();
  next_highest = pieces;
}

// Attention of all heads for V vectors of queries. Configured tiles are those of `Tiles`.
template <int V>
MVIT_INLINE void attend_on_tiles(const AttentionArgs& args, const AttentionScratch& scratch) {
  const int64_t steps = steps_of(args.head_dim), parts = (args.tokens + kKeysAtOnce - 1) / kKeysAtOnce;
  const Vec<float> lowest(-__builtin_inff());
  const auto keys_of = [&](int64_t part) { return smaller(kKeysAtOnce, args.tokens - part * kKeysAtOnce); };
  const auto scores_of = [&](int64_t head, int64_t part) {
    return Scores{args.key + head * steps * args.key_step_size + part * kKeysAtOnce * kTileDepth,
                  args.query + head * args.head_dim / 2 * kLanes, args.key_step_size, steps, tiles_of(keys_of(part))};
  };
  const auto multiply = [&](Numerators<V>& numerators, int64_t groups, const Scores& next) {
    if (steps == 1)
      numerators_and_next_scores<V, 1>(numerators, groups, next, scratch.scores);
    else if (steps == 2)
      numerators_and_next_scores<V, 2>(numerators, groups, next, scratch.scores);
    else
      numerators_and_next_scores<V, 0>(numerators, groups, next, scratch.scores);
  };
  // Scores that are none, after the last key of a sequence, become numerators of zero.
  const auto pad = [&](int64_t part) {
    const int64_t keys = keys_of(part);
    for (int64_t i = keys; i < round_up(keys, kTile); ++i)
      for (int v = 0; v < V; ++v) store(scratch.scores + i * kLanes + v * kTile, lowest);
  };

  Vec<float> inverse[V] = {};  // of the sums
  const auto write_out = [&](int64_t head) {
    bf16x2* to = args.out + head * args.head_dim / 2 * kLanes;
    const float* from = scratch.out;
    for (int64_t dim = 0; dim < args.head_dim; dim += 2, to += kLanes, from += 2 * kLanes)
      for (int v = 0; v < V; ++v)
        store_first(to + v * kTile, load(from + v * kTile) * inverse[v], load(from + kLanes + v * kTile) * inverse[v],
                    kTile);
  };
  Numerators<V> numerators{};
  Highest<V> highest{scratch.scores, 2 * tiles_of(keys_of(0)), {}};
  for (auto& value : highest.value) value = lowest;
  multiply(numerators, 0, scores_of(0, 0));
  pad(0);
  while (highest.left > 0) highest.piece_if_any();

  for (int64_t head = 0; head < args.heads; ++head)
    for (int64_t part = 0; part < parts; ++part) {
      const bool last = part + 1 == parts, end = last && head + 1 == args.heads;
      const int64_t groups = tiles_of(keys_of(part)), next_part = last ? 0 : part + 1;
      Scores next{};
      if (!end) next = scores_of(last ? head + 1 : head, next_part);
      numerators.scores = scratch.scores;
      numerators.to = scratch.numerators;
      for (int v = 0; v < V; ++v) {
        const Vec<float> before = numerators.highest[v];
        numerators.highest[v] = highest.value[v];
        if (part == 0) {
          numerators.sum[v] = Vec<float>(0.0f);
          continue;
        }
        const Vec<float> factor = exp2(before - highest.value[v]);
        numerators.sum[v] = numerators.sum[v] * factor;
        for (int64_t dim = 0; dim < args.head_dim; ++dim) {
          float* const to = scratch.out + dim * kLanes + v * kTile;
          store(to, load(to) * factor);
        }
      }
      multiply(numerators, groups, next);
      // Only now is the result of the head before surely in memory, which was stored from tiles.
      if (part == 0 && head > 0) write_out(head - 1);
      if (!end) pad(next_part);
      if (groups % 2 != 0)
        std::memset(static_cast<void*>(numerators.to), 0, static_cast<std::size_t>(kTile / 2 * kPanelRowBytes));

      highest = {scratch.scores, 2 * next.groups, {}};
      for (int v = 0; v < V; ++v) highest.value[v] = last ? lowest : numerators.highest[v];
      weigh_values_and_next_highest<V>(args.head_dim,
                                       args.value + part * (kKeysAtOnce / kTileDepth) * args.value_block_size +
                                           head * args.head_dim * kTileDepth,
                                       args.value_block_size, scratch.numerators, (groups + 1) / 2, part == 0,
                                       scratch.out, highest);
      for (int v = 0; v < V; ++v) inverse[v] = Vec<float>(1.0f) / numerators.sum[v];
    }
  write_out(args.heads - 1);
}

}  // namespace MVIT_ISA
}  // namespace mvit
