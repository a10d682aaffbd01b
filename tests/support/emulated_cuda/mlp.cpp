// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_mlp.py: launches the kernels of layer_norm_mlp.
#include <few_rows_mlp_kernel.cu>
#include <layer_norm_mlp_kernel.cu>

using namespace mvit;

// With MVIT_ONLY_BFLOAT16, only the bfloat16 kernels are compiled.
#ifdef MVIT_ONLY_BFLOAT16
constexpr bool kHalf = false;
#else
constexpr bool kHalf = true;
#endif

extern "C" {

// few_rows: the most rows that are few; the default if it is negative.
const char* layer_norm_mlp(uint64_t seed, const void* x, const void* norm_weight, const void* norm_bias,
                           const void* fc1_weight, const void* fc1_bias, const void* fc2_weight, const void* fc2_bias,
                           void* out, float* mean, float* rstd, int64_t count, int64_t channels,
                           int64_t hidden_channels, double eps, int64_t norm_in_float, int64_t multiprocessors,
                           int64_t shared_limit, int64_t few_rows, int64_t half) {
  RowMlp args{};
  args.x = x, args.fc1_weight = fc1_weight, args.fc1_bias = fc1_bias, args.fc2_weight = fc2_weight;
  args.fc2_bias = fc2_bias, args.out = out, args.mean = mean, args.rstd = rstd;
  args.count = count;
  args.channels = static_cast<int>(channels), args.hidden_channels = static_cast<int>(hidden_channels);
  args.norm = {norm_weight, norm_bias, norm_in_float != 0, norm_in_float != 0, static_cast<float>(eps)};
  const RowMlpPlan plan =
      plan_row_mlp(count, args.channels, args.hidden_channels, static_cast<int>(multiprocessors),
                   static_cast<int>(shared_limit), few_rows < 0 ? kFewMlpRows : few_rows);
  emulation::seed = seed;
  if (plan.few)
    (half ? launch_few_rows_mlp<kHalf> : launch_few_rows_mlp<false>)(args, plan, nullptr);
  else
    (half ? launch_layer_norm_mlp<kHalf> : launch_layer_norm_mlp<false>)(args, plan, nullptr);
  return emulation_result(emulation::last_report);
}

}  // extern "C"
