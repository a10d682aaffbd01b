// SPDX-License-Identifier: Apache-2.0
// The fused MLP, layer_norm_mlp, on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h
// and row_gradients.h. The hidden rows of a block stay in L1 and L2; backward recomputes them.
#include "layer_norm_mlp.h"
#include "row_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormMlpScratch {
  typename P::Value* panel;  // [round_up(channels, size)][kLanes]: x, then the result
  typename P::Operand *normalised, *hidden;
  std::size_t end;

  LayerNormMlpScratch(const LayerNormMlp& args, void* memory) {
    Pieces pieces(memory);
    panel = pieces.take<typename P::Value>(round_up(args.channels, Vec<typename P::Value>::size) * kLanes);
    normalised = pieces.take<typename P::Operand>(P::rows(args.channels) * kLanes);
    hidden = pieces.take<typename P::Operand>(P::rows(args.hidden) * kLanes);
    end = pieces.next;
  }
};

template <typename P>
std::size_t scratch_bytes(const LayerNormMlp& args) {
  return LayerNormMlpScratch<P>(args, nullptr).end;
}

template <typename P, typename E>
void forward_block(const LayerNormMlp& args, int64_t index, void* memory) {
  using T = typename P::Value;
  using Weight = typename P::Weight;
  const LayerNormMlpScratch<P> scratch(args, memory);
  const Block<T> block(index * kLanes, args.count);
  T mean[kLanes], rstd[kLanes];
  read_block<E>(scratch.panel, args.x, block, args.channels);
  layer_norm<P>(scratch.normalised, scratch.panel, args.channels, static_cast<const T*>(args.norm_weight),
                static_cast<const T*>(args.norm_bias), static_cast<T>(args.eps), block.lanes, mean, rstd);
  std::memcpy(static_cast<T*>(args.mean) + block.first, mean, sizeof(T) * block.count);
  std::memcpy(static_cast<T*>(args.rstd) + block.first, rstd, sizeof(T) * block.count);

  product<P>(static_cast<const Weight*>(args.fc1_weight), args.channels, scratch.normalised, args.hidden,
             args.channels, block.lanes, [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, static_cast<const T*>(args.fc1_bias), row);
               map_tile(tile, [](Vec<T> x, int, int) { return silu(x); });
               store_operand(scratch.hidden, kLanes, row, lane, kLanes - lane, tile);
             });
  product<P>(static_cast<const Weight*>(args.fc2_weight), args.hidden, scratch.hidden, args.channels, args.hidden,
             block.lanes, [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, static_cast<const T*>(args.fc2_bias), row);
               add_to_panel(scratch.panel, row, lane, tile);
             });
  write_columns(tokens_of<E>(args.out), block.first, block.count, args.channels, scratch.panel, kLanes);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormMlpShared {
  using T = typename P::Value;
  typename P::Weight *fc1_transposable, *fc2_transposable;
  // The gradient of fc2 is computed transposed, (hidden, channels): hidden rows are panels, grad_out is rows.
  WeightGradient<P> fc1, fc2;
  BlockSums<T> sums;           // gradients of norm_weight, norm_bias and fc2's bias
  std::size_t end;

  LayerNormMlpShared(const LayerNormMlpBackward& args, int64_t capacity, Pieces pieces)
      : fc1_transposable(take_transposable<P>(pieces, args.hidden, args.channels)),
        fc2_transposable(take_transposable<P>(pieces, args.channels, args.hidden)),
        fc1(pieces, args.hidden, args.channels, capacity),
        fc2(pieces, args.hidden, args.channels, capacity),
        sums(pieces, args.channels, 3, capacity),
        end(pieces.next) {}
};

template <typename P>
struct LayerNormMlpBackwardScratch {
  using T = typename P::Value;
  T *normalised, *grad, *grad_x;  // [round_up(channels, size)][kLanes]
  typename P::Operand *norm, *grad_operand;
  T* before;  // [round_up(hidden, size)][kLanes], pre-activation; shares memory with the hidden rows where possible
  typename P::Operand* grad_hidden;
  std::size_t end;

  LayerNormMlpBackwardScratch(const LayerNormMlpBackward& args, typename P::Weight* left_hidden,
                              typename P::Weight* left_grad, void* memory) {
    Pieces pieces(memory);
    const int64_t panel = round_up(args.channels, Vec<T>::size) * kLanes;
    normalised = pieces.take<T>(panel);
    grad = pieces.take<T>(panel);
    grad_x = pieces.take<T>(panel);
    norm = pieces.take<typename P::Operand>(P::rows(args.channels) * kLanes);
    grad_operand = operand_beside<P>(pieces, grad, args.channels);
    before = values_of_left<P>(pieces, left_hidden, args.hidden);
    grad_hidden = operand_of_left<P>(pieces, left_grad, args.hidden);
    end = pieces.next;
  }
};

