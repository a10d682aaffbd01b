// SPDX-License-Identifier: Apache-2.0
// Binding of layer_norm_linear.cuda: argument checks and allocation around row_product_kernel.cu.
#include <optional>
#include <string>
#include <tuple>

#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "layer_norm_linear";

std::tuple<Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                     const Tensor& norm_bias, const Tensor& weight,
                                                     std::optional<Tensor> bias, double eps, std::string activation) {
  STD_TORCH_CHECK(activation.empty() || activation == "silu", kOp, ": activation is '", activation,
                  "'; '' or 'silu' is wanted");
  Arguments read(kOp, x);
  const Device device(x);
  RowProduct args{};
  args.count = read.count();
  args.channels = read.channels("x", x.size(-1));
  args.out_channels = read.channels("weight", weight.dim() == 2 ? weight.size(0) : 0);
  args.silu = !activation.empty();
  args.x = read.read_rows("x", x, args.channels);
  args.norm = read.norm(norm_weight, norm_bias, eps);
  args.weight = read.read("weight", weight, {args.out_channels, args.channels});
  args.bias = bias ? read.read("bias", *bias, {args.out_channels}) : nullptr;
  Tensor out = read.new_rows(args.out_channels), mean = read.new_statistics(), rstd = read.new_statistics();
  args.out = out.mutable_data_ptr();
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  run_row_product(kOp, args, read.is_half(), device);
  return {out, mean, rstd};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("layer_norm_linear.cuda", TORCH_BOX(&mvit::layer_norm_linear));
}
