// SPDX-License-Identifier: Apache-2.0
// The whole transformer stack on a unit of sequences, in token lanes (see token_lanes.h). The map's rows are read once
// and written once.
//
// A layer is two steps over the blocks of 32 tokens. The first normalises and projects to q, k and v, which attention
// needs for all blocks of a sequence. The second does everything else block by block, so that the attention output, the
// normalised rows and the MLP's hidden rows stay in L1 and L2. Attention has queries in the lanes: the softmax over
// Sᵀ = K Qᵀ needs no horizontal sum, Oᵀ = Vᵀ Pᵀ wastes no lanes at any head dimension, and O is already in the layout
// of the out-projection's operand.
#include "transformer_units.h"

#if defined(MVIT_TILES)
#include "transformer_tiles.h"
#endif

namespace mvit {
namespace MVIT_ISA {

// Scores of 128 keys × 32 queries are 16 KB. Key blocks are counted from the start of the sequence, wherever it is in
// its unit, so the result does not depend on how sequences are grouped.
constexpr int64_t kKeys = 128;
constexpr int kKeyRows = kTileRows >= 8 ? 8 : 4;

// Vectors of queries that start at the last multiple of kSequenceStep read past their row and, in the worst case, past
// the end of the buffer.
constexpr int64_t kSlack = 2 * kLanes;

template <typename P>
struct Unit {
  using T = typename P::Value;
  T* rows;                      // [block][round_up(width, 16)][kLanes]: the residual stream
  typename P::Operand* query;   // [block][rows(inner)][kLanes], scaled by log2(e) / sqrt(head_dim)
  typename P::Operand* key;     // the same
  typename P::Weight* value;    // [block][inner][kLanes]: the left operand of Oᵀ = Vᵀ Pᵀ
  int64_t rows_size, operand_size;  // elements per block

  Unit(const TransformerShape& shape, int64_t blocks, void* memory) {
    rows_size = stream_size(shape);
    operand_size = P::rows(shape.inner()) * kLanes;
    rows = static_cast<T*>(memory);
    query = reinterpret_cast<typename P::Operand*>(rows + blocks * rows_size + kSlack);
    key = query + blocks * operand_size + kSlack;
    value = reinterpret_cast<typename P::Weight*>(key + blocks * operand_size + kSlack);
  }
  static std::size_t bytes(const TransformerShape& shape, int64_t blocks) {
    const Unit unit(shape, blocks, nullptr);
    return reinterpret_cast<std::size_t>(unit.value + blocks * shape.inner() * kLanes + kSlack);
  }
};

template <typename P>
struct Scratch {
  using T = typename P::Value;
  T* panel;                       // [round_up(width, 16)][kLanes]
  T* scores;                      // [kKeys][kLanes]
  T* out;                         // [head_dim][kLanes]
  typename P::Operand* weights;   // [rows(kKeys)][kLanes]: numerators of the softmax
  typename P::Operand* normalised;  // [rows(width)][kLanes]
  typename P::Operand* attention;   // [rows(inner)][kLanes]
  typename P::Operand* hidden;      // [rows(hidden)][kLanes]
  std::size_t end;

