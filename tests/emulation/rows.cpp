// SPDX-License-Identifier: Apache-2.0
// Launches of the row-wise operators' kernels by emulation, as csrc/cuda/row_launch.h launches them.
#include <layer_norm_mlp_kernel.h>
#include <row_product_kernel.h>

namespace mvit {
namespace {

template <typename T>
std::string product(uint64_t seed, const RowProduct& args, const RowProductPlan& plan) {
  const int64_t rows = 32 * plan.warps;
  return emulation::emulate(seed, (args.count + rows - 1) / rows, plan.blocks_y, 32 * plan.warps, plan.shared_bytes,
                            args.residual ? row_product_kernel<T, false> : row_product_kernel<T, true>, args, plan);
}

template <typename T>
std::string mlp(uint64_t seed, const RowMlp& args) {
  return emulation::emulate(seed, (args.count + kMlpRows - 1) / kMlpRows, 1, 32 * kMlpWarps,
                            row_mlp_shared_bytes(args.channels), layer_norm_mlp_kernel<T>, args);
}

}  // namespace
}  // namespace mvit

using namespace mvit;

// With MVIT_ONLY, bfloat16 alone.
#ifdef MVIT_ONLY
using HalfIfCompiled = BFloat16;
#else
using HalfIfCompiled = Half;
#endif

extern "C" {

const char* layer_norm_linear(uint64_t seed, const void* x, const void* norm_weight, const void* norm_bias,
                              const void* weight, const void* bias, void* out, float* mean, float* rstd, int64_t count,
                              int64_t channels, int64_t out_channels, double eps, int64_t silu, int64_t norm_in_float,
                              int64_t multiprocessors, int64_t shared_limit, int64_t half) {
  RowProduct args{};
  args.x = x, args.weight = weight, args.bias = bias, args.out = out, args.mean = mean, args.rstd = rstd;
  args.count = count;
  args.channels = static_cast<int>(channels), args.out_channels = static_cast<int>(out_channels);
  args.silu = silu != 0;
  args.norm = {norm_weight, norm_bias, norm_in_float != 0, norm_in_float != 0, static_cast<float>(eps)};
  const RowProductPlan plan = plan_row_product(count, args.channels, args.out_channels, static_cast<int>(multiprocessors),
                                               static_cast<int>(shared_limit));
  return emulation_result(half ? product<HalfIfCompiled>(seed, args, plan) : product<BFloat16>(seed, args, plan));
}

const char* linear_residual(uint64_t seed, const void* x, const void* weight, const void* bias, const void* residual,
                            void* out, int64_t count, int64_t channels, int64_t out_channels, int64_t multiprocessors,
                            int64_t shared_limit, int64_t half) {
  RowProduct args{};
  args.x = x, args.weight = weight, args.bias = bias, args.out = out, args.residual = residual;
  args.count = count;
  args.channels = static_cast<int>(channels), args.out_channels = static_cast<int>(out_channels);
  const RowProductPlan plan = plan_row_product(count, args.channels, args.out_channels, static_cast<int>(multiprocessors),
                                               static_cast<int>(shared_limit));
  return emulation_result(half ? product<HalfIfCompiled>(seed, args, plan) : product<BFloat16>(seed, args, plan));
}

const char* layer_norm_mlp(uint64_t seed, const void* x, const void* norm_weight, const void* norm_bias,
                           const void* fc1_weight, const void* fc1_bias, const void* fc2_weight, const void* fc2_bias,
                           void* out, float* mean, float* rstd, int64_t count, int64_t channels, int64_t hidden_channels,
                           double eps, int64_t norm_in_float, int64_t half) {
  RowMlp args{};
  args.x = x, args.fc1_weight = fc1_weight, args.fc1_bias = fc1_bias, args.fc2_weight = fc2_weight;
  args.fc2_bias = fc2_bias, args.out = out, args.mean = mean, args.rstd = rstd;
  args.count = count;
  args.channels = static_cast<int>(channels), args.hidden_channels = static_cast<int>(hidden_channels);
  args.norm = {norm_weight, norm_bias, norm_in_float != 0, norm_in_float != 0, static_cast<float>(eps)};
  return emulation_result(half ? mlp<HalfIfCompiled>(seed, args) : mlp<BFloat16>(seed, args));
}

}  // extern "C"
