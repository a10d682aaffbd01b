// SPDX-License-Identifier: Apache-2.0
// The fused MLP, layer_norm_mlp, on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h
// and weight_gradients.h. The hidden rows of a block stay in L1 and L2; backward recomputes them.
//
// What does not know the elements in memory, E, is a function of P alone, here and in the other row-wise operators: float32
// and bfloat16 share its code, which with its products is most of what there is to compile.
#include "layer_norm_mlp.h"
#include "weight_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormMlpScratch {
  typename P::Value* panel;  // [round_up(channels, size)][kLanes]: x
  typename P::Operand *normalised, *hidden, *result;
  std::size_t end;

  LayerNormMlpScratch(const LayerNormMlp& args, void* memory) {
    Pieces pieces(memory);
    panel = pieces.take<typename P::Value>(round_up(args.channels, Vec<typename P::Value>::size) * kLanes);
    normalised = take_operand<P>(pieces, args.channels);
    hidden = take_operand<P>(pieces, args.hidden);
    result = operand_beside<P>(pieces, panel, result_channels<P>(args.channels));
    end = pieces.next;
  }
};

template <typename P>
struct LayerNormMlpWeights {
  LeftWeights<P> fc1, fc2;
  std::size_t end;

  LayerNormMlpWeights(const LayerNormMlp& args, Pieces pieces)
      : fc1(pieces, args.fc1_weight, args.hidden, args.channels),
        fc2(pieces, args.fc2_weight, args.channels, args.hidden),
        end(pieces.next) {}
};