  Scratch(const TransformerShape& shape, void* memory) {
    panel = static_cast<T*>(memory);
    scores = panel + round_up(shape.width, 16) * kLanes;
    out = scores + kKeys * kLanes;
    weights = reinterpret_cast<typename P::Operand*>(out + shape.head_dim * kLanes);
    normalised = weights + P::rows(kKeys) * kLanes;
    attention = normalised + P::rows(shape.width) * kLanes;
    hidden = attention + P::rows(shape.inner()) * kLanes;
    end = reinterpret_cast<std::size_t>(hidden + P::rows(shape.hidden) * kLanes);
  }
};

// ---- the steps ------------------------------------------------------------------------------------------------------

template <typename P>
MVIT_INLINE void project_qkv(const TransformerShape& shape, const TransformerLayer& layer, int64_t sequences,
                             int64_t block, const Unit<P>& unit, const Scratch<P>& scratch) {
  using T = typename P::Value;
  const int64_t lanes = used_lanes(shape, sequences, block), inner = shape.inner(), width = shape.width;
  const auto* weight = static_cast<const typename P::Weight*>(layer.qkv_weight);
  layer_norm<P>(scratch.normalised, unit.rows + block * unit.rows_size, width, layer.norm1_weight, layer.norm1_bias,
                shape.eps, round_up(lanes, Vec<T>::size));
  const Vec<T> scale(static_cast<T>(1.44269504088896340736 / __builtin_sqrt(static_cast<double>(shape.head_dim))));
  const auto part = [&](int64_t index, const auto& write) {
    const T* bias = layer.qkv_bias == nullptr ? nullptr : layer.qkv_bias + index * inner;
    product<P>(weight + index * inner * width, width, scratch.normalised, inner, width, lanes,
               [&](auto& tile, int64_t row, int64_t lane) {
                 add_bias(tile, bias, row);
                 write(tile, row, lane);
               });
  };
  part(0, [&](auto& tile, int64_t row, int64_t lane) {
    map_tile(tile, [&](Vec<T> x, int, int) { return x * scale; });
    store_operand(unit.query + block * unit.operand_size, kLanes, row, lane, kLanes - lane, tile);
  });
  part(1, [&](auto& tile, int64_t row, int64_t lane) {
    store_operand(unit.key + block * unit.operand_size, kLanes, row, lane, kLanes - lane, tile);
  });
  part(2, [&](auto& tile, int64_t row, int64_t lane) {
    map_tile(tile, [&](Vec<T> x, int r, int v) {
      store_first(unit.value + (block * inner + row + r) * kLanes + lane + v * Vec<T>::size, x, Vec<T>::size);
      return x;
    });
  });
  // An odd last key is paired with a lane that holds no token and has weight zero. Its value must be zero too: the row
  // of zeros may have become NaN (if eps is 0).
  if (P::kStep > 1 && shape.tokens() % 2 != 0)
    for_each_run(shape, sequences, block, [&](int64_t, int64_t first, int64_t count, int64_t lane) {
      if (first + count == shape.tokens())
        for (int64_t c = 0; c < inner; ++c) unit.value[(block * inner + c) * kLanes + lane + count] = {};
    });
}

// Attention of one head for `count` (at most V · size) queries of one sequence, in one block starting at `lane`.
template <int V, typename P>
MVIT_INLINE void attend(const TransformerShape& shape, int64_t head, int64_t sequence, int64_t block, int64_t lane,
                        int64_t count, const Unit<P>& unit, const Scratch<P>& scratch) {
  using T = typename P::Value;
  constexpr int64_t size = Vec<T>::size;
  const int64_t first_key = sequence * sequence_lanes(shape), tokens = shape.tokens(), head_dim = shape.head_dim;
  const int64_t operand_row = P::rows(head * head_dim);
  const auto* query = unit.query + block * unit.operand_size + operand_row * kLanes + lane;
  Vec<T> highest[V] = {}, sum[V] = {};

  for (int64_t begin = 0; begin < tokens; begin += kKeys) {
    const int64_t keys = smaller(kKeys, tokens - begin);
    // piece(block, lane in it, first key, keys) for each run of keys in one block
    const auto for_each_piece = [&](const auto& piece) {
      for (int64_t key = 0; key < keys;) {
        const int64_t at = first_key + begin + key, in_block = smaller(keys - key, kLanes - at % kLanes);
        piece(at / kLanes, at % kLanes, key, in_block);
        key += in_block;
      }
    };

    Vec<T> block_highest[V], block_sum[V];
    for (int v = 0; v < V; ++v) block_highest[v] = begin > 0 ? highest[v] : Vec<T>(T(-__builtin_inf()));
    for_each_piece([&](int64_t key_block, int64_t key_lane, int64_t first, int64_t in_block) {
      const auto* key = unit.key + key_block * unit.operand_size + operand_row * kLanes + key_lane;
      in_steps<kKeyRows>(in_block, [&](auto rows, int64_t row) {
        constexpr int R = decltype(rows)::value;
        Vec<T> tile[R][V];
        clear(tile);
        multiply_add<R, V, Operand::column_major>(tile, reinterpret_cast<const typename P::Weight*>(key + row), kLanes,
                                                  query, kLanes, P::rows(head_dim));
        store_tile(scratch.scores + (first + row) * kLanes, kLanes, tile);
        map_tile(tile, [&](Vec<T> x, int, int v) { return block_highest[v] = maximum(block_highest[v], x); });
      });
    });

    for (int v = 0; v < V; ++v) block_sum[v] = Vec<T>(T(0));
    in_steps<2>(keys, [&](auto rows, int64_t row) {
      constexpr int R = decltype(rows)::value;
      Vec<T> tile[R][V];
      map_tile(tile, [&](Vec<T>, int r, int v) {
        const Vec<T> x = load(scratch.scores + (row + r) * kLanes + v * size);
        const Vec<T> weight = exp2_for<P>(x - block_highest[v]);
        block_sum[v] = block_sum[v] + weight;
        return weight;
      });
      store_operand(scratch.weights, kLanes, row, 0, kLanes, tile);
    });

    Vec<T> factor[V];
    for (int v = 0; v < V; ++v) {
      factor[v] = begin == 0 ? Vec<T>(T(0)) : exp2(highest[v] - block_highest[v]);
      sum[v] = begin == 0 ? block_sum[v] : fma(sum[v], factor[v], block_sum[v]);
      highest[v] = block_highest[v];
    }

    in_steps<kTileRows>(head_dim, [&](auto rows, int64_t row) {
      constexpr int R = decltype(rows)::value;
      Vec<T> tile[R][V];
      clear(tile);
      for_each_piece([&](int64_t key_block, int64_t key_lane, int64_t first, int64_t in_block) {
        const auto* value =
            unit.value + (key_block * shape.inner() + head * head_dim + row) * kLanes + key_lane;
        multiply_add<R, V, Operand::row_major>(tile, value, kLanes, scratch.weights + P::rows(first) * kLanes, kLanes,
                                               P::rows(in_block));
      });
      if (begin > 0)
        map_tile(tile, [&](Vec<T> x, int r, int v) {
          return fma(load(scratch.out + (row + r) * kLanes + v * size), factor[v], x);
        });
      if (begin + keys < tokens) return store_tile(scratch.out + row * kLanes, kLanes, tile);
      map_tile(tile, [&](Vec<T> x, int, int v) { return x / sum[v]; });
      store_operand(scratch.attention + operand_row * kLanes, kLanes, row, lane, count, tile);
    });
  }
}

template <typename P>
MVIT_INLINE void attend_and_mlp(const TransformerShape& shape, const TransformerLayer& layer, int64_t sequences,
                                int64_t block, const Unit<P>& unit, const Scratch<P>& scratch) {
  using T = typename P::Value;
  using Weight = typename P::Weight;
  constexpr int64_t size = Vec<T>::size;
  const int64_t lanes = used_lanes(shape, sequences, block), width = shape.width;
  T* rows = unit.rows + block * unit.rows_size;

  // Lanes between sequences are never used, but uninitialised memory could hold subnormal numbers, which are slow.
  if (shape.tokens() % kSequenceStep != 0)
    std::memset(static_cast<void*>(scratch.attention), 0, sizeof(*scratch.attention) * unit.operand_size);
  for_each_run(shape, sequences, block, [&](int64_t sequence, int64_t, int64_t count, int64_t first_lane) {
    for (int64_t head = 0; head < shape.heads; ++head)
      for (int64_t at = 0; at < count; at += 2 * size) {
        const int64_t present = smaller(2 * size, count - at);
        with_constant<2>(present > size ? 2 : 1, [&](auto vectors) {
          attend<decltype(vectors)::value>(shape, head, sequence, block, first_lane + at, present, unit, scratch);
        });
      }
  });
  product<P>(static_cast<const Weight*>(layer.proj_weight), shape.inner(), scratch.attention, width, shape.inner(),
             lanes, [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, layer.proj_bias, row);
               add_to_panel(rows, row, lane, tile);
             });
  layer_norm<P>(scratch.normalised, rows, width, layer.norm2_weight, layer.norm2_bias, shape.eps,
                round_up(lanes, size));
  product<P>(static_cast<const Weight*>(layer.fc1_weight), width, scratch.normalised, shape.hidden, width, lanes,
             [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, layer.fc1_bias, row);
               map_tile(tile, [](Vec<T> x, int, int) { return silu_for<P>(x); });
               store_operand(scratch.hidden, kLanes, row, lane, kLanes - lane, tile);
             });
  product<P>(static_cast<const Weight*>(layer.fc2_weight), shape.hidden, scratch.hidden, width, shape.hidden, lanes,
             [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, layer.fc2_bias, row);
               add_to_panel(rows, row, lane, tile);
             });
}

