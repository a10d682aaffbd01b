// SPDX-License-Identifier: Apache-2.0
// Bindings of patch_attention.cuda and patch_attention_backward.cuda: argument checks and allocation around the
// kernels.
#include "patch_attention.h"

#include <tuple>
#include <vector>

#include "tensors.h"

namespace mvit {
namespace {

constexpr const char* kOp = "patch_attention";

// Tokens of a sequence, checked for overflow: a map without elements can have arbitrarily large sizes.
int64_t tokens_of(int64_t rows, int64_t columns) {
  int64_t tokens = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(rows, columns, &tokens), kOp, ": ", rows, " x ", columns,
                  " tokens are too many for the CUDA kernels");
  return tokens;
}

PatchAttentionShape shape_of(const Tensor& qkv, int64_t num_heads, const std::vector<int64_t>& patch, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 4, kOp, ": qkv must be (B, H, W, 3 * inner), not of ", qkv.dim(), " axes");
  STD_TORCH_CHECK(qkv.scalar_type() == ScalarType::Half || qkv.scalar_type() == ScalarType::BFloat16, kOp,
                  ": the CUDA kernels take bfloat16 and float16");
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0, kOp, ": patch_size must be two positive numbers");
  STD_TORCH_CHECK(qkv.size(1) % patch[0] == 0 && qkv.size(2) % patch[1] == 0, kOp, ": a map of ", qkv.size(1), " x ",
                  qkv.size(2), " does not divide into patches of ", patch[0], " x ", patch[1]);
  const int64_t channels = qkv.size(3);
  STD_TORCH_CHECK(num_heads > 0 && num_heads <= channels / 3 && channels % (3 * num_heads) == 0, kOp, ": ", channels,
                  " channels are not q, k and v of ", num_heads, " heads");
  const int64_t head_dim = channels / (3 * num_heads), tokens = tokens_of(qkv.size(1) / patch[0], qkv.size(2) / patch[1]);
  int64_t strands = num_heads;  // checked for overflow, as a map without elements can have arbitrarily large sizes
  for (const int64_t factor : {patch[0], patch[1], qkv.size(0)})
    STD_TORCH_CHECK(!__builtin_mul_overflow(strands, factor, &strands), kOp, ": heads of sequences of patches of ", patch[0],
                    " x ", patch[1], " are too many for the CUDA kernels");
  STD_TORCH_CHECK(head_dim % 2 == 0 && head_dim <= kMostHeadDim, kOp,
                  ": the CUDA kernels take heads of even widths up to ", kMostHeadDim, ", not of ", head_dim);
  STD_TORCH_CHECK(tokens < kMostTokens && strands <= INT32_MAX, kOp, ": ", strands, " heads of sequences of ", tokens,
                  " tokens are too many for the CUDA kernels");
  PatchAttentionShape shape{};
  shape.strands = static_cast<int>(strands);
  shape.heads = static_cast<int>(num_heads);
  shape.head_dim = static_cast<int>(head_dim);
  shape.tokens = static_cast<int>(tokens);
  shape.patch_height = static_cast<int>(patch[0]);
  shape.patch_width = static_cast<int>(patch[1]);
  shape.columns = static_cast<int>(qkv.size(2) / patch[1]);
  shape.scale = static_cast<float>(scale);
  return shape;
}

// Bytes per copy from heads of the map: the largest power of two, at most 16, that divides the address and all strides.
int common_bytes(const Tensor& map, const PatchAttentionShape& shape) {
  uint64_t places = reinterpret_cast<uintptr_t>(map.const_data_ptr()) | 16 | static_cast<uint64_t>(2 * shape.head_dim);
  for (int axis = 0; axis < 3; ++axis)
    if (map.size(axis) > 1) places |= static_cast<uint64_t>(2 * map.stride(axis));
  return static_cast<int>(places & -places);
}

// The map itself if heads can be read from it in place, else a copy.
Tensor readable(const Tensor& map, const PatchAttentionShape& shape) {
  if (map.stride(3) != 1 && map.size(3) != 1) return torch::stable::contiguous(map);
  return common_bytes(map, shape) >= 4 ? map : torch::stable::contiguous(torch::stable::clone(map));
}