template <typename P>
std::size_t shared_bytes(const LayerNormMlp& args) {
  return LayerNormMlpWeights<P>(args, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LayerNormMlp& args) {
  return LayerNormMlpScratch<P>(args, nullptr).end;
}

template <typename P>
int64_t parts(const LayerNormMlp& args) {
  const LayerNormMlpWeights<P> weights(args, Pieces(nullptr));
  return weights.fc1.parts() + weights.fc2.parts();
}

template <typename P>
void prepare(const LayerNormMlp& args, int64_t begin, int64_t end, void* memory) {
  const LayerNormMlpWeights<P> weights(args, Pieces(memory));
  weights.fc1.make(begin, end);
  weights.fc2.make(begin, end);
}

// scratch.result, and the statistics, from scratch.panel
template <typename P, typename T = typename P::Value>
void forward_panel(const LayerNormMlp& args, const Block<T>& block, const LayerNormMlpWeights<P>& weights,
                   const LayerNormMlpScratch<P>& scratch) {
  normalise_block<P>(scratch.normalised, scratch.panel, block, args);
  weights.fc1.product(scratch.normalised, 0, args.hidden, block.lanes,
                      [bias = static_cast<const T*>(args.fc1_bias), out = scratch.hidden](auto& tile, int64_t row,
                                                                                          int64_t lane) {
                        add_bias(tile, bias, row);
                        map_tile(tile, [](Vec<T> x, int, int) { return silu_for<P>(x); });
                        store_operand(out, kLanes, row, lane, kLanes - lane, tile);
                      });
  weights.fc2.product(scratch.hidden, 0, args.channels, block.lanes,
                      [bias = static_cast<const T*>(args.fc2_bias), panel = scratch.panel, out = scratch.result](
                          auto& tile, int64_t row, int64_t lane) {
                        add_bias(tile, bias, row);
                        add_tile(tile, panel + row * kLanes + lane, kLanes);
                        store_operand(out, kLanes, row, lane, kLanes - lane, tile);
                      });
}

template <typename P, typename E>
MVIT_INLINE void forward_block(const LayerNormMlp& args, int64_t index, const LayerNormMlpWeights<P>& weights,
                               const LayerNormMlpScratch<P>& scratch) {
  const Block<typename P::Value> block(index * kLanes, args.count);
  read_block<E>(scratch.panel, args.x, block, args.channels);
  forward_panel<P>(args, block, weights, scratch);
  write_results<P, E>(args.out, block, args.channels, 0, scratch.result);
}

template <typename P, typename E>
void forward_blocks(const LayerNormMlp& args, int64_t begin, int64_t end, void* shared_memory, void* memory) {
  const LayerNormMlpWeights<P> weights(args, Pieces(shared_memory));
  const LayerNormMlpScratch<P> scratch(args, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.normalised, args.channels);
  clear_padding<P>(scratch.hidden, args.hidden);
  for (int64_t index = begin; index < end; ++index) forward_block<P, E>(args, index, weights, scratch);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormMlpShared {
  using T = typename P::Value;
  LeftWeights<P> fc1_weight;
  TransposedWeights<P> fc1_transposed, fc2_transposed;
  // The gradient of fc2 is computed transposed, (hidden, channels): hidden rows are panels, grad_out is rows.
  WeightGradient<P> fc1, fc2;
  BlockSums<T> sums;           // gradients of norm_weight, norm_bias and fc2's bias
  std::size_t end;

  LayerNormMlpShared(const LayerNormMlpBackward& args, int64_t capacity, Pieces pieces)
      : fc1_weight(pieces, args.fc1_weight, args.hidden, args.channels),
        fc1_transposed(pieces, args.fc1_weight, args.hidden, args.channels),
        fc2_transposed(pieces, args.fc2_weight, args.channels, args.hidden),
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
  typename P::Operand *grad_hidden, *result;
  std::size_t end;

  LayerNormMlpBackwardScratch(const LayerNormMlpBackward& args, typename P::Weight* left_hidden,
                              typename P::Weight* left_grad, void* memory) {
    Pieces pieces(memory);
    const int64_t panel = round_up(args.channels, Vec<T>::size) * kLanes;
    normalised = pieces.take<T>(panel);
    grad = pieces.take<T>(panel);
    grad_x = pieces.take<T>(panel);
    result = operand_beside<P>(pieces, grad_x, result_channels<P>(args.channels));
    norm = take_operand<P>(pieces, args.channels);
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
int64_t parts(const LayerNormMlpBackward& args) {
  const LayerNormMlpShared<P> shared(args, 0, Pieces(nullptr));
  return shared.fc1_weight.parts() + shared.fc1_transposed.parts() + shared.fc2_transposed.parts();
}

template <typename P>
void prepare(const LayerNormMlpBackward& args, int64_t capacity, int64_t begin, int64_t end, void* memory) {
  const LayerNormMlpShared<P> shared(args, capacity, Pieces(memory));
  shared.fc1_weight.make(begin, end);
  shared.fc1_transposed.make(begin, end);
  shared.fc2_transposed.make(begin, end);
}

// scratch.result, the two `left` panels and the block's sums, from scratch.normalised and scratch.grad
template <typename P, typename T = typename P::Value>
void backward_panel(const LayerNormMlpBackward& args, int64_t index, const Block<T>& block, const T* rstd,
                    const LayerNormMlpShared<P>& shared, const LayerNormMlpBackwardScratch<P>& scratch,
                    typename P::Weight* left_hidden, typename P::Weight* left_grad) {
  const int64_t channels = args.channels, hidden = args.hidden;
  const T *norm_weight = static_cast<const T*>(args.norm_weight), *norm_bias = static_cast<const T*>(args.norm_bias);
  scale_and_shift<P>(scratch.norm, scratch.normalised, channels, norm_weight, norm_bias, block.lanes);
  store_operand_of<P>(scratch.grad_operand, scratch.grad, channels, block.lanes);
  sum_lanes(shared.sums.of(index, 2), channels, [&](int64_t c) {
    return sum_vectors<T>(block.lanes, [&](int64_t lane) { return load(scratch.grad + c * kLanes + lane); });
  });

  shared.fc1_weight.product(scratch.norm, 0, hidden, block.lanes,
                            [bias = static_cast<const T*>(args.fc1_bias), before = scratch.before](
                                auto& tile, int64_t row, int64_t lane) {
                              add_bias(tile, bias, row);
                              store_tile(before + row * kLanes + lane, kLanes, tile);
                            });
  shared.fc2_transposed.product(
      scratch.grad_operand, 0, hidden, block.lanes,
      [before = scratch.before, left_hidden, left_grad, operand = scratch.grad_hidden](auto& grad, int64_t row,
                                                                                       int64_t lane) {
        std::remove_reference_t<decltype(grad)> hidden_rows;
        const T* const at = before + row * kLanes + lane;
        map_tile(grad, [at, &hidden_rows](Vec<T> g, int r, int v) {
          const Vec<T> x = load(at + r * kLanes + v * Vec<T>::size);
          const Sigmoid<P> sigmoid(x);
          hidden_rows[r][v] = x * sigmoid.value;
          return sigmoid.silu_backward(g, x);
        });
        store_left(left_hidden, row, lane, hidden_rows);
        store_left_and_operand<P>(left_grad, operand, row, lane, grad);
      });
  shared.fc1_transposed.product(scratch.grad_hidden, 0, channels, block.lanes, store_in<T>(scratch.grad_x));
  layer_norm_backward<P>(scratch.result, scratch.grad_x, scratch.grad, scratch.normalised, rstd, channels, norm_weight,
                         block.lanes, shared.sums.of(index, 0), shared.sums.of(index, 1));
}

template <typename P, typename E>
MVIT_INLINE void backward_block(const LayerNormMlpBackward& args, const RowStep& step, int64_t index,
                                const LayerNormMlpShared<P>& shared, void* memory) {
  using T = typename P::Value;
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);
  auto *const left_grad = shared.fc1.left_of(index, block), *const left_hidden = shared.fc2.left_of(index, block);
  const LayerNormMlpBackwardScratch<P> scratch(args, left_hidden, left_grad, memory);
  RowNormalisers<T> normalisers;
  read_normalised<E>(scratch.normalised, normalisers, args.x, args.mean, args.rstd, block, args.channels);
  read_block<E>(scratch.grad, args.grad_out, block, args.channels);
  store_right_normalised<P, E>(shared.fc1, index * kLanes, args.x, block, normalisers,
                               static_cast<const T*>(args.norm_weight), static_cast<const T*>(args.norm_bias));
  store_right<P, E>(shared.fc2, index * kLanes, args.grad_out, block,
                    [](Vec<T> x, int64_t, int64_t, int) { return x; });
  backward_panel<P>(args, index, block, normalisers.rstd, shared, scratch, left_hidden, left_grad);
  write_results<P, E>(args.grad_x, block, args.channels, 0, scratch.result);
}

template <typename P, typename E>
void backward_blocks(const LayerNormMlpBackward& args, const RowStep& step, int64_t begin, int64_t end,
                     void* shared_memory, void* memory) {
  const LayerNormMlpShared<P> shared(args, step.capacity, Pieces(shared_memory));
  const LayerNormMlpBackwardScratch<P> scratch(args, nullptr, nullptr, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.norm, args.channels);
  clear_padding<P>(scratch.grad_operand, args.channels);
  clear_padding<P>(scratch.grad_hidden, args.hidden);
  for (int64_t index = begin; index < end; ++index) backward_block<P, E>(args, step, index, shared, memory);
}

template <typename P>
int64_t tiles(const LayerNormMlpBackward& args) {
  return 2 * tiles_of(LayerNormMlpShared<P>(args, 0, Pieces(nullptr)).fc1) + 1;
}

template <typename P, typename E>
void backward_tiles(const LayerNormMlpBackward& args, const RowStep& step, int64_t begin, int64_t end, void* memory) {
  const LayerNormMlpShared<P> shared(args, step.capacity, Pieces(memory));
  const int64_t tiles = tiles_of(shared.fc1);  // fc2 has the same number
  const ProductUnit unit;
  for (int64_t tile = begin; tile < smaller(end, 2 * tiles); ++tile) {
    if (tile < tiles)
      add_weight_gradient(shared.fc1, step, tile, static_cast<E*>(args.grad_fc1_weight),
                          static_cast<typename P::Value*>(args.grad_fc1_bias));
    else
      add_weight_gradient<P, E, true>(shared.fc2, step, tile - tiles, static_cast<E*>(args.grad_fc2_weight));
  }
  if (end <= 2 * tiles) return;
  shared.sums.add_to(args.grad_norm_weight, 0, step);
  shared.sums.add_to(args.grad_norm_bias, 1, step);
  shared.sums.add_to(args.grad_fc2_bias, 2, step);
}

template <typename P, typename E>
constexpr RowForward<LayerNormMlp> layer_norm_mlp_forward() {
  return {shared_bytes<P>, scratch_bytes<P>, parts<P>, prepare<P>, forward_blocks<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LayerNormMlpBackward> layer_norm_mlp_backward() {
  return {group_rows<P>, shared_bytes<P>,       scratch_bytes<P>, parts<P>,
          prepare<P>,    backward_blocks<P, E>, tiles<P>,         backward_tiles<P, E>};
}

}  // namespace MVIT_ISA

extern const LayerNormMlpKernels MVIT_TABLE(layer_norm_mlp) = {MVIT_ROW_TABLE(layer_norm_mlp_forward),
                                                               MVIT_ROW_TABLE(layer_norm_mlp_backward)};

}  // namespace mvit
