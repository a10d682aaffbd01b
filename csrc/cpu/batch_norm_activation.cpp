// SPDX-License-Identifier: Apache-2.0
// Front end of batch_norm_activation.cpu and batch_norm_activation_backward.cpu: argument checks, memory and threads around
// batch_norm_activation_kernel.cpp.
#include "batch_norm_activation.h"

#include <string>
#include <tuple>

#include "float16.h"
#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "batch_norm_activation";
constexpr double kFlopsOfAValue = 16;  // of one pass

// ---- the map --------------------------------------------------------------------------------------------------------

enum class Format { channels_last, contiguous, other };

// Whether the axes, from the innermost to the outermost, lie in memory without a gap.
bool is_dense(const Tensor& x, std::initializer_list<int> innermost_first) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t stride = 1;
  for (const int axis : innermost_first) {
    if (sizes[axis] != 1 && strides[axis] != stride) return false;
    stride *= sizes[axis];
  }
  return true;
}

Format format_of(const Tensor& x) {
  if (is_dense(x, {1, 3, 2, 0})) return Format::channels_last;
  return is_dense(x, {3, 2, 1, 0}) ? Format::contiguous : Format::other;
}

bool is_silu(const std::string& activation) {
  STD_TORCH_CHECK(activation.empty() || activation == "silu", kOp, ": activation is neither empty nor 'silu'");
  return !activation.empty();
}

// The map x and its format; an empty one has none.
struct Map4 {
  int64_t channels;
  Format format;
  RowArithmetic arithmetic;
  Pixels pixels;

  explicit Map4(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, kOp, ": x is not an (N, C, H, W) map on the CPU");
    channels = x.size(1);
    arithmetic = arithmetic_of(kOp, x.scalar_type(), false);
    if (x.numel() == 0) return;
    format = format_of(x);
    STD_TORCH_CHECK(format != Format::other, kOp, ": x is neither channels-last nor contiguous");
    const int64_t images = x.size(0), plane = x.size(2) * x.size(3);
    pixels = format == Format::channels_last ? Pixels{1, 0, images * plane, channels}
                                             : Pixels{images, channels * plane, plane, 1};
  }
};

void run(const BatchNormActivationPasses& passes, const BatchNormActivation& args, const Map4& map) {
  const Pixels& pixels = args.pixels;
  const std::size_t scratch_bytes = passes.scratch_bytes(pixels), shared_bytes = passes.shared_bytes(pixels);
  if (map.format == Format::contiguous) {  // a channel's planes stay in a core's cache between the passes
    const double values = static_cast<double>(pixels.images) * static_cast<double>(pixels.rows);
    return parallel_for(map.channels, 2 * kFlopsOfAValue * values, [&](int64_t begin, int64_t end) {
      const Scratch shared(shared_bytes, ScratchUse::shared), scratch(scratch_bytes);
      passes.planes(args, begin, end, shared.data(), scratch.data());
    });
  }
  const int64_t blocks = passes.blocks(pixels);
  const double flops = kFlopsOfAValue * static_cast<double>(pixels.rows) * static_cast<double>(pixels.channels);
  const Scratch shared(shared_bytes, ScratchUse::shared);
  // Both passes are shared out alike: a thread finds its part of the map in its own cache.
  parallel_for(blocks, flops / static_cast<double>(blocks), [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    passes.sum(args, begin, end, shared.data(), scratch.data());
  });
  passes.combine(args, shared.data(), nullptr);
  parallel_for(blocks, flops / static_cast<double>(blocks), [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    passes.write(args, begin, end, scratch.data());
  });
}

// ---- the operators --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_activation(const Tensor& x, const Tensor& weight,
                                                                 const Tensor& bias, double eps,
                                                                 std::string activation) {
  const Map4 map(x);
  const ScalarType wide = wide_type(map.arithmetic);
  BatchNormActivation args{};
  args.silu = is_silu(activation);
  args.eps = eps;
  WeightReader read(kOp, matrix_type(map.arithmetic));
  args.weight = read.values(weight, map.channels);
  args.bias = read.values(bias, map.channels);

  Tensor out = torch::stable::empty_like(x), mean = new_empty(x, {map.channels}, wide),
         rstd = new_empty(x, {map.channels}, wide), variance = new_empty(x, {map.channels}, wide);
  if (x.numel() == 0) {
    for (const Tensor& statistic : {mean, rstd, variance}) fill_with_zeros(statistic);
  } else {
    args.pixels = map.pixels;
    args.x = x.const_data_ptr();
    args.out = out.mutable_data_ptr();
    args.mean = mean.mutable_data_ptr();
    args.rstd = rstd.mutable_data_ptr();
    args.variance = variance.mutable_data_ptr();
    const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(batch_norm_activation);
    run(kernels.forward[static_cast<int>(map.arithmetic)], args, map);
  }
  return {std::move(out), std::move(mean), std::move(rstd), std::move(variance)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_backward(const Tensor& grad_out, const Tensor& x,
                                                                  const Tensor& mean, const Tensor& rstd,
                                                                  const Tensor& weight, const Tensor& bias,
                                                                  std::string activation) {
  const Map4 map(x);
  const ScalarType wide = wide_type(map.arithmetic);
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == x.scalar_type() && grad_out.dim() == 4, kOp,
                  ": grad_out is not of x's dtype, device and shape");
  for (int axis = 0; axis < 4; ++axis)
    STD_TORCH_CHECK(grad_out.size(axis) == x.size(axis), kOp, ": grad_out is not of x's shape");
  BatchNormActivation args{};
  args.silu = is_silu(activation);
  WeightReader read(kOp, matrix_type(map.arithmetic));
  args.weight = read.values(weight, map.channels);
  args.bias = read.values(bias, map.channels);
  args.mean = const_cast<void*>(statistics(kOp, "mean", mean, map.channels, wide));
  args.rstd = const_cast<void*>(statistics(kOp, "rstd", rstd, map.channels, wide));

  Tensor grad_x = torch::stable::empty_like(x);
  const VectorGradient grad_weight(x, map.channels, weight.scalar_type(), wide),
      grad_bias(x, map.channels, bias.scalar_type(), wide);
  if (x.numel() == 0) {
    for (const Tensor& grad : {grad_weight.tensor, grad_bias.tensor}) fill_with_zeros(grad);
    return {std::move(grad_x), grad_weight.tensor, grad_bias.tensor};
  }
  Tensor grad = grad_out;
  const bool same = map.format == Format::channels_last ? is_dense(grad_out, {1, 3, 2, 0}) : is_dense(grad_out, {3, 2, 1, 0});
  if (!same) {  // such as the expanded gradient of a mean
    grad = torch::stable::empty_like(x);
    torch::stable::copy_(grad, grad_out);
  }
  args.pixels = map.pixels;
  args.x = x.const_data_ptr();
  args.grad_out = grad.const_data_ptr();
  args.out = grad_x.mutable_data_ptr();
  args.grad_weight = grad_weight.sums();
  args.grad_bias = grad_bias.sums();
  const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(batch_norm_activation);
  run(kernels.backward[static_cast<int>(map.arithmetic)], args, map);
  return {std::move(grad_x), grad_weight.finish(), grad_bias.finish()};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  using namespace mvit;
  m.impl("batch_norm_activation.cpu",
         TORCH_BOX((&WithFloat16<&batch_norm_activation, 0, kFloat32, kFloat32, kFloat32>::call)));
  m.impl("batch_norm_activation_backward.cpu", TORCH_BOX((&WithFloat16<&batch_norm_activation_backward, 1, 4, 5>::call)));
}
