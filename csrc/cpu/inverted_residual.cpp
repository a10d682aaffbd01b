// SPDX-License-Identifier: Apache-2.0
// Front end of inverted_residual.cpu: argument checks, allocation, weight packing and threading around
// inverted_residual_kernel.cpp.
#include "inverted_residual.h"

#include <algorithm>
#include <numeric>

#include "float16.h"
#include "isa.h"
#include "scratch.h"
#include "tensors.h"
#include "weights.h"

namespace mvit {
namespace {

InvertedResidualShape shape_of(const Tensor& x, const Tensor& expand_weight, const Tensor& project_weight,
                               int64_t stride, int64_t dilation, bool residual) {
  STD_TORCH_CHECK(x.dim() == 4, "inverted_residual: x must be (B, H, W, C), not of ", x.dim(), " axes");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, "inverted_residual: x is an empty map of ", x.size(1), " x ",
                  x.size(2));
  STD_TORCH_CHECK(stride == 1 || stride == 2, "inverted_residual: stride must be 1 or 2, not ", stride);
  STD_TORCH_CHECK(dilation > 0, "inverted_residual: dilation must be positive, not ", dilation);
  STD_TORCH_CHECK(expand_weight.dim() == 2 && project_weight.dim() == 2,
                  "inverted_residual: expand_weight and project_weight must have two axes");
  InvertedResidualShape shape{};
  shape.in_height = x.size(1);
  shape.in_width = x.size(2);
  shape.in_channels = x.size(3);
  shape.hidden = expand_weight.size(0);
  shape.out_channels = project_weight.size(0);
  shape.stride = stride;
  shape.dilation = dilation;
  shape.residual = residual;
  STD_TORCH_CHECK(!residual || (stride == 1 && shape.out_channels == shape.in_channels),
                  "inverted_residual: residual wants stride 1 and as many channels out as in");
  return shape.with_least_dilation();
}

// Number of strips of output rows per image, chosen so that all threads get the same amount of work; 1 when there are
// enough images.
int64_t strips_of_an_image(const InvertedResidualShape& shape, int64_t images) {
  const int64_t threads = thread_count();
  if (images >= 4 * threads) return 1;
  const int64_t strips = threads / std::gcd(threads, images);
  return std::max<int64_t>(1, std::min(strips, shape.out_height() / 2));
}

double flops_of(const InvertedResidualShape& shape) {
  const double in = static_cast<double>(shape.in_height * shape.in_width * shape.in_channels);
  const double out = static_cast<double>(shape.out_height() * shape.out_width() * (shape.out_channels + 9));
  return 2.0 * static_cast<double>(shape.hidden) * (in + out);
}

Tensor inverted_residual(const Tensor& x_argument, const Tensor& expand_weight, const Tensor& expand_bias,
                         const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                         const Tensor& project_bias, int64_t stride, int64_t dilation, bool residual) {
  const InvertedResidualShape shape =
      shape_of(x_argument, expand_weight, project_weight, stride, dilation, residual);
  const ScalarType type = x_argument.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "inverted_residual: the CPU kernels take float32, bfloat16 and float16");
  const Tensor x = x_argument.stride(3) == 1 || x_argument.size(3) == 1 ? x_argument : contiguous(x_argument);
  const int64_t images = x.size(0);
  const Tensor out = new_empty(x, {images, shape.out_height(), shape.out_width(), shape.out_channels}, type);

  const Bf16Products products = this_cpus_bf16_products();
  const bool even = shape.in_channels % 2 == 0 && shape.hidden % 2 == 0;
  const bool pairs = type == ScalarType::BFloat16 &&
                     (products == Bf16Products::tiles || (products == Bf16Products::pairs && even));
  const InvertedResidualTable& table = MVIT_KERNELS_FOR(inverted_residual, pairs);
  const InvertedResidualKernels& kernels =
      pairs ? table.pairs : type == ScalarType::BFloat16 ? table.single_bf16 : table.single;
  WeightReader read("inverted_residual", pairs ? ScalarType::BFloat16 : ScalarType::Float);
  const InvertedResidualWeights weights{read.matrix(expand_weight, shape.hidden, shape.in_channels),
                                        read.vector(expand_bias, shape.hidden),
                                        read.filters(depthwise_weight, shape.hidden, 1, 3),
                                        read.vector(depthwise_bias, shape.hidden),
                                        read.matrix(project_weight, shape.out_channels, shape.hidden),
                                        read.vector(project_bias, shape.out_channels)};
  if (images == 0 || shape.out_channels == 0) return out;
  STD_TORCH_CHECK(shape.has_scratch(), "inverted_residual: ", shape.hidden, " hidden channels of ", shape.in_height, " x ",
                  shape.in_width, " pixels at a dilation of ", dilation, " are more than there is memory for");
  const Scratch packed(kernels.packed_bytes(shape), ScratchUse::shared);
  kernels.pack(shape, weights, packed.data());

  const InvertedResidualArgs args{
      shape,
      {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)},
      {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)},
      packed.data()};
  const int64_t strips = strips_of_an_image(shape, images), rows = shape.out_height();
  const std::size_t scratch_bytes = kernels.scratch_bytes(shape);
  parallel_for(images * strips, flops_of(shape) / static_cast<double>(strips), [&](int64_t begin, int64_t end) {
    const Scratch memory(scratch_bytes);
    while (begin < end) {  // adjacent strips of one image are merged into one call
      const int64_t image = begin / strips, last = std::min(end, (image + 1) * strips);
      kernels.run(args, image, (begin - image * strips) * rows / strips, (last - image * strips) * rows / strips,
                  memory.data());
      begin = last;
    }
  });
  return out;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("inverted_residual.cpu", TORCH_BOX((&mvit::WithFloat16<&mvit::inverted_residual, 0>::call)));
}
