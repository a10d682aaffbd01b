// SPDX-License-Identifier: Apache-2.0
// The steps of transformer_kernel.cpp on matrix tiles: bfloat16 pairs in the same panels, which are right operands of
// tiles as they are. Left operands are made for them: weights are packed (tile_weights.h), keys are rows of 32 dims,
// and values start a block of 32 keys with every sequence.
#pragma once

#include "attention_tiles.h"
#include "tile_layer_norm.h"
#include "transformer_units.h"

namespace mvit {
namespace MVIT_ISA {

// For epilogues: a call for every two rows costs more than most of them. (GCC inlines up to a size.)
#define MVIT_INLINE_LAMBDA __attribute__((always_inline))

struct NoPiece {
  MVIT_INLINE void advance(int) {}
  template <typename Tile>
  MVIT_INLINE void operator()(Tile&, int) const {}
};

// Pair rows that hold the queries of a block. The last head's last step may reach beyond the last pair.
MVIT_INLINE int64_t query_rows(const TransformerShape& shape) {
  return (shape.heads - 1) * shape.head_dim / 2 + steps_of(shape.head_dim) * kTile;
}

struct TileUnit {
  float* rows;      // [block][round_up(width, 16)][kLanes]: the residual stream
  bf16x2* query;    // [block][query_rows][kLanes], scaled by log2(e) / sqrt(head_dim)
  bfloat16* key;    // [head][step of 32 dims][lane of the unit][32]: zero after a head's last dim
  bfloat16* value;  // [sequence][block of 32 tokens][head][value_rows_of(head_dim)][32]: zero after the last token
  int64_t rows_size, query_size, key_step_size, value_rows, value_block_size, value_size;  // elements
  std::size_t end;

  TileUnit(const TransformerShape& shape, int64_t sequences, void* memory) {
    const int64_t blocks = unit_blocks(shape, sequences);
    rows_size = stream_size(shape);
    query_size = query_rows(shape) * kLanes;
    key_step_size = blocks * kLanes * kTileDepth;
    value_rows = shape.heads * value_rows_of(shape.head_dim);
    value_block_size = value_rows * kTileDepth;
    value_size = steps_of(shape.tokens()) * value_block_size;
    rows = static_cast<float*>(memory);
    query = reinterpret_cast<bf16x2*>(rows + blocks * rows_size);
    key = reinterpret_cast<bfloat16*>(query + blocks * query_size);
    value = key + shape.heads * steps_of(shape.head_dim) * key_step_size;
    end = reinterpret_cast<std::size_t>(value + sequences * value_size);
  }
};

struct TileScratch {
  float* panel;        // [round_up(width, 16)][kLanes]
  AttentionScratch attention_scratch;
  bf16x2* key;         // [query_rows][kLanes]
  bf16x2* normalised;  // [rows_in_memory(width)][kLanes]
  bf16x2* attention;   // [rows_in_memory(inner)][kLanes]
  bf16x2* hidden;      // [rows_in_memory(hidden)][kLanes]
  std::size_t end;

  TileScratch(const TransformerShape& shape, void* memory) {
    using P = Bf16Pairs;
    const int64_t keys = smaller(kKeysAtOnce, round_up(shape.tokens(), kTileDepth));
    panel = static_cast<float*>(memory);
    attention_scratch.scores = panel + stream_size(shape);
    attention_scratch.out = attention_scratch.scores + keys * kLanes;
    attention_scratch.numerators[0] =
        reinterpret_cast<bf16x2*>(attention_scratch.out + value_rows_of(shape.head_dim) * kLanes);
    attention_scratch.numerators[1] = attention_scratch.numerators[0] + keys / 2 * kLanes;
    key = attention_scratch.numerators[1] + keys / 2 * kLanes;
    normalised = key + query_rows(shape) * kLanes;
    attention = normalised + P::rows_in_memory(shape.width) * kLanes;
    hidden = attention + P::rows_in_memory(shape.inner()) * kLanes;
    end = reinterpret_cast<std::size_t>(hidden + P::rows_in_memory(shape.hidden) * kLanes);
  }
};

// 16 lanes of a block, which belong to one sequence: where they are in its values.
struct ValueLanes {
  bfloat16* first;     // of the value block's first row
  int64_t token, count;