template <typename P, typename E>
void step(const TransformerArgs& args, int64_t index, int64_t first_sequence, int64_t sequences, int64_t block,
          void* unit_memory, void* scratch_memory) {
  const TransformerShape& shape = args.shape;
  const Unit<P> unit(shape, unit_blocks(shape, sequences), unit_memory);
  const Scratch<P> scratch(shape, scratch_memory);
  typename P::Value* const rows = unit.rows + block * unit.rows_size;
  if (index == 0) return read_rows<E>(args, first_sequence, sequences, block, rows);
  if (index == steps(shape) - 1) return write_rows<E>(args, first_sequence, sequences, block, rows, scratch.panel);
  const TransformerLayer& layer = args.layers[(index - 1) / 2];
  if (index % 2 == 1) return project_qkv(shape, layer, sequences, block, unit, scratch);
  attend_and_mlp(shape, layer, sequences, block, unit, scratch);
}

template <typename P>
std::size_t unit_bytes(const TransformerShape& shape, int64_t sequences) {
  return Unit<P>::bytes(shape, unit_blocks(shape, sequences));
}

template <typename P>
std::size_t step_bytes(const TransformerShape& shape) {
  return Scratch<P>(shape, nullptr).end;
}

template <typename P>
std::size_t matrix_bytes(int64_t rows, int64_t columns) {
  return sizeof(typename P::Weight) * static_cast<std::size_t>(rows * columns);
}

}  // namespace MVIT_ISA