template <typename P>
std::size_t shared_bytes(const LayerNormMlpBackward& args, int64_t capacity) {
  return LayerNormMlpShared<P>(args, capacity, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LayerNormMlpBackward& args) {
  return LayerNormMlpBackwardScratch<P>(args, nullptr, nullptr, nullptr).end;
}

template <typename P>
void prepare(const LayerNormMlpBackward& args, int64_t capacity, void* memory) {
  const LayerNormMlpShared<P> shared(args, capacity, Pieces(memory));
  make_transposable<P>(shared.fc1_transposable, args.fc1_weight, args.hidden, args.channels);
  make_transposable<P>(shared.fc2_transposable, args.fc2_weight, args.channels, args.hidden);
}

template <typename P, typename E>
void backward_block(const LayerNormMlpBackward& args, const RowStep& step, int64_t index, void* shared_memory,
                    void* memory) {
  using T = typename P::Value;
  constexpr int64_t size = Vec<T>::size;
  const LayerNormMlpShared<P> shared(args, step.capacity, Pieces(shared_memory));
  auto* left_grad = shared.fc1.left + index * shared.fc1.panel;
  auto* left_hidden = shared.fc2.left + index * shared.fc2.panel;
  const LayerNormMlpBackwardScratch<P> scratch(args, left_hidden, left_grad, memory);
  const int64_t channels = args.channels, hidden = args.hidden;
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);
  const T *norm_weight = static_cast<const T*>(args.norm_weight), *norm_bias = static_cast<const T*>(args.norm_bias);
  RowNormalisers<T> normalisers;
  read_normalised<E>(scratch.normalised, normalisers, args.x, args.mean, args.rstd, block, channels);
  scale_and_shift<P>(scratch.norm, scratch.normalised, channels, norm_weight, norm_bias, block.lanes);
  read_block<E>(scratch.grad, args.grad_out, block, channels);
  store_operand_of<P>(scratch.grad_operand, scratch.grad, channels, block.lanes);
  store_right_normalised<P, E>(shared.fc1, index * kLanes, args.x, block, normalisers, norm_weight, norm_bias);
  store_right<P, E>(shared.fc2, index * kLanes, args.grad_out, block,
                    [](Vec<T> x, int64_t, int64_t, int) { return x; });
  sum_lanes(shared.sums.of(index, 2), channels, [&](int64_t c) {
    return sum_vectors<T>(block.lanes, [&](int64_t lane) { return load(scratch.grad + c * kLanes + lane); });
  });

  product<P>(static_cast<const typename P::Weight*>(args.fc1_weight), channels, scratch.norm, hidden, channels,
             block.lanes, [&](auto& tile, int64_t row, int64_t lane) {
               add_bias(tile, static_cast<const T*>(args.fc1_bias), row);
               store_tile(scratch.before + row * kLanes + lane, kLanes, tile);
             });
  product<P, Operand::column_major>(
      transposable<P>(shared.fc2_transposable, args.fc2_weight), hidden, scratch.grad_operand, hidden, channels,
      block.lanes, [&](auto& grad, int64_t row, int64_t lane) {
        std::remove_reference_t<decltype(grad)> hidden_rows;
        map_tile(grad, [&](Vec<T> g, int r, int v) {
          const Vec<T> x = load(scratch.before + (row + r) * kLanes + lane + v * size), one(T(1));
          const Vec<T> sigmoid = one / (one + exp(-x));
          hidden_rows[r][v] = x * sigmoid;
          return g * sigmoid * fma(x, one - sigmoid, one);
        });
        store_left(left_hidden, row, lane, hidden_rows);
        store_left_and_operand<P>(left_grad, scratch.grad_hidden, row, lane, grad);
      });
  product<P, Operand::column_major>(
      transposable<P>(shared.fc1_transposable, args.fc1_weight), channels, scratch.grad_hidden, channels, hidden,
      block.lanes,
      [&](auto& tile, int64_t row, int64_t lane) { store_tile(scratch.grad_x + row * kLanes + lane, kLanes, tile); });
  layer_norm_backward(scratch.grad_x, scratch.normalised, normalisers.rstd, channels, norm_weight, block.lanes,
                      shared.sums.of(index, 0), shared.sums.of(index, 1));
  for (int64_t i = 0; i < channels * kLanes; i += size)
    store(scratch.grad_x + i, load(scratch.grad_x + i) + load(scratch.grad + i));
  write_columns(tokens_of<E>(args.grad_x), block.first, block.count, channels, scratch.grad_x, kLanes);
}

template <typename P>
int64_t tiles(const LayerNormMlpBackward& args) {
  return 2 * tiles_of(LayerNormMlpShared<P>(args, 0, Pieces(nullptr)).fc1) + 1;
}

template <typename P, typename E>
void backward_tile(const LayerNormMlpBackward& args, const RowStep& step, int64_t tile, void* memory) {
  const LayerNormMlpShared<P> shared(args, step.capacity, Pieces(memory));
  const int64_t tiles = tiles_of(shared.fc1);  // fc2 has the same number
  if (tile < tiles)
    return add_weight_gradient(shared.fc1, step, tile, static_cast<E*>(args.grad_fc1_weight),
                               static_cast<typename P::Value*>(args.grad_fc1_bias));
  if (tile < 2 * tiles)
    return add_weight_gradient<P, E, true>(shared.fc2, step, tile - tiles, static_cast<E*>(args.grad_fc2_weight));
  shared.sums.add_to(args.grad_norm_weight, 0, step);
  shared.sums.add_to(args.grad_norm_bias, 1, step);
  shared.sums.add_to(args.grad_fc2_bias, 2, step);
}

template <typename P, typename E>
constexpr RowForward<LayerNormMlp> layer_norm_mlp_forward() {
  return {scratch_bytes<P>, forward_block<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LayerNormMlpBackward> layer_norm_mlp_backward() {
  return {group_rows<P>, shared_bytes<P>, scratch_bytes<P>, prepare<P>, backward_block<P, E>, tiles<P>, backward_tile<P, E>};
}

}  // namespace MVIT_ISA

extern const LayerNormMlpKernels MVIT_TABLE(layer_norm_mlp) = {MVIT_ROW_TABLE(layer_norm_mlp_forward),
                                                               MVIT_ROW_TABLE(layer_norm_mlp_backward)};

}  // namespace mvit
