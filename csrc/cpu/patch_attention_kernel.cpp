// SPDX-License-Identifier: Apache-2.0
// Attention of one strand (one head of one patch-position sequence): softmax(scale · Q Kᵀ) V and its gradients.
// Queries, keys and values are read from the map in place and packed into scratch once per call; the map is never
// regrouped.
//
// Forward has queries in the lanes. Sᵀ = K Qᵀ is a (keys × queries) panel, so the maximum and the sum over keys need no
// horizontal reduction, and Oᵀ = Vᵀ Pᵀ wastes no lanes at any head dimension (with the head dimension in the lanes, 36
// would be padded to 48). Backward has keys in the lanes. The row statistics are known by then, so four of its five
// products (S, dP, dVᵀ, dKᵀ) waste no lanes; only dQ has the head dimension in the lanes.
#include "exponential.h"
#include "microkernel.h"
#include "panels.h"
#include "patch_attention.h"
#include "token_rows.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int64_t kKeyBlock = 128;   // 128 keys × 48 queries of scores are 24 KB; 64 to 256 keys are equally fast
constexpr int64_t kQueryBlock = 32;  // in backward, P and dS of 32 queries × 48 keys are 12 KB

enum Part { kQuery, kKey, kValue };

template <typename E>
MVIT_INLINE TokenRows<E> tokens_of(const PatchAttentionShape& shape, const Map& map, int64_t strand, int part) {
  const int64_t head = strand % shape.heads, sequence = strand / shape.heads;
  const int64_t position = sequence % shape.positions(), image = sequence / shape.positions();
  const int64_t h = position / shape.patch_width, w = position % shape.patch_width;
  E* first = static_cast<E*>(map.data) + image * map.image_stride + h * map.row_stride + w * map.column_stride +
             part * shape.inner() + head * shape.head_dim;
  return {first, shape.patch_height * map.row_stride, shape.patch_width * map.column_stride, shape.patch_columns};
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename T>
int64_t forward_scratch(const PatchAttentionShape& shape) {
  const int64_t ld = round_up(shape.head_dim, Vec<T>::size), lanes = kTileVectors * Vec<T>::size;
  return 2 * shape.tokens() * ld + (2 * ld + kKeyBlock + 1) * lanes;
}

// Computes Oᵀ (unnormalised), the maximum score and the sum of weights of V · size queries over all keys. Keys are
// processed in blocks with FlashAttention's running maximum: when a block raises the maximum, the previous sums are
// scaled down. Here and in backward, what does not know the elements in memory, E, is a function of T alone: float32 and
// bfloat16 share its code.
template <int V, typename T>
void attend(const T* queries, const T* keys, const T* values, int64_t tokens, int64_t head_dim, int64_t ld,
                        T* scores, T* out, Vec<T> (&maximum_score)[V], Vec<T> (&sum)[V]) {
  constexpr int64_t lanes = V * Vec<T>::size;
  for (int64_t begin = 0; begin < tokens; begin += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, tokens - begin);

    Vec<T> highest[V];
    for (int v = 0; v < V; ++v) highest[v] = Vec<T>(T(-__builtin_inf()));
    in_steps<kTileRows>(count, [&](auto rows, int64_t row) {
      constexpr int R = decltype(rows)::value;
      Vec<T> tile[R][V];
      clear(tile);
      multiply_add<R, V, Operand::row_major>(tile, keys + (begin + row) * ld, ld, queries, lanes, head_dim);
      store_tile(scores + row * lanes, lanes, tile);
      map_tile(tile, [&](Vec<T> x, int, int v) { return highest[v] = maximum(highest[v], x); });
    });

    Vec<T> block_sum[V];
    for (int v = 0; v < V; ++v) {
      if (begin > 0) highest[v] = maximum(maximum_score[v], highest[v]);
      block_sum[v] = Vec<T>(T(0));
    }
    for (int64_t row = 0; row < count; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        T* p = scores + row * lanes + v * Vec<T>::size;
        const Vec<T> weight = exp(load(p) - highest[v]);
        block_sum[v] = block_sum[v] + weight;
        store(p, weight);
      }

    Vec<T> factor[V];
    for (int v = 0; v < V; ++v) {
      factor[v] = begin == 0 ? Vec<T>(T(0)) : exp(maximum_score[v] - highest[v]);
      sum[v] = fma(sum[v], factor[v], block_sum[v]);
      maximum_score[v] = highest[v];
    }

    in_steps<kTileRows>(head_dim, [&](auto rows, int64_t row) {
      constexpr int R = decltype(rows)::value;
      Vec<T> tile[R][V];
      clear(tile);
      multiply_add<R, V, Operand::column_major>(tile, values + begin * ld + row, ld, scores, lanes, count);
      if (begin > 0)
        map_tile(tile, [&](Vec<T> x, int r, int v) {
          return fma(load(out + (row + r) * lanes + v * Vec<T>::size), factor[v], x);
        });
      store_tile(out + row * lanes, lanes, tile);
    });
  }
}

