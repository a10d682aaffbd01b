// SPDX-License-Identifier: Apache-2.0
// Binding of linear_residual.cuda: argument checks and allocation around row_product_kernel.cu.
#include <optional>

#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "linear_residual";

Tensor linear_residual(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& residual) {
  Arguments read(kOp, x);
  const Device device(x);
  RowProduct args{};
  args.count = read.count();
  args.channels = read.channels("x", x.size(-1));
  args.out_channels = read.channels("weight", weight.dim() == 2 ? weight.size(0) : 0);
  args.x = read.read_rows("x", x, args.channels);
  args.weight = read.read("weight", weight, {args.out_channels, args.channels});
  args.bias = bias ? read.read("bias", *bias, {args.out_channels}) : nullptr;
  args.residual = read.read_rows("residual", residual, args.out_channels);
  Tensor out = read.new_rows(args.out_channels);
  args.out = out.mutable_data_ptr();
  run_row_product(kOp, args, read.is_half(), device);
  return out;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("linear_residual.cuda", TORCH_BOX(&mvit::linear_residual));
}
