// SPDX-License-Identifier: Apache-2.0
// linear_residual on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h and
// weight_gradients.h.
#include "linear_residual.h"
#include "weight_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
struct LinearResidualScratch {
  typename P::Operand* operand;  // of round_up(channels, size)
  typename P::Operand* out;      // of kOutChannels
  std::size_t end;

  LinearResidualScratch(const LinearResidual& args, void* memory) {
    Pieces pieces(memory);
    operand = take_operand<P>(pieces, round_up(args.channels, Vec<typename P::Value>::size));
    out = take_operand<P>(pieces, kOutChannels<P>);
    end = pieces.next;
  }
};

template <typename P>
struct LinearResidualWeights {
  LeftWeights<P> weight;
  std::size_t end;

  LinearResidualWeights(const LinearResidual& args, Pieces pieces)
      : weight(pieces, args.weight, args.out_channels, args.channels), end(pieces.next) {}
};

template <typename P>
std::size_t shared_bytes(const LinearResidual& args) {
  return LinearResidualWeights<P>(args, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LinearResidual& args) {
  return LinearResidualScratch<P>(args, nullptr).end;
}

template <typename P>
int64_t parts(const LinearResidual& args) {
  return LinearResidualWeights<P>(args, Pieces(nullptr)).weight.parts();
}

template <typename P>
void prepare(const LinearResidual& args, int64_t begin, int64_t end, void* memory) {
  LinearResidualWeights<P>(args, Pieces(memory)).weight.make(begin, end);
}

// scratch.out = output channels [begin, begin + count), with the residual if these are pairs
template <typename P, typename T = typename P::Value>
void forward_panel(const LinearResidual& args, const Block<T>& block, int64_t begin, int64_t count,
                   const LeftWeights<P>& weight, const LinearResidualScratch<P>& scratch) {
  const T* const bias = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + begin;
  weight.product(scratch.operand, begin, count, block.lanes,
                 [bias, out = scratch.out](auto& tile, int64_t row, int64_t lane) {
                   add_bias(tile, bias, row);
                   if constexpr (P::kStep > 1) add_operand(tile, out, row, lane);
                   store_operand(out, kLanes, row, lane, kLanes - lane, tile);
                 });
}

template <typename P, typename E>
MVIT_INLINE void forward_block(const LinearResidual& args, int64_t index, const LeftWeights<P>& weight,
                               const LinearResidualScratch<P>& scratch) {
  using T = typename P::Value;
  const Block<T> block(index * kLanes, args.count);
  read_operand<P, E>(scratch.operand, args.x, block, args.channels);
  const E* residual[kLanes];
  if constexpr (P::kStep == 1)
    tokens_of<const E>(args.residual)
        .for_each(block.first, block.count, [&](const E* p, int64_t i) { residual[i] = p; });

  for (int64_t begin = 0; begin < args.out_channels; begin += kOutChannels<P>) {
    const int64_t count = smaller(kOutChannels<P>, args.out_channels - begin);
    // The residual is added where it costs least: to floats when they are written, to pairs before they are rounded.
    if constexpr (P::kStep > 1) read_pairs(scratch.out, args.residual, block, count, begin);
    forward_panel<P>(args, block, begin, count, weight, scratch);
    if constexpr (P::kStep > 1)
      write_results<P, E>(args.out, block, count, begin, scratch.out);
    else
      write_columns(tokens_of<E>(args.out, begin), block.first, block.count, count, scratch.out, kLanes,
                    [&](Vec<T> x, int64_t i, int64_t c, int width) {
                      return load_first(residual[i] + begin + c, width) + x;
                    });
  }
}

template <typename P, typename E>
void forward_blocks(const LinearResidual& args, int64_t begin, int64_t end, void* shared_memory, void* memory) {
  const LinearResidualWeights<P> shared(args, Pieces(shared_memory));
  const LinearResidualScratch<P> scratch(args, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.operand, args.channels);
  for (int64_t index = begin; index < end; ++index) forward_block<P, E>(args, index, shared.weight, scratch);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LinearResidualShared {
  TransposedWeights<P> transposed;
  WeightGradient<P> gradient;
  std::size_t end;

  LinearResidualShared(const LinearResidualBackward& args, int64_t capacity, Pieces pieces)
      : transposed(pieces, args.weight, args.out_channels, args.channels),
        gradient(pieces, args.out_channels, args.channels, capacity),
        end(pieces.next) {}
};

template <typename P>
struct LinearResidualBackwardScratch {
  using T = typename P::Value;
  typename P::Operand *grad_x, *grad_operand;
  std::size_t end;

  LinearResidualBackwardScratch(const LinearResidualBackward& args, typename P::Weight* left, void* memory) {
    Pieces pieces(memory);
    grad_x = take_operand<P>(pieces, result_channels<P>(args.channels));
    grad_operand = operand_of_left<P>(pieces, left, args.out_channels);
    end = pieces.next;
  }
};

template <typename P>
std::size_t shared_bytes(const LinearResidualBackward& args, int64_t capacity) {
  return LinearResidualShared<P>(args, capacity, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LinearResidualBackward& args) {
  return LinearResidualBackwardScratch<P>(args, nullptr, nullptr).end;
}

template <typename P>
int64_t parts(const LinearResidualBackward& args) {
  return LinearResidualShared<P>(args, 0, Pieces(nullptr)).transposed.parts();
}

template <typename P>
void prepare(const LinearResidualBackward& args, int64_t capacity, int64_t begin, int64_t end, void* memory) {
  LinearResidualShared<P>(args, capacity, Pieces(memory)).transposed.make(begin, end);
}

template <typename P, typename E>
MVIT_INLINE void backward_block(const LinearResidualBackward& args, const RowStep& step, int64_t index,
                                const LinearResidualShared<P>& shared, void* memory) {
  using T = typename P::Value;
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);
  auto* const left = shared.gradient.left_of(index, block);
  const LinearResidualBackwardScratch<P> scratch(args, left, memory);

  read_left_and_operand<P, E>(left, scratch.grad_operand, args.grad_out, block, args.out_channels);
  store_right<P, E>(shared.gradient, index * kLanes, args.x, block, [](Vec<T> x, int64_t, int64_t, int) { return x; });
  shared.transposed.product(scratch.grad_operand, 0, args.channels, block.lanes, store_results<P>(scratch.grad_x));
  write_results<P, E>(args.grad_x, block, args.channels, 0, scratch.grad_x);
}

template <typename P, typename E>
void backward_blocks(const LinearResidualBackward& args, const RowStep& step, int64_t begin, int64_t end,
                     void* shared_memory, void* memory) {
  const LinearResidualShared<P> shared(args, step.capacity, Pieces(shared_memory));
  const LinearResidualBackwardScratch<P> scratch(args, nullptr, memory);
  const ProductUnit unit;
  clear_padding<P>(scratch.grad_operand, args.out_channels);
  for (int64_t index = begin; index < end; ++index) backward_block<P, E>(args, step, index, shared, memory);
}

template <typename P>
int64_t tiles(const LinearResidualBackward& args) {
  return tiles_of(LinearResidualShared<P>(args, 0, Pieces(nullptr)).gradient);
}

template <typename P, typename E>
void backward_tiles(const LinearResidualBackward& args, const RowStep& step, int64_t begin, int64_t end,
                    void* memory) {
  const LinearResidualShared<P> shared(args, step.capacity, Pieces(memory));
  const ProductUnit unit;
  for (int64_t tile = begin; tile < end; ++tile)
    add_weight_gradient(shared.gradient, step, tile, static_cast<E*>(args.grad_weight),
                        static_cast<typename P::Value*>(args.grad_bias));
}

template <typename P, typename E>
constexpr RowForward<LinearResidual> linear_residual_forward() {
  return {shared_bytes<P>, scratch_bytes<P>, parts<P>, prepare<P>, forward_blocks<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LinearResidualBackward> linear_residual_backward() {
  return {group_rows<P>, shared_bytes<P>,       scratch_bytes<P>, parts<P>,
          prepare<P>,    backward_blocks<P, E>, tiles<P>,         backward_tiles<P, E>};
}

}  // namespace MVIT_ISA

extern const LinearResidualKernels MVIT_TABLE(linear_residual) = {MVIT_ROW_TABLE(linear_residual_forward),
                                                                  MVIT_ROW_TABLE(linear_residual_backward)};

}  // namespace mvit
