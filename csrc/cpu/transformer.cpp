// SPDX-License-Identifier: Apache-2.0
// Front end of transformer.cpu: argument checks, memory and threads around transformer_kernel.cpp.
#include "transformer.h"

#include <algorithm>
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

int64_t blocks_of(const TransformerKernels& kernels, const TransformerShape& shape, int64_t sequences) {
  return (kernels.unit_lanes(shape, sequences) + 31) / 32;
}

// A unit has enough whole sequences to fill two blocks, so that one pass over the weights serves 64 tokens (at N = 16
// the cost is streaming the weights from L3), or on matrix tiles, which multiply in less time than weights take to
// come, eight (at N = 64, 12 % of the time). Beyond that, the number that wastes the fewest lanes: 49 tokens are 56
// lanes or four vectors of 16, twice 49 are seven. The memory that a unit keeps between steps is limited to half of an
// L2: of 1 MB, or of the 2 MB of processors with tiles.
int64_t sequences_of_a_unit(const TransformerKernels& kernels, const TransformerShape& shape, int64_t most) {
  const std::size_t most_bytes = kernels.pack == nullptr ? 512 << 10 : 1 << 20;
  const auto lanes = [&](int64_t n) { return kernels.unit_lanes(shape, n); };
  const auto computed = [&](int64_t n) { return static_cast<double>((lanes(n) + 15) / 16 * 16) / static_cast<double>(n); };
  const int64_t wanted = kernels.lanes_of_a_unit;
  int64_t best = 1;
  for (int64_t n = 2; n <= most && kernels.unit_bytes(shape, n) <= most_bytes && lanes(n) <= 256; ++n)
    if ((lanes(best) < wanted && lanes(n) <= wanted) || computed(n) < computed(best)) best = n;
  return best;
}

double flops_of_a_block(const TransformerShape& shape) {
  const double products = static_cast<double>(shape.width * (4 * shape.inner() + 2 * shape.hidden));
  return 2.0 * 32 * (products + 2.0 * static_cast<double>(shape.inner() * shape.tokens()));
}

}  // namespace

void run_transformer(const TransformerKernels& kernels, const TransformerArgs& args, bool on_this_thread_alone) {
  const TransformerShape& shape = args.shape;
  const int64_t steps = kernels.steps(shape), sequences = shape.sequences();
  if (sequences == 0 || shape.tokens() == 0 || shape.width == 0) return;
  const std::size_t step_bytes = kernels.step_bytes(shape);
  const int64_t threads = on_this_thread_alone ? 1 : torch::stable::get_num_threads();
  const int64_t group = sequences_of_a_unit(kernels, shape, std::max<int64_t>(1, sequences / threads));
  const int64_t units = (sequences + group - 1) / group;
  const auto size_of = [&](int64_t unit) { return std::min(group, sequences - unit * group); };
  const std::size_t unit_bytes = (kernels.unit_bytes(shape, group) + 63) / 64 * 64;

  // Each thread takes whole units: no synchronisation.
  if (threads == 1 || units % threads == 0 || units >= 4 * threads) {
    const auto whole_units = [&](int64_t begin, int64_t end) {
      const Scratch scratch(unit_bytes + step_bytes);
      char* const memory = scratch.data();
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t blocks = blocks_of(kernels, shape, size_of(unit));
        for (int64_t step = 0; step < steps; ++step)
          for (int64_t block = 0; block < blocks; ++block)
            kernels.step(args, step, unit * group, size_of(unit), block, memory, memory + unit_bytes);
      }
    };
    if (on_this_thread_alone) return whole_units(0, units);
    return parallel_for(units, flops_of_a_block(shape) * static_cast<double>(blocks_of(kernels, shape, group)),
                        whole_units);
  }

  // More threads than units: all threads share the blocks of one step, then those of the next.
  const Scratch shared(unit_bytes * static_cast<std::size_t>(units), ScratchUse::shared);
  char* const memory = shared.data();
  const int64_t unit_blocks = blocks_of(kernels, shape, group);
  for (int64_t step = 0; step < steps; ++step)
    parallel_for(units * unit_blocks, flops_of_a_block(shape) / 2, [&](int64_t begin, int64_t end) {
      const Scratch scratch(step_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / unit_blocks, block = i % unit_blocks;
        if (block < blocks_of(kernels, shape, size_of(unit)))
          kernels.step(args, step, unit * group, size_of(unit), block, memory + unit * unit_bytes,
                       scratch.data());
      }
    });
}

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
    const Scratch packed(packed_bytes(kernels, shape), ScratchUse::weights);
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
