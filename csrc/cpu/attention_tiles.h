// SPDX-License-Identifier: Apache-2.0
// Attention on matrix tiles (tiles.h), with queries in the lanes: Sᵀ = K Qᵀ, the softmax down its columns, Oᵀ = Vᵀ Pᵀ.
//
// What takes time are the exponentials. While matrix tiles are in use, a core multiplies vectors (also fma, maximum,
// reduce, scalef, conversions) on one port instead of two; additions, logic and shuffles keep both. So products hide
// behind exponentials, of which as little as possible is left. As bfloat16 has the exponents of float32, 2^score is as
// exact as 2^(score - highest): scores are shifted only where the highest is far from zero (`Shift`). Row sums come from
// the products: a row of ones follows the values of each head.
#pragma once

#include "tiles.h"
#include "token_lanes.h"

namespace mvit {
namespace MVIT_ISA {

// Scores of 64 keys × 32 queries are 8 KB, as are their numerators, twice. With 128 keys, these and what comes from L2, 14
// or 28 KB of keys and values, do not share an L1 (a tenth slower). Longer sequences take several times as many keys,
// counted from the sequence's start.
constexpr int64_t kKeysAtOnce = 64;

MVIT_INLINE int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }
MVIT_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
// Rows of a head's values: its dims, the ones, and zeros up to whole tiles.
MVIT_INLINE int64_t value_rows_of(int64_t head_dim) { return tiles_of(head_dim + 1) * kTile; }

// Up to 32 queries of one sequence, in one block, and its keys and values, in all heads.
struct AttentionArgs {
  int64_t tokens, heads, head_dim;
  // [heads · head_dim / 2 pairs, and finite ones up to a whole step][kLanes], scaled by log2(e) / sqrt(head_dim)
  const bf16x2* query;
  const bfloat16* key;      // [heads][steps of 32 dims][key_step_size / 32][32]: a key a row, zero after its last dim
  const bfloat16* value;    // [blocks of 32 keys][heads][value_rows_of(head_dim)][32], zero after the last key
  int64_t key_step_size, value_block_size;  // elements
  bf16x2* out;              // [heads · head_dim / 2 pairs][kLanes]
};

struct AttentionScratch {
  float* scores;           // [kKeysAtOnce][kLanes]
  bf16x2* numerators[2];   // [kKeysAtOnce / 2][kLanes]
  float* out;              // [value_rows_of(head_dim)][kLanes]
};

constexpr int64_t kPanelRowBytes = kLanes * 4;  // of float32 and of pairs

// The pair {first, second} of values rounded to bfloat16 by dropping their lower halves.
MVIT_INLINE __m512i upper_halves(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return _mm512_mask_shuffle_epi8((__m512i)second.native, 0x3333333333333333, (__m512i)first.native, order);
}

// Tables of exp2_to_round, by j: constants, with half a unit of bfloat16 in [1, 2), and slopes.
alignas(64) constexpr float kPowers[16] = {
    1.003789f, 1.0480576f, 1.0942861f, 1.1425613f, 1.1929739f, 1.2456183f, 1.3005937f, 1.3580029f, 1.417954f,
    1.4805592f, 1.5459362f, 1.6142076f, 1.6855018f, 1.7599524f, 1.8376992f, 1.9188882f};
alignas(64) constexpr float kSlopes[16] = {
    0.70829743f, 0.73965645f, 0.77240384f, 0.80660105f, 0.84231234f, 0.8796047f, 0.9185481f, 0.9592157f, 1.0016838f,
    1.0460322f, 1.0923439f, 1.1407062f, 1.1912096f, 1.2439489f, 1.2990233f, 1.3565359f};

// x = 2^x, such that to drop the lower half is to round to bfloat16: 2^floor(x) · 2^(j/16) · 2^r, where 2^r on [0, 1/16) is
// linear to within 1.2e-4, and half a unit is added to what is in [1, 2). Three instructions need the one multiplier; a
// cubic polynomial instead of the tables would need five. All vectors go through each operation together: one after
// another, they would wait in the scheduler for their own results.
template <int N>
MVIT_INLINE void exp2_to_round(Vec<float> (&x)[N]) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 round = _mm512_set1_ps(0x1.8p19f);
  Vec<float> rest[N], p[N];
  __m512i j[N];  // in the low bits
#define MVIT_EACH _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i)
  MVIT_EACH j[i] = (__m512i)_mm512_maskz_add_round_ps(-1, x[i].native, round, kDown);
  MVIT_EACH rest[i] = Vec<float>(_mm512_maskz_reduce_ps(-1, x[i].native, 4 << 4 | _MM_FROUND_TO_NEG_INF));
  MVIT_EACH p[i] = Vec<float>(_mm512_maskz_permutexvar_ps(-1, j[i], _mm512_load_ps(kSlopes)));
  MVIT_EACH j[i] = (__m512i)_mm512_maskz_permutexvar_ps(-1, j[i], _mm512_load_ps(kPowers));
  MVIT_EACH p[i] = fma(p[i], rest[i], Vec<float>((__m512)j[i]));
  MVIT_EACH x[i] = Vec<float>(_mm512_maskz_scalef_ps(-1, p[i].native, x[i].native));
#undef MVIT_EACH
}

