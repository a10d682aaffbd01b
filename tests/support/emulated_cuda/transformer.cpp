// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_transformer.py and support/sass/launches.py: launches `transformer`. With
// MVIT_ONLY_ONE, only the kernel or the kernels of that expression are compiled.
#include "transformer_kernel.cu"

using namespace mvit;

#ifdef MVIT_ONLY_ONE
TransformerLaunch* kernel_of(int64_t, int64_t head_dim, int64_t tiles, bool half) { return MVIT_ONLY_ONE; }
#else
TransformerLaunch* kernel_of(int64_t width, int64_t head_dim, int64_t tiles, bool half) {
  return Transformers::find(width, head_dim, tiles, half);
}
#endif

extern "C" {

const char* forward(uint64_t seed, void* x, void* out, const unsigned char* packed, int64_t half, int64_t images,
                    int64_t height, int64_t width, int64_t d, int64_t head_dim, int64_t patch_height,
                    int64_t patch_width, int64_t layers, int64_t hidden, int64_t final_norm, double eps, int64_t tiles,
                    int64_t sequences_of_a_block, int64_t slot) {
  const TransformerLayout layout{static_cast<int>(d), static_cast<int>(head_dim)};
  TransformerArgs args = transformer_args(layout, {tiles, sequences_of_a_block, slot}, images, height, width,
                                          patch_height, patch_width, layers, hidden, final_norm, eps);
  args.in = {x, height * width * d, width * d, d};
  args.out = {out, height * width * d, width * d, d};
  args.weights = packed;
  TransformerLaunch* const launch = kernel_of(d, head_dim, tiles, half != 0);
  if (launch == nullptr) return emulation_result("there is no such instance");
  emulation::seed = seed;
  launch(args, nullptr);
  return emulation_result(emulation::last_report);
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
