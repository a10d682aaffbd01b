// SPDX-License-Identifier: Apache-2.0
// pack_convolution.cpu, pack_inverted_residual.cpu and pack_matrix.cpu (of transformers): pack the weights of a frozen
// network into the layout that its kernels read.
#include <cstring>

#include "convolution.h"
#include "inverted_residual.h"
#include "isa.h"
#include "tensors.h"
#include "transformer.h"

namespace mvit {
namespace {

// Zeros: the gaps between packed parts are never written, and equal weights are to give equal bytes.
Tensor bytes_like(const Tensor& tensor, std::size_t size) {
  Tensor bytes = new_empty(tensor, {static_cast<int64_t>(size)}, ScalarType::Byte);
  if (size > 0) std::memset(bytes.mutable_data_ptr(), 0, size);  // an empty tensor has a null pointer
  return bytes;
}

// Whether the tensor is rows × columns, possibly with two trailing axes of size 1 (the weight of a 1×1 convolution).
bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return (tensor.dim() == 2 || (tensor.dim() == 4 && tensor.size(2) == 1 && tensor.size(3) == 1)) &&
         tensor.size(0) == rows && tensor.size(1) == columns && rows > 0 && columns > 0;
}

bool is_packable(const Tensor& tensor, ScalarType type) {
  return tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous();
}

bool is_bias(const Tensor& tensor, int64_t size) {
  return tensor.dim() == 1 && tensor.size(0) == size && is_packable(tensor, ScalarType::Float);
}

// Dtype of the matrices: bfloat16 for products of bfloat16 pairs, else float32.
ScalarType matrices_of(const char* op, const Tensor& weight) {
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op,
                  ": weights must be of float32 or bfloat16");
  STD_TORCH_CHECK(type == ScalarType::Float || this_cpu_has_bf16_pairs(), op, ": there are no products of bfloat16 pairs here");
  return type;
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Tensor pack_convolution(const Tensor& weight, const Tensor& bias) {
  constexpr const char* kOp = "pack_convolution";
  const ScalarType type = matrices_of(kOp, weight);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 &&
                      (weight.size(2) == 1 || weight.size(2) == 3) && weight.size(3) == weight.size(2) &&
                      is_packable(weight, type),
                  kOp, ": weight must be (out, in, k, k), contiguous, with a k of 1 or 3");
  STD_TORCH_CHECK(is_bias(bias, weight.size(0)), kOp, ": bias must be (", weight.size(0), ",), contiguous, of float32");
  const bool pairs = type == ScalarType::BFloat16;
  const ConvolutionTable& table = MVIT_KERNELS_FOR(convolution, pairs);
  const ConvolutionKernels& kernels = pairs ? table.pairs : table.single;
  const ConvolutionShape shape{1, 1, weight.size(1), weight.size(0), weight.size(2), 1, 1, Activation::none};
  const Tensor packed = bytes_like(weight, kernels.packed_bytes(shape));
  kernels.pack(shape, weight.const_data_ptr(), floats(bias), packed.mutable_data_ptr());
  return packed;
}

Tensor pack_inverted_residual(const Tensor& expand, const Tensor& expand_bias, const Tensor& depthwise,
                              const Tensor& depthwise_bias, const Tensor& project, const Tensor& project_bias) {
  constexpr const char* kOp = "pack_inverted_residual";
  const ScalarType type = matrices_of(kOp, expand);
  STD_TORCH_CHECK(expand.dim() >= 2 && project.dim() >= 2, kOp, ": expand and project must be matrices");
  const int64_t hidden = expand.size(0), in = expand.size(1), out = project.size(0);
  STD_TORCH_CHECK(is_matrix(expand, hidden, in) && is_packable(expand, type), kOp,
                  ": expand must be (hidden, in), contiguous");
  STD_TORCH_CHECK(depthwise.dim() == 4 && depthwise.size(0) == hidden && depthwise.size(1) == 1 &&
                      depthwise.size(2) == 3 && depthwise.size(3) == 3 && is_packable(depthwise, type),
                  kOp, ": depthwise must be (", hidden, ", 1, 3, 3), contiguous, of expand's dtype");
  STD_TORCH_CHECK(is_matrix(project, out, hidden) && is_packable(project, type), kOp, ": project must be (out, ", hidden,
                  "), contiguous, of expand's dtype");
  STD_TORCH_CHECK(is_bias(expand_bias, hidden) && is_bias(depthwise_bias, hidden) && is_bias(project_bias, out), kOp,
                  ": biases must be (", hidden, ",), (", hidden, ",) and (", out, ",), contiguous, of float32");
  const bool pairs = type == ScalarType::BFloat16;
  const InvertedResidualTable& table = MVIT_KERNELS_FOR(inverted_residual, pairs);
  const InvertedResidualKernels& kernels = pairs ? table.pairs : table.single;
  const InvertedResidualShape shape{1, 1, in, hidden, out, 1, 1, false};
  const Tensor packed = bytes_like(expand, kernels.packed_bytes(shape));
  kernels.pack(shape,
               {expand.const_data_ptr(), floats(expand_bias), depthwise.const_data_ptr(), floats(depthwise_bias),
                project.const_data_ptr(), floats(project_bias)},
               packed.mutable_data_ptr());
  return packed;
}

// A transformer's matrix, or `parts` of as many rows that are packed one after another.
Tensor pack_matrix(const Tensor& weight, int64_t parts) {
  constexpr const char* kOp = "pack_matrix";
  const ScalarType type = matrices_of(kOp, weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 && is_packable(weight, type), kOp,
                  ": weight must be (out, in), contiguous");
  STD_TORCH_CHECK(parts > 0 && weight.size(0) % parts == 0, kOp, ": ", weight.size(0), " rows are not ", parts,
                  " matrices");
  const bool pairs = type == ScalarType::BFloat16;
  STD_TORCH_CHECK(!pairs || weight.size(1) % 2 == 0, kOp, ": ", weight.size(1), " columns are no pairs");
  const TransformerTable& table = MVIT_KERNELS_FOR(transformer, pairs);
  const TransformerKernels& kernels = pairs ? table.pairs : table.single;
  const int64_t rows = weight.size(0) / parts, columns = weight.size(1);
  const std::size_t bytes = kernels.matrix_bytes(rows, columns), element = pairs ? 2 : 4;
  const Tensor packed = bytes_like(weight, static_cast<std::size_t>(parts) * bytes);
  for (int64_t part = 0; part < parts; ++part) {
    const char* from = static_cast<const char*>(weight.const_data_ptr()) +
                       static_cast<std::size_t>(part * rows * columns) * element;
    char* to = static_cast<char*>(packed.mutable_data_ptr()) + static_cast<std::size_t>(part) * bytes;
    if (kernels.pack == nullptr)
      std::memcpy(to, from, bytes);
    else
      kernels.pack(from, rows, columns, to);
  }
  return packed;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("pack_convolution.cpu", TORCH_BOX(&mvit::pack_convolution));
  m.impl("pack_inverted_residual.cpu", TORCH_BOX(&mvit::pack_inverted_residual));
  m.impl("pack_matrix.cpu", TORCH_BOX(&mvit::pack_matrix));
}
