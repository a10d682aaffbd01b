// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_rows.py: launches row_product_kernel.cu. With MVIT_ONLY_BFLOAT16, only those of
// bfloat16 are compiled.
#include <row_product_kernel.cu>

using namespace mvit;

#ifdef MVIT_ONLY_BFLOAT16
constexpr bool kHalf = false;
#else
constexpr bool kHalf = true;
#endif

extern "C" {

// Row products are planned for a GPU of so many multiprocessors and so much shared memory; or, if the latter is
// negative, they have the plan that was set here.
static int64_t set_plan[4];
static RowProductPlan plan_for(const RowProduct& args, int64_t multiprocessors, int64_t shared_limit) {
  if (shared_limit >= 0)
    return plan_row_product(args, static_cast<int>(multiprocessors), static_cast<int>(shared_limit));
  return row_product_plan(args, static_cast<int>(set_plan[0]), static_cast<int>(set_plan[1]), set_plan[2],
                          static_cast<int>(set_plan[3]));
}

const char* set_row_product_plan(uint64_t, int64_t row_tiles, int64_t warps, int64_t blocks_x, int64_t groups) {
  set_plan[0] = row_tiles, set_plan[1] = warps, set_plan[2] = blocks_x, set_plan[3] = groups;
  return nullptr;
}

// The plan of layer_norm_linear (normed) or linear_residual, as seven numbers.
const char* planned_row_product(uint64_t, int64_t* numbers, int64_t count, int64_t channels, int64_t out_channels,
                                int64_t normed, int64_t multiprocessors, int64_t shared_limit) {
  RowProduct args{};
  args.count = count;
  args.channels = static_cast<int>(channels), args.out_channels = static_cast<int>(out_channels);
  args.residual = normed ? nullptr : numbers;
  const auto plan = plan_for(args, multiprocessors, shared_limit);
  const int of_plan[] = {plan.row_tiles, plan.warps,       plan.blocks_x,    plan.groups,
                         plan.blocks_y,  plan.depth_tiles, plan.shared_bytes};
  for (const int number : of_plan) *numbers++ = number;
  return nullptr;
}

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
  const auto plan = plan_for(args, multiprocessors, shared_limit);
  emulation::seed = seed;
  (half ? launch_row_product<kHalf> : launch_row_product<false>)(args, plan, nullptr);
  return emulation_result(emulation::last_report);
}

const char* linear_residual(uint64_t seed, const void* x, const void* weight, const void* bias, const void* residual,
                            void* out, int64_t count, int64_t channels, int64_t out_channels, int64_t multiprocessors,
                            int64_t shared_limit, int64_t half) {
  RowProduct args{};
  args.x = x, args.weight = weight, args.bias = bias, args.out = out, args.residual = residual;
  args.count = count;
  args.channels = static_cast<int>(channels), args.out_channels = static_cast<int>(out_channels);
  const auto plan = plan_for(args, multiprocessors, shared_limit);
  emulation::seed = seed;
  (half ? launch_row_product<kHalf> : launch_row_product<false>)(args, plan, nullptr);
  return emulation_result(emulation::last_report);
}

}  // extern "C"