  MVIT_INLINE ValueLanes(const TransformerShape& shape, const TileUnit& unit, int64_t lane) {
    const int64_t stride = sequence_lanes(shape);
    token = lane % stride;
    count = smaller(kTile, shape.tokens() - token);
    first = unit.value + lane / stride * unit.value_size + token / kTileDepth * unit.value_block_size + token % kTileDepth;
  }
};

// What no step writes but products read: queries after a block's last pair, ones and zeros after a head's values, and
// values after a sequence's last 16 lanes.
MVIT_INLINE void clear_operands(const TransformerShape& shape, int64_t sequences, int64_t block, const TileUnit& unit) {
  const int64_t pairs = shape.inner() / 2;
  std::memset(static_cast<void*>(unit.query + block * unit.query_size + pairs * kLanes), 0,
              sizeof(bf16x2) * static_cast<std::size_t>(unit.query_size - pairs * kLanes));
  for (int64_t lane = 0; lane < used_lanes(shape, sequences, block); lane += kTile) {
    const ValueLanes lanes(shape, unit, block * kLanes + lane);
    bfloat16 ones[kTile] = {};
    for (int64_t i = 0; i < lanes.count; ++i) ones[i] = {0x3f80};
    const int64_t rows = value_rows_of(shape.head_dim);
    for (int64_t head = 0; head < shape.heads; ++head) {
      bfloat16* const first = lanes.first + head * rows * kTileDepth;
      std::memcpy(first + shape.head_dim * kTileDepth, ones, sizeof ones);
      for (int64_t i = shape.head_dim + 1; i < rows; ++i)
        std::memset(static_cast<void*>(first + i * kTileDepth), 0, sizeof ones);
    }
    if (lanes.token % kTileDepth != 0 || lanes.token + kTile < shape.tokens()) continue;
    for (int64_t row = 0; row < unit.value_rows; ++row)
      std::memset(static_cast<void*>(lanes.first + row * kTileDepth + kTile), 0, sizeof(bfloat16) * kTile);
  }
}

// Keys of a block as rows: 16 × 16 pairs at a time.
MVIT_INLINE void store_keys(const TransformerShape& shape, const TileUnit& unit, const bf16x2* panel, int64_t first_lane,
                            int64_t lanes) {
  const int64_t pairs = shape.head_dim / 2, head_steps = steps_of(shape.head_dim);
  for (int64_t head = 0; head < shape.heads; ++head)
    for (int64_t step = 0; step < head_steps; ++step)
      for (int64_t lane = 0; lane < lanes; lane += kTile) {
        const auto* from = reinterpret_cast<const float*>(panel + (head * pairs + step * kTile) * kLanes + lane);
        auto* to = reinterpret_cast<float*>(unit.key + (head * head_steps + step) * unit.key_step_size +
                                            (first_lane + lane) * kTileDepth);
        const int64_t present = smaller(kTile, pairs - step * kTile);
        Vec<float> row[kTile];
        if (present == kTile) {
#pragma GCC unroll 16
          for (int i = 0; i < kTile; ++i) row[i] = load(from + i * kLanes);
        } else {
          for (int i = 0; i < kTile; ++i) row[i] = i < present ? load(from + i * kLanes) : Vec<float>(0.0f);
        }
        transpose(row);
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) store(to + i * kTile, row[i]);
      }
}

MVIT_INLINE void project_qkv(const TransformerShape& shape, const TransformerLayer& layer, int64_t sequences,
                             int64_t block, const TileUnit& unit, const TileScratch& scratch) {
  using P = Bf16Pairs;
  const int64_t lanes = round_up(used_lanes(shape, sequences, block), kTile);
  const int64_t inner = shape.inner(), width = shape.width;
  const int64_t ld = weight_ld<P>(width);
  const auto* weight = static_cast<const bfloat16*>(layer.qkv_weight);
  const auto weight_of = [&](int64_t part) { return weight + part * packed_weights_size<P>(inner, width); };
  const auto bias_of = [&](int64_t part) { return layer.qkv_bias == nullptr ? nullptr : layer.qkv_bias + part * inner; };
  normalise(scratch.normalised, unit.rows + block * unit.rows_size, width, layer.norm1_weight, layer.norm1_bias,
            shape.eps, layer.proj_bias, lanes);
  const Vec<float> scale(static_cast<float>(1.44269504088896340736 / __builtin_sqrt(static_cast<double>(shape.head_dim))));
  product<P>(weight_of(0), ld, scratch.normalised, inner, width, lanes,
             [bias = bias_of(0), scale, to = unit.query + block * unit.query_size](
                 auto& tile, int64_t row, int64_t lane) MVIT_INLINE_LAMBDA {
               add_bias(tile, bias, row);
               map_tile(tile, [&](Vec<float> x, int, int) { return x * scale; });
               store_operand(to, kLanes, row, lane, kLanes - lane, tile);
             });
  product<P>(weight_of(1), ld, scratch.normalised, inner, width, lanes,
             [bias = bias_of(1), to = scratch.key](auto& tile, int64_t row, int64_t lane) MVIT_INLINE_LAMBDA {
               add_bias(tile, bias, row);
               store_operand(to, kLanes, row, lane, kLanes - lane, tile);
             });
  store_keys(shape, unit, scratch.key, block * kLanes, lanes);
  const ValueLanes lower(shape, unit, block * kLanes);
  const ValueLanes upper = lanes > kTile ? ValueLanes(shape, unit, block * kLanes + kTile) : lower;
  product<P>(weight_of(2), ld, scratch.normalised, inner, width, lanes,
             [bias = bias_of(2), to0 = lower.first, to1 = upper.first,
              // row / head_dim is row · reciprocal >> 40, exactly as long as inner · head_dim < 2^40
              reciprocal = (uint64_t{1} << 40) / static_cast<uint64_t>(shape.head_dim) + 1,
              padding = value_rows_of(shape.head_dim) - shape.head_dim,
              present0 = static_cast<__mmask16>((1u << lower.count) - 1),
              present1 = static_cast<__mmask16>((1u << upper.count) - 1)](
                 auto& tile, int64_t row, int64_t) MVIT_INLINE_LAMBDA {
               add_bias(tile, bias, row);
               const int64_t to = row + static_cast<int64_t>(static_cast<uint64_t>(row) * reciprocal >> 40) * padding;
               map_tile(tile, [&](Vec<float> x, int r, int v) {
                 const __m256i values = (__m256i)_mm512_maskz_cvtneps_pbh(v == 0 ? present0 : present1, x.native);
                 std::memcpy((v == 0 ? to0 : to1) + (to + r) * kTileDepth, &values, sizeof values);
                 return x;
               });
             });
}

// rows += W · panel, without an epilogue: the tiles start with what is there. (normalise adds the biases.)
template <int N>
__attribute__((noinline)) void add_product_of(const bfloat16* weights, const bf16x2* panel, int64_t n, int64_t channels,
                                              float* rows) {
  TileResults<N> unused;
  TileProducts<N, NoPiece> products(unused);
  const int64_t ld = weight_ld<Bf16Pairs>(channels), steps = steps_of(channels);
  const TileOperand b{reinterpret_cast<const char*>(panel), 64, kTile * kPanelRowBytes, kPanelRowBytes};
  for (int64_t row = 0; row < n; row += kBlockSide) {
    const TileOperand a{reinterpret_cast<const char*>(weights + row * ld), 2 * kTile * ld, kTileBytes, 64};
    float* const to = rows + row * kLanes;
    if (n - row > kTile)
      products.template block_to<2>(a, b, steps, StartAt{to, kPanelRowBytes}, to, kLanes);
    else
      products.template block_to<1>(a, b, steps, StartAt{to, kPanelRowBytes}, to, kLanes);
  }
}

MVIT_INLINE void add_product(const bfloat16* weights, const bf16x2* panel, int64_t n, int64_t channels, int64_t lanes,
                             float* rows) {
  if (lanes > kTile)
    add_product_of<2>(weights, panel, n, channels, rows);
  else
    add_product_of<1>(weights, panel, n, channels, rows);
}

MVIT_INLINE void attend_and_mlp(const TransformerShape& shape, const TransformerLayer& layer, int64_t sequences,
                                int64_t block, const TileUnit& unit, const TileScratch& scratch) {
  using P = Bf16Pairs;
  const int64_t lanes = round_up(used_lanes(shape, sequences, block), kTile), width = shape.width;
  const int64_t inner = shape.inner(), hidden = shape.hidden;
  float* const rows = unit.rows + block * unit.rows_size;
  for_each_run(shape, sequences, block, [&](int64_t sequence, int64_t, int64_t count, int64_t lane) {
    const AttentionArgs args{shape.tokens(),
                             shape.heads,
                             shape.head_dim,
                             unit.query + block * unit.query_size + lane,
                             unit.key + sequence * sequence_lanes(shape) * kTileDepth,
                             unit.value + sequence * unit.value_size,
                             unit.key_step_size,
                             unit.value_block_size,
                             scratch.attention + lane};
    if (count > kTile)
      attend_on_tiles<2>(args, scratch.attention_scratch);
    else
      attend_on_tiles<1>(args, scratch.attention_scratch);
  });
  clear_padding<P>(scratch.attention, inner);
  add_product(static_cast<const bfloat16*>(layer.proj_weight), scratch.attention, width, inner, lanes, rows);
  normalise(scratch.normalised, rows, width, layer.norm2_weight, layer.norm2_bias, shape.eps, layer.fc2_bias,
            lanes);
  product<P>(static_cast<const bfloat16*>(layer.fc1_weight), weight_ld<P>(width), scratch.normalised, hidden, width,
             lanes,
             [bias = layer.fc1_bias, to = scratch.hidden](auto& tile, int64_t row, int64_t lane) MVIT_INLINE_LAMBDA {
               add_bias(tile, bias, row);
               map_tile(tile, [](Vec<float> x, int, int) { return silu_for<P>(x); });
               store_operand(to, kLanes, row, lane, kLanes - lane, tile);
             });
  clear_padding<P>(scratch.hidden, hidden);
  add_product(static_cast<const bfloat16*>(layer.fc2_weight), scratch.hidden, width, hidden, lanes, rows);
}

// As step of transformer_kernel.cpp.
template <typename E>
void step_on_tiles(const TransformerArgs& args, int64_t index, int64_t first_sequence, int64_t sequences, int64_t block,
                   void* unit_memory, void* scratch_memory) {
  const TransformerShape& shape = args.shape;
  const TileUnit unit(shape, sequences, unit_memory);
  const TileScratch scratch(shape, scratch_memory);
  float* const rows = unit.rows + block * unit.rows_size;
  if (index == 0) {
    clear_operands(shape, sequences, block, unit);
    return read_rows<E>(args, first_sequence, sequences, block, rows);
  }
  if (index == steps(shape) - 1) return write_rows<E>(args, first_sequence, sequences, block, rows, scratch.panel);
  const ProductUnit tiles;
  const TransformerLayer& layer = args.layers[(index - 1) / 2];
  if (index % 2 == 1) return project_qkv(shape, layer, sequences, block, unit, scratch);
  attend_and_mlp(shape, layer, sequences, block, unit, scratch);
}

inline std::size_t tile_unit_bytes(const TransformerShape& shape, int64_t sequences) {
  return TileUnit(shape, sequences, nullptr).end;
}

inline std::size_t tile_step_bytes(const TransformerShape& shape) { return TileScratch(shape, nullptr).end; }

inline std::size_t packed_matrix_bytes(int64_t rows, int64_t columns) {
  return sizeof(bfloat16) * static_cast<std::size_t>(packed_weights_size<Bf16Pairs>(rows, columns));
}

inline void pack_matrix(const void* matrix, int64_t rows, int64_t columns, void* packed) {
  pack_weights<Bf16Pairs>(static_cast<bfloat16*>(packed), matrix, rows, columns, 0, row_tiles<Bf16Pairs>(rows));
}

}  // namespace MVIT_ISA
}  // namespace mvit
