// SPDX-License-Identifier: Apache-2.0
// linear_residual on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h and
// row_gradients.h.
#include "linear_residual.h"
#include "row_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
struct LinearResidualScratch {
  typename P::Operand* operand;  // [P::rows(round_up(channels, size))][kLanes]
  typename P::Value* out;        // [kOutChannels][kLanes]
  std::size_t end;

  LinearResidualScratch(const LinearResidual& args, void* memory) {
    Pieces pieces(memory);
    operand = pieces.take<typename P::Operand>(P::rows(round_up(args.channels, Vec<typename P::Value>::size)) * kLanes);
    out = pieces.take<typename P::Value>(kOutChannels * kLanes);
    end = pieces.next;
  }
};

template <typename P>
std::size_t scratch_bytes(const LinearResidual& args) {
  return LinearResidualScratch<P>(args, nullptr).end;
}

template <typename P, typename E>
void forward_block(const LinearResidual& args, int64_t index, void* memory) {
  using T = typename P::Value;
  const LinearResidualScratch<P> scratch(args, memory);
  const Block<T> block(index * kLanes, args.count);
  read_operand<P, E>(scratch.operand, args.x, block, args.channels);
  const E* residual[kLanes];
  tokens_of<const E>(args.residual).for_each(block.first, block.count, [&](const E* p, int64_t i) { residual[i] = p; });

  const auto* weight = static_cast<const typename P::Weight*>(args.weight);
  for (int64_t begin = 0; begin < args.out_channels; begin += kOutChannels) {
    const int64_t count = smaller(kOutChannels, args.out_channels - begin);
    product<P>(weight + begin * args.channels, args.channels, scratch.operand, count, args.channels, block.lanes,
               [&](auto& tile, int64_t row, int64_t lane) {
                 add_bias(tile, static_cast<const T*>(args.bias), begin + row);
                 store_tile(scratch.out + row * kLanes + lane, kLanes, tile);
               });
    write_columns(tokens_of<E>(args.out, begin), block.first, block.count, count, scratch.out, kLanes,
                  [&](Vec<T> x, int64_t i, int64_t c, int width) {
                    return load_first(residual[i] + begin + c, width) + x;
                  });
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LinearResidualShared {
  typename P::Weight* transposable;
  WeightGradient<P> weight;
  std::size_t end;

  LinearResidualShared(const LinearResidualBackward& args, int64_t capacity, Pieces pieces)
      : transposable(take_transposable<P>(pieces, args.out_channels, args.channels)),
        weight(pieces, args.out_channels, args.channels, capacity),
        end(pieces.next) {}
};

template <typename P>
struct LinearResidualBackwardScratch {
  using T = typename P::Value;
  T* grad_x;  // [round_up(channels, size)][kLanes]
  typename P::Operand* grad_operand;
  std::size_t end;

  LinearResidualBackwardScratch(const LinearResidualBackward& args, typename P::Weight* left, void* memory) {
    Pieces pieces(memory);
    grad_x = pieces.take<T>(round_up(args.channels, Vec<T>::size) * kLanes);
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
void prepare(const LinearResidualBackward& args, int64_t capacity, void* memory) {
  const LinearResidualShared<P> shared(args, capacity, Pieces(memory));
  make_transposable<P>(shared.transposable, args.weight, args.out_channels, args.channels);
}

template <typename P, typename E>
void backward_block(const LinearResidualBackward& args, const RowStep& step, int64_t index, void* shared_memory,
                    void* memory) {
  using T = typename P::Value;
  const LinearResidualShared<P> shared(args, step.capacity, Pieces(shared_memory));
  auto* left = shared.weight.left + index * shared.weight.panel;
  const LinearResidualBackwardScratch<P> scratch(args, left, memory);
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);

  read_left_and_operand<P, E>(left, scratch.grad_operand, args.grad_out, block, args.out_channels);
  store_right<P, E>(shared.weight, index * kLanes, args.x, block, [](Vec<T> x, int64_t, int64_t, int) { return x; });
  product<P, Operand::column_major>(
      transposable<P>(shared.transposable, args.weight), args.channels, scratch.grad_operand, args.channels,
      args.out_channels, block.lanes,
      [&](auto& tile, int64_t row, int64_t lane) { store_tile(scratch.grad_x + row * kLanes + lane, kLanes, tile); });
  write_columns(tokens_of<E>(args.grad_x), block.first, block.count, args.channels, scratch.grad_x, kLanes);
}

template <typename P>
int64_t tiles(const LinearResidualBackward& args) {
  return tiles_of(LinearResidualShared<P>(args, 0, Pieces(nullptr)).weight);
}

template <typename P, typename E>
void backward_tile(const LinearResidualBackward& args, const RowStep& step, int64_t tile, void* memory) {
  const LinearResidualShared<P> shared(args, step.capacity, Pieces(memory));
  add_weight_gradient(shared.weight, step, tile, static_cast<E*>(args.grad_weight),
                      static_cast<typename P::Value*>(args.grad_bias));
}

template <typename P, typename E>
constexpr RowForward<LinearResidual> linear_residual_forward() {
  return {scratch_bytes<P>, forward_block<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LinearResidualBackward> linear_residual_backward() {
  return {group_rows<P>, shared_bytes<P>, scratch_bytes<P>, prepare<P>, backward_block<P, E>, tiles<P>, backward_tile<P, E>};
}

}  // namespace MVIT_ISA

extern const LinearResidualKernels MVIT_TABLE(linear_residual) = {MVIT_ROW_TABLE(linear_residual_forward),
                                                                  MVIT_ROW_TABLE(linear_residual_backward)};

}  // namespace mvit
