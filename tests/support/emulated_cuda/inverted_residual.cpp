// SPDX-License-Identifier: Apache-2.0
// Driver for tests/backends/cuda/test_inverted_residual.py: launches `inverted_residual`. With MVIT_ONLY_ONE, only
// that launch function is compiled, for tests with planted faults.
#include "inverted_residual_kernel.cu"

namespace {

using namespace mvit;

#ifdef MVIT_ONLY_ONE
InvertedResidualLaunch* kernel_of(int64_t, int64_t, int64_t, bool, bool, bool) { return MVIT_ONLY_ONE; }
#else
InvertedResidualLaunch* kernel_of(int64_t channels, int64_t out, int64_t stride, bool small, bool half,
                                  bool half_filter) {
  switch (channels) {
    case 16: return find_inverted_residual<16>(out, stride, small, half, half_filter);
    case 24: return find_inverted_residual<24>(out, stride, small, half, half_filter);
    case 32: return find_inverted_residual<32>(out, stride, small, half, half_filter);
    case 48: return find_inverted_residual<48>(out, stride, small, half, half_filter);
    case 64: return find_inverted_residual<64>(out, stride, small, half, half_filter);
    case 80: return find_inverted_residual<80>(out, stride, small, half, half_filter);
    case 96: return find_inverted_residual<96>(out, stride, small, half, half_filter);
    case 128: return find_inverted_residual<128>(out, stride, small, half, half_filter);
    default: return nullptr;
  }
}
#endif

}  // namespace

extern "C" {

// `pitch`: elements from one pixel of `out` to the next one, more than out_channels where it is part of a larger map.
const char* forward(uint64_t seed, void* x, void* out, const unsigned char* packed, int64_t half,
                    int64_t half_filter, int64_t images, int64_t height, int64_t width, int64_t channels,
                    int64_t hidden, int64_t out_channels, int64_t stride, int64_t residual, int64_t small,
                    int64_t pitch) {
  InvertedResidualLaunch* const launch =
      kernel_of(channels, out_channels, stride, small != 0, half != 0, half_filter != 0);
  if (launch == nullptr) return emulation_result("there is no such instance");
  const InvertedResidualLayout layout = inverted_residual_layout(channels, out_channels, stride, small != 0);
  InvertedResidualArgs args = inverted_residual_args(layout, images, height, width, hidden, residual != 0);
  args.in = {x, height * width * channels, width * channels, channels};
  args.out = {out, int64_t{args.out_height} * args.out_width * pitch, args.out_width * pitch, pitch};
  args.weights = packed;
  emulation::seed = seed;
  launch(args, nullptr);
  return emulation_result(emulation::last_report);
}

// The sizes that the Python side computes as well; all 0 if there is no such kernel.
const char* sizes(uint64_t, int64_t* out, int64_t channels, int64_t out_channels, int64_t stride, int64_t small,
                  int64_t hidden) {
  const InvertedResidualLayout layout = inverted_residual_layout(channels, out_channels, stride, small != 0);
  const bool known = layout.channels != 0;
  out[0] = known ? layout.shared_bytes() : 0;
  out[1] = known ? layout.packed_bytes((hidden + kExpandedChunk - 1) / kExpandedChunk) : 0;
  out[2] = kInvertedResidualVersion;
  out[3] = has_half_filter(channels, stride);
  return nullptr;
}
}
