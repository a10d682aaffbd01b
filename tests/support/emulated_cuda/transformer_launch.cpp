// SPDX-License-Identifier: Apache-2.0
// For support/sass/launches.py: the launch of `transformer` for one width, MVIT_WIDTH, which a watcher gets.
#include "transformer_kernel.cu"

using namespace mvit;

extern "C" const char* transformer(uint64_t seed, void* x, void* out, const unsigned char* packed, int64_t half,
                                   int64_t images, int64_t height, int64_t width, int64_t head_dim,
                                   int64_t patch_height, int64_t patch_width, int64_t layers, int64_t hidden,
                                   int64_t final_norm, double eps, int64_t tiles, int64_t sequences_of_a_block,
                                   int64_t slot) {
  constexpr int64_t d = MVIT_WIDTH;
  const TransformerLayout layout{MVIT_WIDTH, static_cast<int>(head_dim)};
  TransformerArgs args = transformer_args(layout, {tiles, sequences_of_a_block, slot}, images, height, width, patch_height,
                                          patch_width, layers, hidden, final_norm, eps);
  args.in = {x, height * width * d, width * d, d};
  args.out = {out, height * width * d, width * d, d};
  args.weights = packed;
  emulation::seed = seed;
  TransformerLaunch* const launch = find_transformer<d>(head_dim, tiles, half != 0);
  if (launch == nullptr) return "there is no such instance";
  launch(args, nullptr);
  return emulation_result(emulation::last_report);
}
