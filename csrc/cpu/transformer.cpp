// SPDX-License-Identifier: Apache-2.0
// Front end of transformer.cpu: argument checks, and weights as transformer_kernel.cpp reads them.
#include "transformer.h"

#include <array>
#include <optional>
#include <vector>

#include "float16.h"
#include "isa.h"
#include "scratch.h"
#include "tensors.h"
#include "weights.h"

namespace mvit {
namespace {

// The matrices of a layer, qkv_weight's as three.
struct Matrix {
  const void* TransformerLayer::*weight;
  int64_t first_row, rows, columns;
};
std::array<Matrix, 6> matrices_of(const TransformerShape& shape) {
  const int64_t d = shape.width, inner = shape.inner(), hidden = shape.hidden;
  return {{{&TransformerLayer::qkv_weight, 0, inner, d},
           {&TransformerLayer::qkv_weight, inner, inner, d},
           {&TransformerLayer::qkv_weight, 2 * inner, inner, d},
           {&TransformerLayer::proj_weight, 0, d, inner},
           {&TransformerLayer::fc1_weight, 0, hidden, d},
           {&TransformerLayer::fc2_weight, 0, d, hidden}}};
}

std::size_t packed_bytes(const TransformerKernels& kernels, const TransformerShape& shape) {
  std::size_t bytes = 0;
  for (const Matrix& matrix : matrices_of(shape)) bytes += kernels.matrix_bytes(matrix.rows, matrix.columns);
  return bytes * static_cast<std::size_t>(shape.layers);
}

// Packs the bfloat16 matrices of all layers, by all threads, and makes the layers point to them.
void pack(const TransformerKernels& kernels, const TransformerShape& shape, std::vector<TransformerLayer>& layers,
          char* to) {
  const auto matrices = matrices_of(shape);
  const std::size_t layer_bytes = packed_bytes(kernels, shape) / layers.size();
  const auto place_of = [&](std::size_t layer, std::size_t matrix) {
    char* place = to + layer * layer_bytes;
    for (std::size_t i = 0; i < matrix; ++i) place += kernels.matrix_bytes(matrices[i].rows, matrices[i].columns);
    return place;
  };
  const auto count = static_cast<int64_t>(layers.size() * matrices.size());
  const double bytes = static_cast<double>(layer_bytes) / static_cast<double>(matrices.size());
  parallel_for(count, 2 * bytes, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      const Matrix& matrix = matrices[i % matrices.size()];
      const auto* weight = static_cast<const char*>(layers[i / matrices.size()].*matrix.weight);
      kernels.pack(weight + 2 * matrix.first_row * matrix.columns, matrix.rows, matrix.columns,
                   place_of(i / matrices.size(), i % matrices.size()));
    }
  });
  for (std::size_t layer = 0; layer < layers.size(); ++layer)
    for (std::size_t i = 0; i < matrices.size(); ++i)
      if (matrices[i].first_row == 0) layers[layer].*matrices[i].weight = place_of(layer, i);
}

// The fields of TransformerLayerWeights (mvit_kernels/backends/library.py), in order.
constexpr std::size_t kTensorsOfALayer = 12;

Tensor transformer(const Tensor& x_argument, std::vector<Tensor> weights, std::optional<Tensor> final_norm_weight,
                   std::optional<Tensor> final_norm_bias, int64_t num_heads, std::vector<int64_t> patch, double eps) {
  STD_TORCH_CHECK(x_argument.dim() == 4, "transformer: x must be (B, H, W, d), not of ", x_argument.dim(), " axes");
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0 && x_argument.size(1) % patch[0] == 0 &&
                      x_argument.size(2) % patch[1] == 0,
                  "transformer: a map of ", x_argument.size(1), " x ", x_argument.size(2),
                  " does not divide into the patches");
  STD_TORCH_CHECK(!weights.empty() && weights.size() % kTensorsOfALayer == 0,
                  "transformer: weights must be twelve tensors a layer, not ", weights.size());
  const ScalarType type = x_argument.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "transformer: the CPU kernels take float32, bfloat16 and float16");
  const Tensor x = x_argument.stride(3) == 1 || x_argument.size(3) == 1 ? x_argument : contiguous(x_argument);
  const Tensor out = new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, type);

  TransformerArgs args{};
  TransformerShape& shape = args.shape;
  shape.images = x.size(0);
  shape.patch_rows = x.size(1) / patch[0];
  shape.patch_columns = x.size(2) / patch[1];
  shape.patch_height = patch[0];
  shape.patch_width = patch[1];
  shape.width = x.size(3);
  shape.heads = num_heads;
  const int64_t rows = weights[2].dim() == 2 ? weights[2].size(0) : 0;
  STD_TORCH_CHECK(num_heads > 0 && num_heads <= rows / 3 && rows % (3 * num_heads) == 0, "transformer: ", rows,
                  " rows of qkv_weight are not q, k and v of ", num_heads, " heads");
  shape.head_dim = rows / (3 * num_heads);
  shape.hidden = weights[8].dim() == 2 ? weights[8].size(0) : 0;
  shape.layers = static_cast<int64_t>(weights.size() / kTensorsOfALayer);
  shape.eps = static_cast<float>(eps);

  const bool pairs = type == ScalarType::BFloat16 && this_cpu_has_bf16_pairs() && shape.width % 2 == 0 &&
                     shape.head_dim % 2 == 0 && shape.hidden % 2 == 0;
  const TransformerTable& table = MVIT_KERNELS_FOR(transformer, pairs);
  WeightReader read("transformer", pairs ? ScalarType::BFloat16 : ScalarType::Float);
  const int64_t d = shape.width, inner = shape.inner(), hidden = shape.hidden;
  std::vector<TransformerLayer> layers;
  for (std::size_t i = 0; i < weights.size(); i += kTensorsOfALayer) {
    const Tensor* w = &weights[i];
    layers.push_back({read.vector(w[0], d), read.vector(w[1], d), read.matrix(w[2], 3 * inner, d),
                      read.vector(w[3], 3 * inner), read.matrix(w[4], d, inner), read.vector(w[5], d),
                      read.vector(w[6], d), read.vector(w[7], d), read.matrix(w[8], hidden, d),
                      read.vector(w[9], hidden), read.matrix(w[10], d, hidden), read.vector(w[11], d)});
  }
  args.layers = layers.data();
  STD_TORCH_CHECK(final_norm_weight.has_value() == final_norm_bias.has_value(),
                  "transformer: one of final_norm_weight and final_norm_bias without the other");
  if (final_norm_weight) {
    args.final_norm_weight = read.vector(*final_norm_weight, d);
    args.final_norm_bias = read.vector(*final_norm_bias, d);
  }
  if (out.numel() == 0) return out;  // no images, rows or channels; the other sizes are arbitrary
  args.in = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  args.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  const TransformerKernels& kernels =
      pairs ? table.pairs : type == ScalarType::BFloat16 ? table.single_bf16 : table.single;
  if (kernels.pack == nullptr) {
    run_transformer(kernels, args, false);
  } else {
    const Scratch packed(packed_bytes(kernels, shape), ScratchUse::call);
    pack(kernels, shape, layers, packed.data());
    run_transformer(kernels, args, false);
  }
  return out;
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, CPU, m) {
  m.impl("transformer.cpu", TORCH_BOX((&mvit::WithFloat16<&mvit::transformer, 0>::call)));
}
