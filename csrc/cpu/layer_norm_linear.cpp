// SPDX-License-Identifier: Apache-2.0
// Front end of layer_norm_linear.cpu and layer_norm_linear_backward.cpu: argument checks and allocation around
// layer_norm_linear_kernel.cpp.
#include "layer_norm_linear.h"

#include <optional>
#include <string>
#include <tuple>

#include "float16.h"
#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "layer_norm_linear";

bool is_silu(const std::string& activation) {
  STD_TORCH_CHECK(activation.empty() || activation == "silu", kOp, ": activation is '", activation,
                  "'; '' or 'silu' is wanted");
  return !activation.empty();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                     const Tensor& norm_bias, const Tensor& weight,
                                                     std::optional<Tensor> bias, double eps, std::string activation) {
  LayerNormLinear args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.out_channels = weight.dim() == 2 ? weight.size(0) : 0;
  args.eps = eps;
  args.silu = is_silu(activation);
  const int64_t channels = args.channels, out_channels = args.out_channels;
  const ScalarType type = x.scalar_type();
  const RowArithmetic arithmetic = arithmetic_of(kOp, type, channels % 2 == 0 && out_channels % 2 == 0);

  const RowsOf x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.x = x_rows;
  args.norm_weight = read.values(norm_weight, channels);
  args.norm_bias = read.values(norm_bias, channels);
  args.weight = read.matrix(weight, out_channels, channels);
  args.bias = bias ? read.values(*bias, out_channels) : nullptr;

  Tensor out = new_rows(x, out_channels, type), mean = new_rows(x, kNoChannels, wide_type(arithmetic)),
         rstd = new_rows(x, kNoChannels, wide_type(arithmetic));
  args.out = output_rows(out, out_channels);
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  const auto& kernels = MVIT_KERNELS_FOR(layer_norm_linear, arithmetic == RowArithmetic::bfloat16_pairs);
  run_forward(kernels.forward[static_cast<int>(arithmetic)], args, 2.0 * static_cast<double>(channels * out_channels));
  return {std::move(out), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_linear_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& weight, std::optional<Tensor> bias, std::string activation) {
  LayerNormLinearBackward args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.out_channels = weight.dim() == 2 ? weight.size(0) : 0;
  args.silu = is_silu(activation);
  const int64_t channels = args.channels, out_channels = args.out_channels;
  const ScalarType type = x.scalar_type();
  const RowArithmetic arithmetic = arithmetic_of(kOp, type, channels % 2 == 0 && out_channels % 2 == 0);
  const ScalarType wide = wide_type(arithmetic);

  check_rows(kOp, "grad_out", grad_out, x, out_channels);
  const RowsOf grad_out_rows(kOp, "grad_out", grad_out, x), x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.grad_out = grad_out_rows;
  args.x = x_rows;
  args.mean = statistics(kOp, "mean", mean, args.count, wide);
  args.rstd = statistics(kOp, "rstd", rstd, args.count, wide);
  args.norm_weight = read.values(norm_weight, channels);
  args.norm_bias = read.values(norm_bias, channels);
  args.weight = read.matrix(weight, out_channels, channels);
  args.bias = bias ? read.values(*bias, out_channels) : nullptr;

  Tensor grad_x = new_rows(x, channels, type), grad_weight = new_empty(x, {out_channels, channels}, type);
  const VectorGradient grad_norm_weight(x, channels, norm_weight.scalar_type(), wide),
      grad_norm_bias(x, channels, norm_bias.scalar_type(), wide), grad_bias(x, out_channels, type, wide);
  args.grad_x = output_rows(grad_x, channels);
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_norm_weight = grad_norm_weight.sums();
  args.grad_norm_bias = grad_norm_bias.sums();
  args.grad_bias = grad_bias.sums();
  if (args.count == 0) {
    for (const Tensor& grad : {grad_weight, grad_norm_weight.tensor, grad_norm_bias.tensor, grad_bias.tensor})
      fill_with_zeros(grad);
  } else {
    const auto& kernels = MVIT_KERNELS_FOR(layer_norm_linear, arithmetic == RowArithmetic::bfloat16_pairs);
    run_backward(kernels.backward[static_cast<int>(arithmetic)], args,
                 2.0 * (args.silu ? 3 : 2) * static_cast<double>(channels * out_channels));
  }
  return {std::move(grad_x), grad_norm_weight.finish(), grad_norm_bias.finish(), std::move(grad_weight),
          grad_bias.finish()};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  using namespace mvit;
  m.impl("layer_norm_linear.cpu", TORCH_BOX((&WithFloat16<&layer_norm_linear, 0, kFloat32, kFloat32>::call)));
  m.impl("layer_norm_linear_backward.cpu", TORCH_BOX((&WithFloat16<&layer_norm_linear_backward, 1, 4, 5, 6, 6>::call)));
}