template <typename T, typename E>
void forward(const PatchAttentionForward& args, int64_t strand, int64_t begin, int64_t end, void* scratch) {
  const PatchAttentionShape& shape = args.shape;
  const int64_t tokens = shape.tokens(), head_dim = shape.head_dim;
  const int64_t ld = round_up(head_dim, Vec<T>::size);
  constexpr int64_t most_lanes = kTileVectors * Vec<T>::size;
  T* keys = static_cast<T*>(scratch);
  T* values = keys + tokens * ld;
  T* queries = values + tokens * ld;
  T* out = queries + ld * most_lanes;
  T* scores = out + ld * most_lanes;
  T* normaliser = scores + kKeyBlock * most_lanes;
  const auto query_tokens = tokens_of<const E>(shape, args.qkv, strand, kQuery);
  const auto out_tokens = tokens_of<E>(shape, args.out, strand, 0);
  T* logsumexp = static_cast<T*>(args.logsumexp) + strand * tokens;
  const Vec<T> one(T(1)), scale(T(shape.scale));

  pack_rows(keys, ld, tokens_of<const E>(shape, args.qkv, strand, kKey), 0, tokens, head_dim, one);
  pack_rows(values, ld, tokens_of<const E>(shape, args.qkv, strand, kValue), 0, tokens, head_dim, one);
  in_lane_blocks<T>(begin, end, [&](auto vectors, int64_t first, int64_t present) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t lanes = V * Vec<T>::size;
    Vec<T> maximum_score[V] = {}, sum[V] = {};
    pack_columns(queries, lanes, query_tokens, first, present, head_dim, scale);
    attend<V>(queries, keys, values, tokens, head_dim, ld, scores, out, maximum_score, sum);
    for (int v = 0; v < V; ++v) {
      store(normaliser + v * Vec<T>::size, Vec<T>(T(1)) / sum[v]);
      const int64_t at = v * Vec<T>::size;
      if (at < present)
        store_first(logsumexp + first + at, maximum_score[v] + log(sum[v]),
                    static_cast<int>(smaller(Vec<T>::size, present - at)));
    }
    unpack_columns(out_tokens, first, present, head_dim, out, lanes, normaliser);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T>
int64_t backward_scratch(const PatchAttentionShape& shape) {
  const int64_t ld = round_up(shape.head_dim, Vec<T>::size), lanes = kTileVectors * Vec<T>::size;
  return 4 * shape.tokens() * ld + round_up(shape.tokens(), Vec<T>::size) +
         (4 * ld + 2 * kQueryBlock + 1) * lanes;
}

template <typename T>
struct BackwardScratch {
  int64_t ld;
  T *queries, *keys, *grad_out, *grad_queries;              // [tokens][ld]
  T* delta;                                                 // [tokens]
  T *keys_t, *values_t, *grad_keys_t, *grad_values_t;       // [ld][lanes]
  T *weights, *grad_scores;                                 // [kQueryBlock][lanes]
  T* factor;                                                // [lanes]

  BackwardScratch(const PatchAttentionShape& shape, void* memory) : ld(round_up(shape.head_dim, Vec<T>::size)) {
    constexpr int64_t most_lanes = kTileVectors * Vec<T>::size;
    const int64_t tokens = shape.tokens();
    queries = static_cast<T*>(memory);
    keys = queries + tokens * ld;
    grad_out = keys + tokens * ld;
    grad_queries = grad_out + tokens * ld;
    delta = grad_queries + tokens * ld;
    keys_t = delta + round_up(tokens, Vec<T>::size);
    values_t = keys_t + ld * most_lanes;
    grad_keys_t = values_t + ld * most_lanes;
    grad_values_t = grad_keys_t + ld * most_lanes;
    weights = grad_values_t + ld * most_lanes;
    grad_scores = weights + kQueryBlock * most_lanes;
    factor = grad_scores + kQueryBlock * most_lanes;
  }
};

// The gradients of `present` keys and values from `first` on, in V vectors of lanes, and their share of those of queries.
// With P = exp(S - logsumexp) and delta = rowsum(dO ∘ O):
//   dS = P ∘ (dO Vᵀ - delta),  dQ = scale · dS K,  dK = dSᵀ (scale · Q),  dV = Pᵀ dO.
// Queries are scaled as in forward, so S is bit-identical to forward's and its rounding error cancels in P.
template <int V, typename T>
void backward_lanes(const BackwardScratch<T>& scratch, const T* logsumexp, int64_t tokens, int64_t head_dim,
                    int64_t first, int64_t present) {
  constexpr int64_t lanes = V * Vec<T>::size;
  const int64_t ld = scratch.ld;
  const T *keys = scratch.keys, *delta = scratch.delta, *keys_t = scratch.keys_t, *values_t = scratch.values_t;
  T *grad_queries = scratch.grad_queries, *weights = scratch.weights, *grad_scores = scratch.grad_scores;
  for (int64_t begin = 0; begin < tokens; begin += kQueryBlock) {
    const int64_t count = smaller(kQueryBlock, tokens - begin);
    const T* q = scratch.queries + begin * ld;
    const T* go = scratch.grad_out + begin * ld;

    in_steps<kTileRows>(count, [&](auto rows, int64_t row) {  // P and dS
      constexpr int R = decltype(rows)::value;
      Vec<T> tile[R][V];
      clear(tile);
      multiply_add<R, V, Operand::row_major>(tile, q + row * ld, ld, keys_t, lanes, head_dim);
      map_tile(tile, [&](Vec<T> x, int r, int) { return exp(x - Vec<T>(logsumexp[begin + row + r])); });
      store_tile(weights + row * lanes, lanes, tile);
      clear(tile);
      multiply_add<R, V, Operand::row_major>(tile, go + row * ld, ld, values_t, lanes, head_dim);
      map_tile(tile, [&](Vec<T> x, int r, int v) {
        return (x - Vec<T>(delta[begin + row + r])) * load(weights + (row + r) * lanes + v * Vec<T>::size);
      });
      store_tile(grad_scores + row * lanes, lanes, tile);
    });
    // The weight of a lone token is 1 whatever its score, so dS must be exactly 0; dO V and delta round differently.
    if (tokens == 1)
      for (int64_t i = 0; i < lanes; ++i) grad_scores[i] *= 0;

    // sum[c] += Σ_i rows_of[i][c] · panel[i]
    const auto add_product = [&](T* sum, const T* rows_of, const T* panel) {
      in_steps<kTileRows>(head_dim, [&](auto rows, int64_t row) {
        constexpr int R = decltype(rows)::value;
        Vec<T> tile[R][V];
        clear(tile);
        multiply_add<R, V, Operand::column_major>(tile, rows_of + row, ld, panel, lanes, count);
        if (begin > 0) add_tile(tile, sum + row * lanes, lanes);
        store_tile(sum + row * lanes, lanes, tile);
      });
    };
    add_product(scratch.grad_values_t, go, weights);
    add_product(scratch.grad_keys_t, q, grad_scores);

    in_steps<kTileRows>(count, [&](auto rows, int64_t row) {  // dQ; sums only over the keys that exist
      constexpr int R = decltype(rows)::value;
      in_steps<kTileVectors>(ld / Vec<T>::size, [&](auto columns, int64_t column) {
        constexpr int C = decltype(columns)::value;
        T* sum = grad_queries + (begin + row) * ld + column * Vec<T>::size;
        Vec<T> tile[R][C];
        clear(tile);
        multiply_add<R, C, Operand::row_major>(tile, grad_scores + row * lanes, lanes,
                                               keys + first * ld + column * Vec<T>::size, ld, present);
        if (first > 0) add_tile(tile, sum, ld);
        store_tile(sum, ld, tile);
      });
    });
  }
}

template <typename T, typename E>
void backward(const PatchAttentionBackward& args, int64_t strand, void* memory) {
  const PatchAttentionShape& shape = args.shape;
  const int64_t tokens = shape.tokens(), head_dim = shape.head_dim;
  const BackwardScratch<T> scratch(shape, memory);
  const int64_t ld = scratch.ld;
  const auto key_tokens = tokens_of<const E>(shape, args.qkv, strand, kKey);
  const auto value_tokens = tokens_of<const E>(shape, args.qkv, strand, kValue);
  const auto grad_key_tokens = tokens_of<E>(shape, args.grad_qkv, strand, kKey);
  const auto grad_value_tokens = tokens_of<E>(shape, args.grad_qkv, strand, kValue);
  const T* logsumexp = static_cast<const T*>(args.logsumexp) + strand * tokens;
  const Vec<T> one(T(1)), scale(T(shape.scale));

  pack_rows(scratch.queries, ld, tokens_of<const E>(shape, args.qkv, strand, kQuery), 0, tokens, head_dim, scale);
  pack_rows(scratch.keys, ld, key_tokens, 0, tokens, head_dim, one);
  pack_rows(scratch.grad_out, ld, tokens_of<const E>(shape, args.grad_out, strand, 0), 0, tokens, head_dim, one);
  tokens_of<const E>(shape, args.out, strand, 0).for_each(0, tokens, [&](const E* out, int64_t i) {
    Vec<T> dot(T(0));
    for (int64_t c = 0; c < head_dim; c += Vec<T>::size)
      dot = fma(load(scratch.grad_out + i * ld + c),
                load_first(out + c, static_cast<int>(smaller(Vec<T>::size, head_dim - c))), dot);
    scratch.delta[i] = sum(dot);
  });

  in_lane_blocks<T>(0, tokens, [&](auto vectors, int64_t first, int64_t present) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t lanes = V * Vec<T>::size;
    pack_columns(scratch.keys_t, lanes, key_tokens, first, present, head_dim, one);
    pack_columns(scratch.values_t, lanes, value_tokens, first, present, head_dim, one);
    backward_lanes<V>(scratch, logsumexp, tokens, head_dim, first, present);
    for (int64_t i = 0; i < lanes; i += Vec<T>::size) store(scratch.factor + i, one);
    unpack_columns(grad_value_tokens, first, present, head_dim, scratch.grad_values_t, lanes, scratch.factor);
    unpack_columns(grad_key_tokens, first, present, head_dim, scratch.grad_keys_t, lanes, scratch.factor);
  });
  unpack_rows(tokens_of<E>(shape, args.grad_qkv, strand, kQuery), 0, tokens, head_dim, scratch.grad_queries, ld, scale);
}

}  // namespace MVIT_ISA

extern const PatchAttentionKernels MVIT_TABLE(patch_attention) = {
    {MVIT_ISA::forward_scratch<float>, MVIT_ISA::forward_scratch<float>, MVIT_ISA::forward_scratch<double>},
    {MVIT_ISA::backward_scratch<float>, MVIT_ISA::backward_scratch<float>, MVIT_ISA::backward_scratch<double>},
    {MVIT_ISA::forward<float, float>, MVIT_ISA::forward<float, MVIT_ISA::bfloat16>, MVIT_ISA::forward<double, double>},
    {MVIT_ISA::backward<float, float>, MVIT_ISA::backward<float, MVIT_ISA::bfloat16>,
     MVIT_ISA::backward<double, double>},
};

}  // namespace mvit
