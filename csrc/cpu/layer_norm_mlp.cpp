// SPDX-License-Identifier: Apache-2.0
// Front end of layer_norm_mlp.cpu and layer_norm_mlp_backward.cpu: argument checks and allocation around
// layer_norm_mlp_kernel.cpp.
#include "layer_norm_mlp.h"

#include <tuple>

#include "float16.h"
#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "layer_norm_mlp";

std::tuple<Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                                  const Tensor& fc1_weight, const Tensor& fc1_bias,
                                                  const Tensor& fc2_weight, const Tensor& fc2_bias, double eps) {
  LayerNormMlp args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.hidden = fc1_weight.dim() == 2 ? fc1_weight.size(0) : 0;
  args.eps = eps;
  const int64_t channels = args.channels, hidden = args.hidden;
  const ScalarType type = x.scalar_type();
  const RowArithmetic arithmetic = arithmetic_of(kOp, type, channels % 2 == 0 && hidden % 2 == 0);

  const RowsOf x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.x = x_rows;
  args.norm_weight = read.values(norm_weight, channels);
  args.norm_bias = read.values(norm_bias, channels);
  args.fc1_weight = read.matrix(fc1_weight, hidden, channels);
  args.fc1_bias = read.values(fc1_bias, hidden);
  args.fc2_weight = read.matrix(fc2_weight, channels, hidden);
  args.fc2_bias = read.values(fc2_bias, channels);

  Tensor out = new_rows(x, channels, type), mean = new_rows(x, kNoChannels, wide_type(arithmetic)),
         rstd = new_rows(x, kNoChannels, wide_type(arithmetic));
  args.out = output_rows(out, channels);
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  const auto& kernels = MVIT_KERNELS_FOR(layer_norm_mlp, arithmetic == RowArithmetic::bfloat16_pairs);
  run_forward(kernels.forward[static_cast<int>(arithmetic)], args, 2.0 * 2 * static_cast<double>(channels * hidden));
  return {std::move(out), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_mlp_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight) {
  LayerNormMlpBackward args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.hidden = fc1_weight.dim() == 2 ? fc1_weight.size(0) : 0;
  const int64_t channels = args.channels, hidden = args.hidden;
  const ScalarType type = x.scalar_type();
  const RowArithmetic arithmetic = arithmetic_of(kOp, type, channels % 2 == 0 && hidden % 2 == 0);
  const ScalarType wide = wide_type(arithmetic);

  check_rows(kOp, "grad_out", grad_out, x, channels);
  const RowsOf grad_out_rows(kOp, "grad_out", grad_out, x), x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.grad_out = grad_out_rows;
  args.x = x_rows;
  args.mean = statistics(kOp, "mean", mean, args.count, wide);
  args.rstd = statistics(kOp, "rstd", rstd, args.count, wide);
  args.norm_weight = read.values(norm_weight, channels);
  args.norm_bias = read.values(norm_bias, channels);
  args.fc1_weight = read.matrix(fc1_weight, hidden, channels);
  args.fc1_bias = read.values(fc1_bias, hidden);
  args.fc2_weight = read.matrix(fc2_weight, channels, hidden);

  Tensor grad_x = new_rows(x, channels, type), grad_fc1_weight = new_empty(x, {hidden, channels}, type),
         grad_fc2_weight = new_empty(x, {channels, hidden}, type);
  const VectorGradient grad_norm_weight(x, channels, norm_weight.scalar_type(), wide),
      grad_norm_bias(x, channels, norm_bias.scalar_type(), wide), grad_fc1_bias(x, hidden, type, wide),
      grad_fc2_bias(x, channels, type, wide);
  args.grad_x = output_rows(grad_x, channels);
  args.grad_fc1_weight = grad_fc1_weight.mutable_data_ptr();
  args.grad_fc2_weight = grad_fc2_weight.mutable_data_ptr();
  args.grad_norm_weight = grad_norm_weight.sums();
  args.grad_norm_bias = grad_norm_bias.sums();
  args.grad_fc1_bias = grad_fc1_bias.sums();
  args.grad_fc2_bias = grad_fc2_bias.sums();
  if (args.count == 0) {
    for (const Tensor& grad : {grad_fc1_weight, grad_fc2_weight, grad_norm_weight.tensor, grad_norm_bias.tensor,
                               grad_fc1_bias.tensor, grad_fc2_bias.tensor})
      fill_with_zeros(grad);
  } else {
    const auto& kernels = MVIT_KERNELS_FOR(layer_norm_mlp, arithmetic == RowArithmetic::bfloat16_pairs);
    run_backward(kernels.backward[static_cast<int>(arithmetic)], args,
                 2.0 * 5 * static_cast<double>(channels * hidden));
  }
  return {std::move(grad_x), grad_norm_weight.finish(), grad_norm_bias.finish(), std::move(grad_fc1_weight),
          grad_fc1_bias.finish(), std::move(grad_fc2_weight), grad_fc2_bias.finish()};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  using namespace mvit;
  m.impl("layer_norm_mlp.cpu", TORCH_BOX((&WithFloat16<&layer_norm_mlp, 0, kFloat32, kFloat32>::call)));
  m.impl("layer_norm_mlp_backward.cpu", TORCH_BOX((&WithFloat16<&layer_norm_mlp_backward, 1, 4, 5, 6, 7, 8, 8>::call)));
}