#define MVIT_TRANSFORMER_KERNELS(P, E)                                                                       \
  {                                                                                                          \
    MVIT_ISA::unit_lanes, MVIT_ISA::unit_bytes<MVIT_ISA::P>, MVIT_ISA::step_bytes<MVIT_ISA::P>,              \
        MVIT_ISA::steps, MVIT_ISA::step<MVIT_ISA::P, E>, MVIT_ISA::matrix_bytes<MVIT_ISA::P>, nullptr, 64    \
  }
#define MVIT_TRANSFORMER_KERNELS_ON_TILES(P, E)                                                              \
  {                                                                                                          \
    MVIT_ISA::unit_lanes, MVIT_ISA::tile_unit_bytes, MVIT_ISA::tile_step_bytes, MVIT_ISA::steps,             \
        MVIT_ISA::step_on_tiles<E>, MVIT_ISA::packed_matrix_bytes, MVIT_ISA::pack_matrix, 256                \
  }
#if defined(MVIT_TILES)
#define MVIT_TRANSFORMER_PAIR_KERNELS MVIT_TRANSFORMER_KERNELS_ON_TILES
#else
#define MVIT_TRANSFORMER_PAIR_KERNELS MVIT_TRANSFORMER_KERNELS
#endif

extern const TransformerTable MVIT_TABLE(transformer) = {
    MVIT_PLAIN_ENTRY(MVIT_TRANSFORMER_KERNELS(Plain<float>, float)),
    MVIT_PLAIN_ENTRY(MVIT_TRANSFORMER_KERNELS(Plain<float>, MVIT_ISA::bfloat16)),
    MVIT_PAIRS_ENTRY(MVIT_TRANSFORMER_PAIR_KERNELS(Bf16Pairs, MVIT_ISA::bfloat16)),
};

}  // namespace mvit