// What is subtracted from the scores of V vectors of queries in a head. Each query decides for itself, so that what shares
// a vector with it makes no difference.
template <int V>
struct Shift {
  bool any;      // of them is not zero
  bool changed;  // at the last keys: what was summed before is to be multiplied with `factors`
  alignas(64) float shifts[kLanes];
  alignas(64) float factors[kLanes];

  // For the scores of the next `rows` keys, or of a head's first. A query's shift stays while the highest is at most
  // kNear above it, and at first also not further below zero, so that sums are from 2^-kNear to tokens · 2^kNear: their
  // products with values from 2^-60 to 2^50 are normal numbers. Else it becomes the highest.
  MVIT_INLINE void update(const float* scores, int64_t rows, bool first) {
    if (first) any = false;
    changed = false;
    Vec<float> highest[V];
    uint32_t far = 0;
    find_highest(scores, rows, highest);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const __m512 above = first ? _mm512_abs_ps(highest[v].native) : (highest[v] - shift(v)).native;
      far |= static_cast<uint32_t>(_mm512_cmp_ps_mask(above, _mm512_set1_ps(kNear), _CMP_NLE_UQ)) << (v * kTile);
    }
    if (far != 0) move(highest, far, first);
  }

 private:
  static constexpr float kNear = 64.0f;

  MVIT_INLINE Vec<float> shift(int v) const { return any ? load(shifts + v * kTile) : Vec<float>(0.0f); }

  // Of each query. Four chains a vector hide the latency of a maximum.
  static MVIT_INLINE void find_highest(const float* scores, int64_t rows, Vec<float> (&highest)[V]) {
    Vec<float> most[4][V];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) most[i][v] = load(scores + i * kLanes + v * kTile);
    for (const float *row = scores + 4 * kLanes, *end = scores + rows * kLanes; row < end; row += 4 * kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) most[i][v] = maximum(most[i][v], load(row + i * kLanes + v * kTile));
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      highest[v] = maximum(maximum(most[0][v], most[1][v]), maximum(most[2][v], most[3][v]));
  }

  MVIT_INLINE void move(const Vec<float> (&highest)[V], uint32_t far, bool first) {
    for (int v = 0; v < V; ++v) {
      const __mmask16 moved = static_cast<__mmask16>(far >> (v * kTile));
      const Vec<float> before = shift(v), factor = exp2(before - highest[v]);
      store(factors + v * kTile, Vec<float>(_mm512_mask_blend_ps(moved, _mm512_set1_ps(1.0f), factor.native)));
      store(shifts + v * kTile, Vec<float>(_mm512_mask_blend_ps(moved, before.native, highest[v].native)));
    }
    any = true;
    changed = !first;
  }
};

// Numerators 2^(score - shift) of up to kKeysAtOnce keys and V vectors of queries, in pieces of four vectors, as long as
// there are any.
template <int V, bool kShifted>
struct Numerators {
  static constexpr int kPairs = 2 / V;  // of keys, in a piece

  const float* scores;
  bf16x2* to;
  int64_t left;
  const float* shifts;

  MVIT_INLINE void run(int64_t pieces) {
    if (pieces > left) pieces = left;
    left -= pieces;
    for (; pieces > 0; --pieces) run_one();
  }

 private:
  MVIT_INLINE void run_one() {
    constexpr int N = 4;
    Vec<float> x[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) x[i] = load(scores + (i / (2 * V) * 2 + i % 2) * kLanes + i / 2 % V * kTile);
    if constexpr (kShifted)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) x[i] = x[i] - load(shifts + i / 2 % V * kTile);
    exp2_to_round(x);
#pragma GCC unroll 2
    for (int i = 0; i < N; i += 2) {
      const __m512i pairs = upper_halves(x[i], x[i + 1]);
      std::memcpy(to + i / (2 * V) * kLanes + i / 2 % V * kTile, &pairs, sizeof pairs);
    }
    scores += 2 * kPairs * kLanes;
    to += kPairs * kLanes;
  }
};

// The products of a head's scores: `groups` of 16 keys.
struct Scores {
  const bfloat16* key;
  const bf16x2* query;
  int64_t key_step_size, steps, groups;
};

