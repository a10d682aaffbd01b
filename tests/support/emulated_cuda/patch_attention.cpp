// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_patch_attention.py: launches the kernels of patch_attention.
#include <patch_attention_backward_kernel.cu>
#include <patch_attention_backward_whole_kernel.cu>
#include <patch_attention_kernel.cu>

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

}  // namespace
}  // namespace mvit

using namespace mvit;

// With MVIT_ONLY_BFLOAT16, only the bfloat16 kernels are compiled.
#ifdef MVIT_ONLY_BFLOAT16
constexpr bool kHalf = false;
#else
constexpr bool kHalf = true;
#endif

extern "C" {

const char* forward(uint64_t seed, void* qkv, int64_t image, int64_t row, int64_t column, void* out, int64_t out_image,
                    int64_t out_row, int64_t out_column, float* logsumexp, int64_t images, int64_t patch_rows,
                    int64_t patch_columns, int64_t patch_height, int64_t patch_width, int64_t heads, int64_t head_dim,
                    double scale, int64_t copy_bytes, int64_t half) {
  const PatchAttentionForward args{
      shape_of(images, patch_rows, patch_columns, patch_height, patch_width, heads, head_dim, scale),
      {qkv, image, row, column},
      {out, out_image, out_row, out_column},
      logsumexp};
  emulation::seed = seed;
  const auto launch = half ? launch_patch_attention<kHalf> : launch_patch_attention<false>;
  launch(args, static_cast<int>(copy_bytes), nullptr);
  return emulation_result(emulation::last_report);
}

const char* backward(uint64_t seed, void* grad_out, int64_t grad_image, int64_t grad_row, int64_t grad_column,
                     void* qkv, int64_t image, int64_t row, int64_t column, void* out, int64_t out_image,
                     int64_t out_row, int64_t out_column, const float* logsumexp, void* grad_qkv,
                     int64_t grad_qkv_image, int64_t grad_qkv_row, int64_t grad_qkv_column, int64_t images,
                     int64_t patch_rows, int64_t patch_columns, int64_t patch_height, int64_t patch_width,
                     int64_t heads, int64_t head_dim, double scale, int64_t copy_bytes, int64_t half, int64_t whole) {
  const PatchAttentionBackward args{
      shape_of(images, patch_rows, patch_columns, patch_height, patch_width, heads, head_dim, scale),
      {qkv, image, row, column},
      {out, out_image, out_row, out_column},
      {grad_out, grad_image, grad_row, grad_column},
      {grad_qkv, grad_qkv_image, grad_qkv_row, grad_qkv_column},
      logsumexp};
  emulation::seed = seed;
  const auto launch = whole
                          ? (half ? launch_patch_attention_backward_whole<kHalf>
                                  : launch_patch_attention_backward_whole<false>)
                          : (half ? launch_patch_attention_backward<kHalf> : launch_patch_attention_backward<false>);
  launch(args, static_cast<int>(copy_bytes), nullptr);
  return emulation_result(emulation::last_report);
}

}  // extern "C"
