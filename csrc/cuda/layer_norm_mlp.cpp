// SPDX-License-Identifier: Apache-2.0
// Binding of layer_norm_mlp.cuda: argument checks and allocation around layer_norm_mlp_kernel.cu and
// few_rows_mlp_kernel.cu.
#include <tuple>

#include "layer_norm_mlp.h"
#include "row_fronts.h"

namespace mvit {
namespace {

constexpr const char* kOp = "layer_norm_mlp";

std::tuple<Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                                  const Tensor& fc1_weight, const Tensor& fc1_bias,
                                                  const Tensor& fc2_weight, const Tensor& fc2_bias, double eps) {
  Arguments read(kOp, x);
  const Device device(x);
  RowMlp args{};
  args.count = read.count();
  args.channels = read.channels("x", x.size(-1));
  args.hidden_channels = read.channels("fc1_weight", fc1_weight.dim() == 2 ? fc1_weight.size(0) : 0);
  args.x = read.read_rows("x", x, args.channels);
  args.norm = read.norm(norm_weight, norm_bias, eps);
  args.fc1_weight = read.read("fc1_weight", fc1_weight, {args.hidden_channels, args.channels});
  args.fc1_bias = read.read("fc1_bias", fc1_bias, {args.hidden_channels});
  args.fc2_weight = read.read("fc2_weight", fc2_weight, {args.channels, args.hidden_channels});
  args.fc2_bias = read.read("fc2_bias", fc2_bias, {args.channels});
  Tensor out = read.new_rows(args.channels), mean = read.new_statistics(), rstd = read.new_statistics();
  args.out = out.mutable_data_ptr();
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (args.count > 0) {
    const Limits limits(kOp);
    const RowMlpPlan plan = plan_row_mlp(args.count, args.channels, args.hidden_channels, limits.multiprocessors,
                                         limits.shared_bytes);
    STD_TORCH_CHECK(plan.shared_bytes <= limits.shared_bytes, kOp, ": rows of ", args.channels, " channels want ",
                    plan.shared_bytes, " bytes of shared memory, and this GPU has ", limits.shared_bytes);
    const auto launch = read.is_half() ? (plan.few ? launch_few_rows_mlp<true> : launch_layer_norm_mlp<true>)
                                       : (plan.few ? launch_few_rows_mlp<false> : launch_layer_norm_mlp<false>);
    check_launch(kOp, launch(args, plan, device.stream()));
  }
  return {out, mean, rstd};
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("layer_norm_mlp.cuda", TORCH_BOX(&mvit::layer_norm_mlp));
}