template <int V, int first>
MVIT_INLINE void load_queries(const bf16x2* query) {
  load_tile<first>(query, kPanelRowBytes);
  if constexpr (V > 1) load_tile<first + 1>(query + kTile, kPanelRowBytes);
}

// Multiplies scores, while what was in their place becomes numerators, `each` pieces a step. A tile load costs as much
// as half a product, so queries stay in tiles if they fit: kSteps is the number of steps, or 0 for any.
template <int V, int kSteps, bool kShifted>
__attribute__((noinline)) void multiply_scores(const Scores& scores, float* to, Numerators<V, kShifted>& numerators,
                                               int64_t each) {
  const Scores of = scores;
  Numerators<V, kShifted> pieces = numerators;
  const bfloat16* key = of.key;
  if constexpr (kSteps > 0) load_queries<V, 4>(of.query);
  if constexpr (kSteps > 1) load_queries<V, 6>(of.query + kTile * kLanes);
  for (int64_t group = 0; group < of.groups; ++group, key += kTile * kTileDepth) {
    zero_tile<0>();
    if constexpr (V > 1) zero_tile<1>();
    if constexpr (kSteps > 0) {
      load_tile<2>(key, 64);
      multiply_add_tiles<0, 2, 4>();
      if constexpr (V > 1) multiply_add_tiles<1, 2, 5>();
      pieces.run(each);
    }
    if constexpr (kSteps > 1) {
      load_tile<3>(key + of.key_step_size, 64);
      multiply_add_tiles<0, 3, 6>();
      if constexpr (V > 1) multiply_add_tiles<1, 3, 7>();
      pieces.run(each);
    }
    if constexpr (kSteps == 0)
      for (int64_t k = 0; k < of.steps; ++k) {
        load_queries<V, 4>(of.query + k * kTile * kLanes);
        load_tile<2>(key + k * of.key_step_size, 64);
        multiply_add_tiles<0, 2, 4>();
        if constexpr (V > 1) multiply_add_tiles<1, 2, 5>();
        pieces.run(each);
      }
    float* const next = to + kTile * kLanes;
    while (pieces.left > 0 && pieces.scores < next) pieces.run(1);
    store_tile<0>(to, kPanelRowBytes);
    if constexpr (V > 1) store_tile<1>(to + kTile, kPanelRowBytes);
    to = next;
  }
  numerators = pieces;
}

// The products of a head's numerators and values over `steps` blocks of 32 keys.
struct Weighted {
  const bfloat16* value;
  int64_t value_block_size;
  const bf16x2* numerators;
  int64_t steps;
  bool first;  // of the sequence: else they are added to
};

