// SPDX-License-Identifier: Apache-2.0
// layer_norm_linear on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h and
// weight_gradients.h.
#include "layer_norm_linear.h"
#include "weight_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormLinearScratch {
  typename P::Value* panel;  // [round_up(channels, size)][kLanes]
  typename P::Operand *out, *normalised;  // `out` of kOutChannels
  std::size_t end;

  LayerNormLinearScratch(const LayerNormLinear& args, void* memory) {
    Pieces pieces(memory);
    panel = pieces.take<typename P::Value>(round_up(args.channels, Vec<typename P::Value>::size) * kLanes);
    out = take_operand<P>(pieces, kOutChannels<P>);
    normalised = operand_beside<P>(pieces, panel, args.channels);
    end = pieces.next;
  }
};

template <typename P>
struct LayerNormLinearWeights {
  LeftWeights<P> weight;
  std::size_t end;

  LayerNormLinearWeights(const LayerNormLinear& args, Pieces pieces)
      : weight(pieces, args.weight, args.out_channels, args.channels), end(pieces.next) {}
};

template <typename P>
std::size_t shared_bytes(const LayerNormLinear& args) {
  return LayerNormLinearWeights<P>(args, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LayerNormLinear& args) {
  return LayerNormLinearScratch<P>(args, nullptr).end;
}

template <typename P>
int64_t parts(const LayerNormLinear& args) {
  return LayerNormLinearWeights<P>(args, Pieces(nullptr)).weight.parts();
}

template <typename P>
void prepare(const LayerNormLinear& args, int64_t begin, int64_t end, void* memory) {
  LayerNormLinearWeights<P>(args, Pieces(memory)).weight.make(begin, end);
}

// scratch.normalised, and the statistics, from scratch.panel; apart from forward_block, it is compiled once for all E
template <typename P, typename T = typename P::Value>
void normalise_panel(const LayerNormLinear& args, const Block<T>& block, const LayerNormLinearScratch<P>& scratch) {
  normalise_block<P>(scratch.normalised, scratch.panel, block, args);
}

// scratch.out = output channels [begin, begin + count)
template <typename P, typename T = typename P::Value>
void forward_panel(const LayerNormLinear& args, const Block<T>& block, int64_t begin, int64_t count,
                   const LeftWeights<P>& weight, const LayerNormLinearScratch<P>& scratch) {
  const T* const bias = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + begin;
  weight.product(scratch.normalised, begin, count, block.lanes,
                 [bias, silu_wanted = args.silu, out = scratch.out](auto& tile, int64_t row, int64_t lane) {
                   add_bias(tile, bias, row);
                   if (silu_wanted) map_tile(tile, [](Vec<T> x, int, int) { return silu_for<P>(x); });
                   store_operand(out, kLanes, row, lane, kLanes - lane, tile);
                 });
}

template <typename P, typename E>
MVIT_INLINE void forward_block(const LayerNormLinear& args, int64_t index, const LeftWeights<P>& weight,
                               const LayerNormLinearScratch<P>& scratch) {
  const Block<typename P::Value> block(index * kLanes, args.count);
  read_block<E>(scratch.panel, args.x, block, args.channels);
  normalise_panel<P>(args, block, scratch);
  for (int64_t begin = 0; begin < args.out_channels; begin += kOutChannels<P>) {
    const int64_t count = smaller(kOutChannels<P>, args.out_channels - begin);
    forward_panel<P>(args, block, begin, count, weight, scratch);
    write_results<P, E>(args.out, block, count, begin, scratch.out);
  }
}

template <typename P, typename E>
void forward_blocks(const LayerNormLinear& args, int64_t begin, int64_t end, void* shared_memory, void* memory) {
  const LayerNormLinearWeights<P> shared(args, Pieces(shared_memory));
  const LayerNormLinearScratch<P> scratch(args, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.normalised, args.channels);
  for (int64_t index = begin; index < end; ++index) forward_block<P, E>(args, index, shared.weight, scratch);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormLinearShared {
  LeftWeights<P> weight;
  TransposedWeights<P> transposed;
  WeightGradient<P> gradient;
  BlockSums<typename P::Value> norm;
  std::size_t end;

  LayerNormLinearShared(const LayerNormLinearBackward& args, int64_t capacity, Pieces pieces)
      : weight(pieces, args.weight, args.silu ? args.out_channels : 0, args.channels),
        transposed(pieces, args.weight, args.out_channels, args.channels),
        gradient(pieces, args.out_channels, args.channels, capacity),
        norm(pieces, args.channels, 2, capacity),
        end(pieces.next) {}
};

template <typename P>
struct LayerNormLinearBackwardScratch {
  using T = typename P::Value;
  T *normalised, *grad_x;           // [round_up(channels, size)][kLanes]
  T* grad;                          // [round_up(out_channels, size)][kLanes]
  typename P::Operand *norm, *grad_operand, *result;
  std::size_t end;

  LayerNormLinearBackwardScratch(const LayerNormLinearBackward& args, typename P::Weight* left, void* memory) {
    Pieces pieces(memory);
    normalised = pieces.take<T>(round_up(args.channels, Vec<T>::size) * kLanes);
    grad_x = pieces.take<T>(round_up(args.channels, Vec<T>::size) * kLanes);
    result = operand_beside<P>(pieces, grad_x, result_channels<P>(args.channels));
    norm = take_operand<P>(pieces, args.channels);
    grad = values_of_left<P>(pieces, left, args.out_channels);
    grad_operand = operand_of_left<P>(pieces, left, args.out_channels);
    end = pieces.next;
  }
};

template <typename P>
std::size_t shared_bytes(const LayerNormLinearBackward& args, int64_t capacity) {
  return LayerNormLinearShared<P>(args, capacity, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LayerNormLinearBackward& args) {
  return LayerNormLinearBackwardScratch<P>(args, nullptr, nullptr).end;
}

template <typename P>
int64_t parts(const LayerNormLinearBackward& args) {
  const LayerNormLinearShared<P> shared(args, 0, Pieces(nullptr));
  return shared.weight.parts() + shared.transposed.parts();
}

template <typename P>
void prepare(const LayerNormLinearBackward& args, int64_t capacity, int64_t begin, int64_t end, void* memory) {
  const LayerNormLinearShared<P> shared(args, capacity, Pieces(memory));
  shared.weight.make(begin, end);
  shared.transposed.make(begin, end);
}

// `left` and scratch.grad_operand from scratch.grad, the gradient of SiLU's results
template <typename P, typename T = typename P::Value>
void silu_backward_panel(const LayerNormLinearBackward& args, const Block<T>& block,
                         const LayerNormLinearShared<P>& shared, const LayerNormLinearBackwardScratch<P>& scratch,
                         typename P::Weight* left) {
  scale_and_shift<P>(scratch.norm, scratch.normalised, args.channels, static_cast<const T*>(args.norm_weight),
                     static_cast<const T*>(args.norm_bias), block.lanes);
  shared.weight.product(
      scratch.norm, 0, args.out_channels, block.lanes,
      [bias = static_cast<const T*>(args.bias), grad = scratch.grad, left, operand = scratch.grad_operand](
          auto& tile, int64_t row, int64_t lane) {
        add_bias(tile, bias, row);
        const T* const at = grad + row * kLanes + lane;
        map_tile(tile, [at](Vec<T> x, int r, int v) {
          return Sigmoid<P>(x).silu_backward(load(at + r * kLanes + v * Vec<T>::size), x);
        });
        store_left_and_operand<P>(left, operand, row, lane, tile);
      });
}

// scratch.result, and the block's sums, from scratch.grad_operand and scratch.normalised
template <typename P, typename T = typename P::Value>
void backward_panel(const LayerNormLinearBackward& args, int64_t index, const Block<T>& block, const T* rstd,
                    const LayerNormLinearShared<P>& shared, const LayerNormLinearBackwardScratch<P>& scratch) {
  shared.transposed.product(scratch.grad_operand, 0, args.channels, block.lanes, store_in<T>(scratch.grad_x));
  layer_norm_backward<P, T>(scratch.result, scratch.grad_x, nullptr, scratch.normalised, rstd, args.channels,
                            static_cast<const T*>(args.norm_weight), block.lanes, shared.norm.of(index, 0),
                            shared.norm.of(index, 1));
}

template <typename P, typename E>
MVIT_INLINE void backward_block(const LayerNormLinearBackward& args, const RowStep& step, int64_t index,
                                const LayerNormLinearShared<P>& shared, void* memory) {
  using T = typename P::Value;
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);
  auto* const left = shared.gradient.left_of(index, block);
  const LayerNormLinearBackwardScratch<P> scratch(args, left, memory);
  const int64_t channels = args.channels, out_channels = args.out_channels;
  RowNormalisers<T> normalisers;
  read_normalised<E>(scratch.normalised, normalisers, args.x, args.mean, args.rstd, block, channels);

  if (!args.silu) {
    read_left_and_operand<P, E>(left, scratch.grad_operand, args.grad_out, block, out_channels);
  } else {
    read_block<E>(scratch.grad, args.grad_out, block, out_channels);
    silu_backward_panel<P>(args, block, shared, scratch, left);
  }
  store_right_normalised<P, E>(shared.gradient, index * kLanes, args.x, block, normalisers,
                               static_cast<const T*>(args.norm_weight), static_cast<const T*>(args.norm_bias));
  backward_panel<P>(args, index, block, normalisers.rstd, shared, scratch);
  write_results<P, E>(args.grad_x, block, channels, 0, scratch.result);
}

template <typename P, typename E>
void backward_blocks(const LayerNormLinearBackward& args, const RowStep& step, int64_t begin, int64_t end,
                     void* shared_memory, void* memory) {
  const LayerNormLinearShared<P> shared(args, step.capacity, Pieces(shared_memory));
  const LayerNormLinearBackwardScratch<P> scratch(args, nullptr, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.norm, args.channels);
  clear_padding<P>(scratch.grad_operand, args.out_channels);
  for (int64_t index = begin; index < end; ++index) backward_block<P, E>(args, step, index, shared, memory);
}

template <typename P>
int64_t tiles(const LayerNormLinearBackward& args) {
  return tiles_of(LayerNormLinearShared<P>(args, 0, Pieces(nullptr)).gradient) + 1;
}

template <typename P, typename E>
void backward_tiles(const LayerNormLinearBackward& args, const RowStep& step, int64_t begin, int64_t end,
                    void* memory) {
  const LayerNormLinearShared<P> shared(args, step.capacity, Pieces(memory));
  const int64_t tiles = tiles_of(shared.gradient);
  const ProductUnit unit;
  for (int64_t tile = begin; tile < smaller(end, tiles); ++tile)
    add_weight_gradient(shared.gradient, step, tile, static_cast<E*>(args.grad_weight),
                        static_cast<typename P::Value*>(args.grad_bias));
  if (end <= tiles) return;
  shared.norm.add_to(args.grad_norm_weight, 0, step);
  shared.norm.add_to(args.grad_norm_bias, 1, step);
}

template <typename P, typename E>
constexpr RowForward<LayerNormLinear> layer_norm_linear_forward() {
  return {shared_bytes<P>, scratch_bytes<P>, parts<P>, prepare<P>, forward_blocks<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LayerNormLinearBackward> layer_norm_linear_backward() {
  return {group_rows<P>, shared_bytes<P>,       scratch_bytes<P>, parts<P>,
          prepare<P>,    backward_blocks<P, E>, tiles<P>,         backward_tiles<P, E>};
}

}  // namespace MVIT_ISA

extern const LayerNormLinearKernels MVIT_TABLE(layer_norm_linear) = {MVIT_ROW_TABLE(layer_norm_linear_forward),
                                                                     MVIT_ROW_TABLE(layer_norm_linear_backward)};

}  // namespace mvit
