// SPDX-License-Identifier: Apache-2.0
// layer_norm on blocks of 32 rows, one row per lane, forward and backward. Relies on token_lanes.h and weight_gradients.h.
#include "layer_norm.h"
#include "weight_gradients.h"

namespace mvit {
namespace MVIT_ISA {

// There are no weights to prepare, and forward shares nothing between threads.
template <typename Args>
std::size_t nothing_shared(const Args&) {
  return 0;
}
template <typename Args>
int64_t no_parts(const Args&) {
  return 0;
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename P>
int64_t panel_size(int64_t channels) {
  return round_up(channels, Vec<typename P::Value>::size) * kLanes;
}

template <typename P>
std::size_t scratch_bytes(const LayerNorm& args) {
  return sizeof(typename P::Value) * panel_size<P>(args.channels);
}

template <typename P, typename E>
MVIT_INLINE void forward_block(const LayerNorm& args, int64_t index, void* memory) {
  using T = typename P::Value;
  T* panel = static_cast<T*>(memory);
  const Block<T> block(index * kLanes, args.count);
  T mean[kLanes], rstd[kLanes];
  read_block<E>(panel, args.x, block, args.channels);
  layer_norm<P>(panel, panel, args.channels, static_cast<const T*>(args.norm_weight),
                static_cast<const T*>(args.norm_bias), static_cast<T>(args.eps), block.lanes, mean, rstd);
  std::memcpy(static_cast<T*>(args.mean) + block.first, mean, sizeof(T) * block.count);
  std::memcpy(static_cast<T*>(args.rstd) + block.first, rstd, sizeof(T) * block.count);
  write_columns(tokens_of<E>(args.out), block.first, block.count, args.channels, panel, kLanes);
}

template <typename P, typename E>
void forward_blocks(const LayerNorm& args, int64_t begin, int64_t end, void*, void* memory) {
  for (int64_t index = begin; index < end; ++index) forward_block<P, E>(args, index, memory);
}

template <typename P>
std::size_t scratch_bytes(const LayerNormFromStatistics& args) {
  return sizeof(typename P::Value) * panel_size<P>(args.channels);
}

template <typename P, typename E>
MVIT_INLINE void from_statistics_block(const LayerNormFromStatistics& args, int64_t index, void* memory) {
  using T = typename P::Value;
  T* panel = static_cast<T*>(memory);
  const Block<T> block(index * kLanes, args.count);
  RowNormalisers<T> normalisers;
  read_normalised<E>(panel, normalisers, args.x, args.mean, args.rstd, block, args.channels);
  scale_and_shift<P>(panel, panel, args.channels, static_cast<const T*>(args.norm_weight),
                     static_cast<const T*>(args.norm_bias), block.lanes);
  write_columns(tokens_of<E>(args.out), block.first, block.count, args.channels, panel, kLanes);
}

template <typename P, typename E>
void from_statistics_blocks(const LayerNormFromStatistics& args, int64_t begin, int64_t end, void*, void* memory) {
  for (int64_t index = begin; index < end; ++index) from_statistics_block<P, E>(args, index, memory);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename P>
struct LayerNormShared {
  BlockSums<typename P::Value> norm;
  std::size_t end;

  LayerNormShared(const LayerNormBackward& args, int64_t capacity, Pieces pieces)
      : norm(pieces, args.channels, 2, capacity), end(pieces.next) {}
};

template <typename P>
std::size_t shared_bytes(const LayerNormBackward& args, int64_t capacity) {
  return LayerNormShared<P>(args, capacity, Pieces(nullptr)).end;
}

template <typename P>
std::size_t scratch_bytes(const LayerNormBackward& args) {
  return 2 * sizeof(typename P::Value) * panel_size<P>(args.channels);
}

template <typename P, typename E>
MVIT_INLINE void backward_block(const LayerNormBackward& args, const RowStep& step, int64_t index,
                                const LayerNormShared<P>& shared, void* memory) {
  using T = typename P::Value;
  T *normalised = static_cast<T*>(memory), *grad = normalised + panel_size<P>(args.channels);
  const Block<T> block(step.begin + index * kLanes, step.begin + step.rows);
  RowNormalisers<T> normalisers;
  read_normalised<E>(normalised, normalisers, args.x, args.mean, args.rstd, block, args.channels);
  read_block<E>(grad, args.grad_out, block, args.channels);
  layer_norm_backward<P>(grad, grad, static_cast<const T*>(nullptr), normalised, normalisers.rstd, args.channels,
                         static_cast<const T*>(args.norm_weight), block.lanes, shared.norm.of(index, 0),
                         shared.norm.of(index, 1));
  write_columns(tokens_of<E>(args.grad_x), block.first, block.count, args.channels, grad, kLanes);
}

template <typename P, typename E>
void backward_blocks(const LayerNormBackward& args, const RowStep& step, int64_t begin, int64_t end,
                     void* shared_memory, void* memory) {
  const LayerNormShared<P> shared(args, step.capacity, Pieces(shared_memory));
  for (int64_t index = begin; index < end; ++index) backward_block<P, E>(args, step, index, shared, memory);
}

template <typename P>
int64_t tiles(const LayerNormBackward&) {
  return 1;
}

template <typename P, typename E>
void backward_tiles(const LayerNormBackward& args, const RowStep& step, int64_t, int64_t, void* memory) {
  const LayerNormShared<P> shared(args, step.capacity, Pieces(memory));
  shared.norm.add_to(args.grad_norm_weight, 0, step);
  shared.norm.add_to(args.grad_norm_bias, 1, step);
}

template <typename P, typename E>
constexpr RowForward<LayerNorm> layer_norm_forward_of() {
  return {nothing_shared, scratch_bytes<P>, no_parts, nullptr, forward_blocks<P, E>};
}

template <typename P, typename E>
constexpr RowForward<LayerNormFromStatistics> layer_norm_from_statistics_of() {
  return {nothing_shared, scratch_bytes<P>, no_parts, nullptr, from_statistics_blocks<P, E>};
}

template <typename P, typename E>
constexpr RowBackward<LayerNormBackward> layer_norm_backward_of() {
  return {group_rows<P>, shared_bytes<P>,       scratch_bytes<P>, no_parts,
          nullptr,       backward_blocks<P, E>, tiles<P>,         backward_tiles<P, E>};
}

}  // namespace MVIT_ISA

extern const LayerNormKernels MVIT_TABLE(layer_norm) = {MVIT_ROW_TABLE(layer_norm_forward_of),
                                                        MVIT_ROW_TABLE(layer_norm_from_statistics_of),
                                                        MVIT_ROW_TABLE(layer_norm_backward_of)};

}  // namespace mvit