// M tiles of dims of `out`, with `each` pieces of other numerators a step and tile.
template <int V, int M, bool kShifted>
MVIT_INLINE void weigh_tiles(const Weighted& of, int64_t dim, float* out, Numerators<V, kShifted>& pieces, int64_t each) {
  constexpr int64_t tile = kTile * kTileDepth;
  const bf16x2* numerators = of.numerators;
  const bfloat16* value = of.value + dim * kTileDepth;
  out += dim * kLanes;
  if (of.first) {
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
  for (int64_t k = 0; k < of.steps; ++k) {
    load_tile<6>(numerators, kPanelRowBytes);
    load_tile<4>(value, 64);
    multiply_add_tiles<0, 4, 6>();
    if constexpr (V > 1) {
      load_tile<7>(numerators + kTile, kPanelRowBytes);
      multiply_add_tiles<1, 4, 7>();
    }
    pieces.run(each);
    if constexpr (M > 1) {
      load_tile<5>(value + tile, 64);
      multiply_add_tiles<2, 5, 6>();
      if constexpr (V > 1) multiply_add_tiles<3, 5, 7>();
      pieces.run(each);
    }
    numerators += kTile * kLanes;
    value += of.value_block_size;
  }
  store_tile<0>(out, kPanelRowBytes);
  if constexpr (V > 1) store_tile<1>(out + kTile, kPanelRowBytes);
  if constexpr (M > 1) store_tile<2>(out + kTile * kLanes, kPanelRowBytes);
  if constexpr (M > 1 && V > 1) store_tile<3>(out + kTile * kLanes + kTile, kPanelRowBytes);
}

template <int V, bool kShifted>
__attribute__((noinline)) void weigh_values(const Weighted& weighted, int64_t rows, float* out,
                                            Numerators<V, kShifted>& numerators, int64_t each) {
  const Weighted of = weighted;
  Numerators<V, kShifted> pieces = numerators;
  int64_t dim = 0;
  for (; dim + kTile < rows; dim += 2 * kTile) weigh_tiles<V, 2>(of, dim, out, pieces, each);
  if (dim < rows) weigh_tiles<V, 1>(of, dim, out, pieces, each);
  numerators = pieces;
}

// Attention of all heads for V vectors of queries. Configured tiles are those of `Tiles`.
template <int V>
MVIT_INLINE void attend_on_tiles(const AttentionArgs& args, const AttentionScratch& scratch) {
  constexpr int64_t kGroups = kKeysAtOnce / kTile, kPieces = kTile / 2 / Numerators<V, false>::kPairs;  // of a group
  const int64_t steps = steps_of(args.head_dim), rows = value_rows_of(args.head_dim);
  const auto slots_share = [](int64_t slots) { return (kGroups * kPieces / 2 + slots - 1) / slots; };
  const int64_t each_score = slots_share(kGroups * steps), each_value = slots_share(kGroups / 2 * (rows / kTile));
  const auto groups_from = [&](int64_t key) { return tiles_of(smaller(kKeysAtOnce, args.tokens - key)); };

  // While numerators of some keys are made, the products of the values before and of the next scores.
  Scores next{args.key, args.query, args.key_step_size, steps, groups_from(0)};
  Weighted before{};
  const auto multiply_next = [&](auto& numerators) {
    if (steps == 1)
      multiply_scores<V, 1>(next, scratch.scores, numerators, each_score);
    else if (steps == 2)
      multiply_scores<V, 2>(next, scratch.scores, numerators, each_score);
    else
      multiply_scores<V, 0>(next, scratch.scores, numerators, each_score);
  };
  const auto make = [&](auto numerators, bool any_next) {
    if (before.steps > 0) weigh_values<V>(before, rows, scratch.out, numerators, each_value);
    if (any_next) multiply_next(numerators);
    numerators.run(numerators.left);
  };
  bf16x2* out = args.out;
  const auto write_out = [&] {
    Vec<float> inverse[V];
    for (int v = 0; v < V; ++v) inverse[v] = Vec<float>(1.0f) / load(scratch.out + args.head_dim * kLanes + v * kTile);
    const float* from = scratch.out;
    for (int64_t dim = 0; dim < args.head_dim; dim += 2, out += kLanes, from += 2 * kLanes)
      for (int v = 0; v < V; ++v)
        store_first(out + v * kTile, load(from + v * kTile) * inverse[v], load(from + kLanes + v * kTile) * inverse[v],
                    kTile);
  };

  Shift<V> shift;
  Numerators<V, false> none{};
  multiply_next(none);
  for (int64_t head = 0, unit = 0; head < args.heads; ++head) {
    const bfloat16* value = args.value + head * rows * kTileDepth;
    for (int64_t key = 0; key < args.tokens; key += kKeysAtOnce, ++unit) {
      const int64_t groups = next.groups, rows_of_scores = groups * kTile;
      bf16x2* const to = scratch.numerators[unit % 2];
      const Vec<float> never(-__builtin_inff());  // attended: keys after the last
      for (int64_t row = args.tokens - key; row < rows_of_scores; ++row)
        for (int v = 0; v < V; ++v) store(scratch.scores + row * kLanes + v * kTile, never);
      shift.update(scratch.scores, rows_of_scores, key == 0);

      const bool more = key + kKeysAtOnce < args.tokens;
      const int64_t next_head = more ? head : head + 1, next_key = more ? key + kKeysAtOnce : 0;
      next.key = args.key + next_head * steps * args.key_step_size + next_key * kTileDepth;
      next.query = args.query + next_head * args.head_dim / 2 * kLanes;
      next.groups = groups_from(next_key);
      if (shift.any)
        make(Numerators<V, true>{scratch.scores, to, groups * kPieces, shift.shifts}, next_head < args.heads);
      else
        make(Numerators<V, false>{scratch.scores, to, groups * kPieces, nullptr}, next_head < args.heads);
      if (groups % 2 != 0)
        std::memset(static_cast<void*>(to + groups * kTile / 2 * kLanes), 0,
                    static_cast<std::size_t>(kTile / 2 * kPanelRowBytes));
      // Only now is surely in memory what was stored from tiles.
      if (key == 0 && head > 0) write_out();
      if (shift.changed)
        for (float* row = scratch.out; row < scratch.out + rows * kLanes; row += kLanes)
          for (int v = 0; v < V; ++v)
            store(row + v * kTile, load(row + v * kTile) * load(shift.factors + v * kTile));
      before = {value, args.value_block_size, to, (groups + 1) / 2, key == 0};
      value += kKeysAtOnce / kTileDepth * args.value_block_size;
    }
  }
  weigh_values<V>(before, rows, scratch.out, none, 0);
  write_out();
}

}  // namespace MVIT_ISA
}  // namespace mvit
