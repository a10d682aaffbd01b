// SPDX-License-Identifier: Apache-2.0
// Front end of linear_residual.cpu and linear_residual_backward.cpu: argument checks and allocation around
// linear_residual_kernel.cpp.
#include "linear_residual.h"

#include <optional>
#include <tuple>

#include "float16.h"
#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "linear_residual";

Tensor linear_residual(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& residual) {
  LinearResidual args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.out_channels = weight.dim() == 2 ? weight.size(0) : 0;
  const int64_t channels = args.channels, out_channels = args.out_channels;
  const RowArithmetic arithmetic = arithmetic_of(kOp, x.scalar_type(), channels % 2 == 0 && out_channels % 2 == 0);

  check_rows(kOp, "residual", residual, x, out_channels);
  const RowsOf x_rows(kOp, "x", x, x), residual_rows(kOp, "residual", residual, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.x = x_rows;
  args.residual = residual_rows;
  args.weight = read.matrix(weight, out_channels, channels);
  args.bias = bias ? read.values(*bias, out_channels) : nullptr;

  Tensor out = new_rows(x, out_channels, x.scalar_type());
  if (out_channels == 0) return out;  // whatever the number of rows
  args.out = output_rows(out, out_channels);
  const auto& kernels = MVIT_KERNELS_FOR(linear_residual, arithmetic == RowArithmetic::bfloat16_pairs);
  run_forward(kernels.forward[static_cast<int>(arithmetic)], args, 2.0 * static_cast<double>(channels * out_channels));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x,
                                                            const Tensor& weight) {
  LinearResidualBackward args{};
  args.count = row_count(kOp, x);
  args.channels = x.size(-1);
  args.out_channels = weight.dim() == 2 ? weight.size(0) : 0;
  const int64_t channels = args.channels, out_channels = args.out_channels;
  const ScalarType type = x.scalar_type();
  const RowArithmetic arithmetic = arithmetic_of(kOp, type, channels % 2 == 0 && out_channels % 2 == 0);

  check_rows(kOp, "grad_out", grad_out, x, out_channels);
  const RowsOf grad_out_rows(kOp, "grad_out", grad_out, x), x_rows(kOp, "x", x, x);
  WeightReader read(kOp, matrix_type(arithmetic));
  args.grad_out = grad_out_rows;
  args.x = x_rows;
  args.weight = read.matrix(weight, out_channels, channels);

  Tensor grad_x = new_rows(x, channels, type), grad_weight = new_empty(x, {out_channels, channels}, type);
  const VectorGradient grad_bias(x, out_channels, type, wide_type(arithmetic));
  args.grad_x = output_rows(grad_x, channels);
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_bias = grad_bias.sums();
  if (args.count == 0) {
    for (const Tensor& grad : {grad_weight, grad_bias.tensor}) fill_with_zeros(grad);
  } else {
    const auto& kernels = MVIT_KERNELS_FOR(linear_residual, arithmetic == RowArithmetic::bfloat16_pairs);
    run_backward(kernels.backward[static_cast<int>(arithmetic)], args,
                 2.0 * 2 * static_cast<double>(channels * out_channels));
  }
  return {std::move(grad_x), std::move(grad_weight), grad_bias.finish()};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  using namespace mvit;
  m.impl("linear_residual.cpu", TORCH_BOX((&WithFloat16<&linear_residual, 0>::call)));
  m.impl("linear_residual_backward.cpu", TORCH_BOX((&WithFloat16<&linear_residual_backward, 1, 2, 2>::call)));
}
