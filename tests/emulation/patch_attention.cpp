// SPDX-License-Identifier: Apache-2.0
// Launches of patch_attention's kernels by emulation, as csrc/cuda/patch_attention_launch.h launches them.
#include <patch_attention_backward_kernel.h>
#include <patch_attention_backward_whole_kernel.h>
#include <patch_attention_kernel.h>

namespace mvit {
namespace {

PatchAttentionShape shape_of(int64_t images, int64_t patch_rows, int64_t patch_columns, int64_t patch_height,
                             int64_t patch_width, int64_t heads, int64_t head_dim, double scale) {
  PatchAttentionShape shape{};
  shape.strands = static_cast<int>(images * patch_height * patch_width * heads);
  shape.heads = static_cast<int>(heads);
  shape.head_dim = static_cast<int>(head_dim);
  shape.tokens = static_cast<int>(patch_rows * patch_columns);
  shape.patch_height = static_cast<int>(patch_height);
  shape.patch_width = static_cast<int>(patch_width);
  shape.columns = static_cast<int>(patch_columns);
  shape.scale = static_cast<float>(scale);
  return shape;
}

// With MVIT_ONLY, of that padded head dim and in bfloat16 alone.
template <typename F>
auto for_compiled_head_dim(int padded, const F& f) {
#ifdef MVIT_ONLY
  return padded == MVIT_ONLY ? f(std::integral_constant<int, MVIT_ONLY>{}) : "not compiled";
#else
  return for_padded_head_dim(padded, f);
#endif
}
template <typename T>
std::string forward(uint64_t seed, const PatchAttentionForward& args, int copy_bytes) {
  const int padded = padded_head_dim(args.shape.head_dim);
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_compiled_head_dim(padded, [&](auto d) {
    constexpr int D = decltype(d)::value;
    return emulation::emulate(seed, plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens), plan.threads(),
                              patch_attention_shared_bytes(plan, padded),
                              patch_attention_kernel<T, D, tiles_of_warp(D)>, args, plan);
  });
}

template <typename T>
std::string backward(uint64_t seed, const PatchAttentionBackward& args, int copy_bytes, bool whole) {
  const int padded = padded_head_dim(args.shape.head_dim);
  if (whole) {
    const PatchAttentionPlan plan = plan_patch_attention_backward_whole(args.shape, copy_bytes);
    return for_compiled_head_dim(padded, [&](auto d) {
      constexpr int D = decltype(d)::value;
      return emulation::emulate(seed, plan.blocks_x(args.shape.strands), 1, plan.threads(),
                                patch_attention_backward_whole_shared_bytes(plan, padded),
                                patch_attention_backward_whole_kernel<T, D, tiles_of_warp(D)>, args, plan);
    });
  }
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_compiled_head_dim(padded, [&](auto d) {
    constexpr int D = decltype(d)::value;
    return emulation::emulate(seed, plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens), plan.threads(),
                              patch_attention_backward_shared_bytes(plan, padded, args.shape.tokens),
                              patch_attention_backward_kernel<T, D, tiles_of_warp(D)>, args, plan);
  });
}

}  // namespace
}  // namespace mvit

#ifdef MVIT_ONLY
using HalfIfCompiled = mvit::BFloat16;
#else
using HalfIfCompiled = mvit::Half;
#endif

extern "C" {

const char* forward(uint64_t seed, void* qkv, int64_t image, int64_t row, int64_t column, void* out,
                               int64_t out_image, int64_t out_row, int64_t out_column, float* logsumexp, int64_t images,
                               int64_t patch_rows, int64_t patch_columns, int64_t patch_height, int64_t patch_width,
                               int64_t heads, int64_t head_dim, double scale, int64_t copy_bytes, int64_t half) {
  const mvit::PatchAttentionForward args{
      mvit::shape_of(images, patch_rows, patch_columns, patch_height, patch_width, heads, head_dim, scale),
      {qkv, image, row, column},
      {out, out_image, out_row, out_column},
      logsumexp};
  const auto launch = half ? mvit::forward<HalfIfCompiled> : mvit::forward<mvit::BFloat16>;
  return emulation_result(launch(seed, args, static_cast<int>(copy_bytes)));
}

const char* backward(uint64_t seed, void* grad_out, int64_t grad_image, int64_t grad_row, int64_t grad_column, void* qkv,
                     int64_t image, int64_t row, int64_t column, void* out, int64_t out_image, int64_t out_row,
                     int64_t out_column, const float* logsumexp, void* grad_qkv, int64_t grad_qkv_image,
                     int64_t grad_qkv_row, int64_t grad_qkv_column, int64_t images, int64_t patch_rows,
                     int64_t patch_columns, int64_t patch_height, int64_t patch_width, int64_t heads, int64_t head_dim,
                     double scale, int64_t copy_bytes, int64_t half, int64_t whole) {
  const mvit::PatchAttentionBackward args{
      mvit::shape_of(images, patch_rows, patch_columns, patch_height, patch_width, heads, head_dim, scale),
      {qkv, image, row, column},
      {out, out_image, out_row, out_column},
      {grad_out, grad_image, grad_row, grad_column},
      {grad_qkv, grad_qkv_image, grad_qkv_row, grad_qkv_column},
      logsumexp};
  const auto launch = half ? mvit::backward<HalfIfCompiled> : mvit::backward<mvit::BFloat16>;
  return emulation_result(launch(seed, args, static_cast<int>(copy_bytes), whole != 0));
}

}  // extern "C"
