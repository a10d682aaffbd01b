// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_transformer.py: launches `transformer`. With MVIT_ONLY_ONE, only one kernel is
// compiled, for tests with planted faults.
#include "transformer_kernel.cu"

namespace {

using namespace mvit;

template <typename T, int WIDTH, int HEAD_DIM, int M>
std::string run(uint64_t seed, const TransformerArgs& args) {
  emulation::seed = seed;
  launch_transformer<T, WIDTH, HEAD_DIM, M>(args, nullptr);
  return emulation::last_report;
}

struct Instance {
  int64_t width, head_dim, tiles;
  std::string (*launch)(uint64_t, const TransformerArgs&);
  std::string (*launch_half)(uint64_t, const TransformerArgs&);
};

#define INSTANCE(WIDTH, HEAD_DIM, M) \
  Instance { WIDTH, HEAD_DIM, M, run<BFloat16, WIDTH, HEAD_DIM, M>, run<Half, WIDTH, HEAD_DIM, M> }
const Instance instances[] = {
#ifdef MVIT_ONLY_ONE
    {80, 20, 2, run<BFloat16, 80, 20, 2>, nullptr},
#else
    INSTANCE(64, 16, 1),  INSTANCE(80, 20, 1),  INSTANCE(96, 24, 1),  INSTANCE(120, 30, 1),
    INSTANCE(144, 36, 1), INSTANCE(192, 48, 1), INSTANCE(240, 60, 1),  // heads of a quarter of the width
    INSTANCE(64, 16, 2),  INSTANCE(80, 20, 2),  INSTANCE(96, 24, 2),  INSTANCE(120, 30, 2),
    INSTANCE(144, 36, 2), INSTANCE(192, 48, 2),  // the same with warps of 32 rows
    INSTANCE(64, 8, 2),   INSTANCE(80, 8, 2),   INSTANCE(96, 8, 2),   INSTANCE(120, 8, 2),
    INSTANCE(144, 8, 2),  INSTANCE(192, 8, 2),  INSTANCE(240, 8, 1),  // Kornia's heads of 8
#endif
};

}  // namespace

extern "C" {

const char* forward(uint64_t seed, void* x, void* out, const unsigned char* packed, int64_t half, int64_t images,
                    int64_t height, int64_t width, int64_t d, int64_t head_dim, int64_t patch_height, int64_t patch_width, int64_t layers,
                    int64_t hidden, int64_t final_norm, double eps, int64_t tiles, int64_t sequences_of_a_block,
                    int64_t slot) {
  const TransformerLayout layout{static_cast<int>(d), static_cast<int>(head_dim)};
  TransformerArgs args = transformer_args(layout, {tiles, sequences_of_a_block, slot}, images, height, width, patch_height, patch_width,
                                          layers, hidden, final_norm, eps);
  args.in = {x, height * width * d, width * d, d};
  args.out = {out, height * width * d, width * d, d};
  args.weights = packed;
  for (const Instance& instance : instances)
    if (instance.width == d && instance.head_dim == head_dim && instance.tiles == tiles)
      return emulation_result((half ? instance.launch_half : instance.launch)(seed, args));
  return emulation_result("there is no such instance");
}

// The sizes that the Python side computes as well, for a number of rows, layers and hidden units.
const char* sizes(uint64_t, int64_t* out, int64_t width, int64_t head_dim, int64_t rows, int64_t layers, int64_t hidden) {
  const TransformerLayout layout{static_cast<int>(width), static_cast<int>(head_dim)};
  out[0] = layout.shared_bytes(static_cast<int>(rows), layout.least_slot());
  out[1] = layout.packed_bytes(layers, (hidden + kHiddenChunk - 1) / kHiddenChunk);
  out[2] = kTransformerVersion;
  return nullptr;
}
}