void check_like(const char* name, const Tensor& tensor, const Tensor& qkv, int64_t channels) {
  bool same = tensor.dim() == 4 && tensor.size(3) == channels;
  for (int64_t axis = 0; same && axis < 3; ++axis) same = tensor.size(axis) == qkv.size(axis);
  STD_TORCH_CHECK(same, kOp, ": ", name, " is not of qkv's (B, H, W) and ", channels, " channels");
  STD_TORCH_CHECK(tensor.get_device_index() == qkv.get_device_index() && tensor.scalar_type() == qkv.scalar_type(), kOp,
                  ": ", name, " is not of qkv's dtype and device");
}

TokenMap input_map(const Tensor& tensor) {  // const_data_ptr does not copy lazily copied tensors
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

TokenMap output_map(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::tuple<Tensor, Tensor> patch_attention(const Tensor& qkv_argument, int64_t num_heads,
                                           std::vector<int64_t> patch_size, double scale) {
  const PatchAttentionShape shape = shape_of(qkv_argument, num_heads, patch_size, scale);
  const Device device(qkv_argument);
  const Tensor qkv = readable(qkv_argument, shape);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
  const int64_t positions = patch_size[0] * patch_size[1];
  Tensor logsumexp =
      torch::stable::new_empty(qkv, {qkv.size(0), positions, num_heads, shape.tokens}, ScalarType::Float);
  if (out.numel() > 0) {
    const PatchAttentionForward args{shape, input_map(qkv), output_map(out),
                                     static_cast<float*>(logsumexp.mutable_data_ptr())};
    const bool half = qkv.scalar_type() == ScalarType::Half;
    const auto launch = half ? launch_patch_attention<true> : launch_patch_attention<false>;
    check_launch(kOp, launch(args, common_bytes(qkv, shape), device.stream()));
  }
  return {out, logsumexp};
}

Tensor patch_attention_backward(const Tensor& grad_out_argument, const Tensor& qkv_argument, const Tensor& out_argument,
                                const Tensor& logsumexp_argument, int64_t num_heads, std::vector<int64_t> patch_size,
                                double scale) {
  const PatchAttentionShape shape = shape_of(qkv_argument, num_heads, patch_size, scale);
  STD_TORCH_CHECK(shape.tokens <= kMostBackwardTokens, kOp, ": the CUDA kernels have gradients of sequences of up to ",
                  kMostBackwardTokens, " tokens, not of ", shape.tokens);
  const int64_t inner = qkv_argument.size(3) / 3;
  check_like("grad_out", grad_out_argument, qkv_argument, inner);
  check_like("out", out_argument, qkv_argument, inner);
  STD_TORCH_CHECK(logsumexp_argument.numel() == int64_t{shape.strands} * shape.tokens &&
                      logsumexp_argument.get_device_index() == qkv_argument.get_device_index() &&
                      logsumexp_argument.scalar_type() == ScalarType::Float,
                  kOp, ": logsumexp is not the one that the forward operator returned");
  const Device device(qkv_argument);
  const Tensor grad_out = readable(grad_out_argument, shape), qkv = readable(qkv_argument, shape);
  const Tensor out = readable(out_argument, shape), logsumexp = torch::stable::contiguous(logsumexp_argument);
  Tensor grad_qkv = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)});
  if (grad_qkv.numel() > 0) {
    const PatchAttentionBackward args{shape,
                                      input_map(qkv),
                                      input_map(out),
                                      input_map(grad_out),
                                      output_map(grad_qkv),
                                      static_cast<const float*>(logsumexp.const_data_ptr())};
    const int of_qkv = common_bytes(qkv, shape), of_grad = common_bytes(grad_out, shape);
    const bool half = qkv.scalar_type() == ScalarType::Half;
    const auto launch = is_whole(shape)
                            ? (half ? launch_patch_attention_backward_whole<true>
                                    : launch_patch_attention_backward_whole<false>)
                            : (half ? launch_patch_attention_backward<true> : launch_patch_attention_backward<false>);
    check_launch(kOp, launch(args, of_qkv < of_grad ? of_qkv : of_grad, device.stream()));
  }
  return grad_qkv;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("patch_attention.cuda", TORCH_BOX(&mvit::patch_attention));
  m.impl("patch_attention_backward.cuda", TORCH_BOX(&mvit::patch_attention_backward));
}
