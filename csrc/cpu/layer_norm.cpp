// SPDX-License-Identifier: Apache-2.0
// Front end of layer_norm.cpu, layer_norm_from_statistics.cpu and layer_norm_backward.cpu: argument checks and allocation around
// layer_norm_kernel.cpp.
#include "layer_norm.h"

#include <tuple>

#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "layer_norm";
constexpr bool kPairs = false;  // there is no product
constexpr double kFlopsOfAValue = 16;

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                              double eps) {
  LayerNorm args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.eps = eps;
  const RowArithmetic arithmetic = arithmetic_of(kOp, x.scalar_type(), kPairs);

  const RowsOf x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.x = x_rows;
  args.norm_weight = read.values(norm_weight, args.channels);
  args.norm_bias = read.values(norm_bias, args.channels);

  Tensor out = new_rows(x, args.channels, x.scalar_type()), mean = new_rows(x, kNoChannels, wide_type(arithmetic)),
         rstd = new_rows(x, kNoChannels, wide_type(arithmetic));
  args.out = output_rows(out, args.channels);
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(layer_norm);
  run_forward(kernels.forward[static_cast<int>(arithmetic)], args, kFlopsOfAValue * static_cast<double>(args.channels));
  return {std::move(out), std::move(mean), std::move(rstd)};
}

Tensor layer_norm_from_statistics(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight,
                                  const Tensor& norm_bias) {
  LayerNormFromStatistics args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  const RowArithmetic arithmetic = arithmetic_of(kOp, x.scalar_type(), kPairs);

  const RowsOf x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.x = x_rows;
  args.mean = statistics(kOp, "mean", mean, args.count, wide_type(arithmetic));
  args.rstd = statistics(kOp, "rstd", rstd, args.count, wide_type(arithmetic));
  args.norm_weight = read.values(norm_weight, args.channels);
  args.norm_bias = read.values(norm_bias, args.channels);

  Tensor out = new_rows(x, args.channels, x.scalar_type());
  args.out = output_rows(out, args.channels);
  const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(layer_norm);
  run_forward(kernels.from_statistics[static_cast<int>(arithmetic)], args,
              kFlopsOfAValue * static_cast<double>(args.channels));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const Tensor& norm_weight) {
  LayerNormBackward args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  const RowArithmetic arithmetic = arithmetic_of(kOp, x.scalar_type(), kPairs);
  const ScalarType wide = wide_type(arithmetic), type = norm_weight.scalar_type();

  check_rows(kOp, "grad_out", grad_out, x, args.channels);
  const RowsOf grad_out_rows(kOp, "grad_out", grad_out, x), x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.grad_out = grad_out_rows;
  args.x = x_rows;
  args.mean = statistics(kOp, "mean", mean, args.count, wide);
  args.rstd = statistics(kOp, "rstd", rstd, args.count, wide);
  args.norm_weight = read.values(norm_weight, args.channels);

  Tensor grad_x = new_rows(x, args.channels, x.scalar_type());
  const VectorGradient grad_norm_weight(x, args.channels, type, wide), grad_norm_bias(x, args.channels, type, wide);
  args.grad_x = output_rows(grad_x, args.channels);
  args.grad_norm_weight = grad_norm_weight.sums();
  args.grad_norm_bias = grad_norm_bias.sums();
  if (args.count == 0) {
    for (const Tensor& grad : {grad_norm_weight.tensor, grad_norm_bias.tensor}) fill_with_zeros(grad);
  } else {
    const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(layer_norm);
    run_backward(kernels.backward[static_cast<int>(arithmetic)], args,
                 2 * kFlopsOfAValue * static_cast<double>(args.channels));
  }
  return {std::move(grad_x), grad_norm_weight.finish(), grad_norm_bias.finish()};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("layer_norm.cpu", TORCH_BOX(&mvit::layer_norm));
  m.impl("layer_norm_from_statistics.cpu", TORCH_BOX(&mvit::layer_norm_from_statistics));
  m.impl("layer_norm_backward.cpu", TORCH_BOX(&mvit::layer_norm_backward));
}
