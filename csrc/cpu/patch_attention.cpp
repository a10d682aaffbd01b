// SPDX-License-Identifier: Apache-2.0
// Front end of patch_attention.cpu and patch_attention_backward.cpu: argument checks, memory and threads around
// patch_attention_kernel.cpp.
#include "patch_attention.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "float16.h"
#include "isa.h"
#include "scratch.h"
#include "tensors.h"

namespace mvit {
namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, "patch_attention: the CPU kernels take float32, bfloat16, float16 and float64");
  }
}

PatchAttentionShape shape_of(const Tensor& qkv, int64_t num_heads, const std::vector<int64_t>& patch, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 4, "patch_attention: qkv must be (B, H, W, 3 * inner), not of ", qkv.dim(), " axes");
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0,
                  "patch_attention: patch_size must be two positive numbers");
  STD_TORCH_CHECK(qkv.size(1) % patch[0] == 0 && qkv.size(2) % patch[1] == 0, "patch_attention: a map of ", qkv.size(1),
                  " x ", qkv.size(2), " does not divide into patches of ", patch[0], " x ", patch[1]);
  const int64_t channels = qkv.size(3);
  STD_TORCH_CHECK(num_heads > 0 && num_heads <= channels / 3 && channels % (3 * num_heads) == 0, "patch_attention: ",
                  channels, " channels are not q, k and v of ", num_heads, " heads");
  PatchAttentionShape shape;
  shape.images = qkv.size(0);
  shape.patch_rows = qkv.size(1) / patch[0];
  shape.patch_columns = qkv.size(2) / patch[1];
  shape.patch_height = patch[0];
  shape.patch_width = patch[1];
  shape.heads = num_heads;
  shape.head_dim = channels / (3 * num_heads);
  shape.scale = scale;
  product("patch_attention", "places in a patch, of all heads and images", {patch[0], patch[1], num_heads, shape.images});
  return shape;
}

void check_like(const char* name, const Tensor& tensor, const Tensor& qkv, int64_t channels) {
  bool same = tensor.dim() == 4 && tensor.size(3) == channels;
  for (int64_t axis = 0; same && axis < 3; ++axis) same = tensor.size(axis) == qkv.size(axis);
  STD_TORCH_CHECK(same, "patch_attention: ", name, " is not of qkv's (B, H, W) and ", channels, " channels");
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == qkv.scalar_type(), "patch_attention: ", name,
                  " is not of qkv's dtype and device");
}

Tensor with_adjacent_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : contiguous(tensor);
}

// Inputs are only read: const_data_ptr does not trigger the copy of a lazily copied tensor.
Map input_map(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Map output_map(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

ScalarType statistics_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

std::size_t scratch_bytes(int64_t elements, Dtype dtype) {
  return static_cast<std::size_t>(elements) * (dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
}

std::tuple<Tensor, Tensor> patch_attention(const Tensor& qkv_argument, int64_t num_heads,
                                           std::vector<int64_t> patch_size, double scale) {
  const PatchAttentionShape shape = shape_of(qkv_argument, num_heads, patch_size, scale);
  const Dtype dtype = dtype_of(qkv_argument);
  const auto type = static_cast<int>(dtype);
  const PatchAttentionKernels& kernels = MVIT_KERNELS_FOR_THIS_CPU(patch_attention);
  const Tensor qkv = with_adjacent_channels(qkv_argument);
  const Tensor out = new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), shape.inner()}, qkv.scalar_type());
  const Tensor logsumexp =
      new_empty(qkv, {shape.images, shape.positions(), shape.heads, shape.tokens()}, statistics_type(dtype));

  if (out.numel() == 0) return {out, logsumexp};  // no images or no rows; the other sizes are arbitrary

  const PatchAttentionForward args{shape, input_map(qkv), output_map(out), logsumexp.mutable_data_ptr()};
  const std::size_t bytes = scratch_bytes(kernels.forward_scratch[type](shape), dtype);
  // Work is divided into parts of 64 queries, so that the few strands of a single image keep many cores busy.
  // Consecutive parts of a strand are merged into one call, which packs the strand's keys and values once.
  constexpr int64_t part = 64;
  const int64_t tokens = shape.tokens(), parts = (tokens + part - 1) / part;
  parallel_for(shape.strands() * parts, shape.score_flops(2) * static_cast<double>(std::min(part, tokens)) * static_cast<double>(tokens),
               [&](int64_t begin, int64_t end) {
                 const Scratch memory(bytes);
                 while (begin < end) {
                   const int64_t strand = begin / parts, last = std::min(end, (strand + 1) * parts);
                   kernels.forward[type](args, strand, (begin - strand * parts) * part,
                                         std::min(tokens, (last - strand * parts) * part), memory.data());
                   begin = last;
                 }
               });
  return {out, logsumexp};
}

Tensor patch_attention_backward(const Tensor& grad_out_argument, const Tensor& qkv_argument, const Tensor& out_argument,
                                const Tensor& logsumexp_argument, int64_t num_heads, std::vector<int64_t> patch_size,
                                double scale) {
  const PatchAttentionShape shape = shape_of(qkv_argument, num_heads, patch_size, scale);
  const Dtype dtype = dtype_of(qkv_argument);
  const auto type = static_cast<int>(dtype);
  check_like("grad_out", grad_out_argument, qkv_argument, shape.inner());
  check_like("out", out_argument, qkv_argument, shape.inner());
  STD_TORCH_CHECK(logsumexp_argument.numel() == product("patch_attention", "scores", {shape.strands(), shape.tokens()}) && logsumexp_argument.is_cpu() &&
                      logsumexp_argument.scalar_type() == statistics_type(dtype),
                  "patch_attention: logsumexp is not the one that the forward operator returned");
  const PatchAttentionKernels& kernels = MVIT_KERNELS_FOR_THIS_CPU(patch_attention);
  const Tensor grad_out = with_adjacent_channels(grad_out_argument), qkv = with_adjacent_channels(qkv_argument);
  const Tensor out = with_adjacent_channels(out_argument);
  const Tensor logsumexp = logsumexp_argument.is_contiguous() ? logsumexp_argument : contiguous(logsumexp_argument);
  const Tensor grad_qkv =
      new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)}, qkv.scalar_type());
  if (grad_qkv.numel() == 0) return grad_qkv;

  const PatchAttentionBackward args{
      shape, input_map(grad_out), input_map(qkv), input_map(out), output_map(grad_qkv), logsumexp.const_data_ptr()};
  const std::size_t bytes = scratch_bytes(kernels.backward_scratch[type](shape), dtype);
  const double tokens = static_cast<double>(shape.tokens());
  parallel_for(shape.strands(), shape.score_flops(5) * tokens * tokens, [&](int64_t begin, int64_t end) {
    const Scratch memory(bytes);
    for (int64_t strand = begin; strand < end; ++strand) kernels.backward[type](args, strand, memory.data());
  });
  return grad_qkv;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  using namespace mvit;
  m.impl("patch_attention.cpu", TORCH_BOX((&WithFloat16<&patch_attention, 0, kFloat32>::call)));
  m.impl("patch_attention_backward.cpu", TORCH_BOX((&WithFloat16<&patch_attention_backward, 1>::call)));
}
