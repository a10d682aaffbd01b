// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch.h for the emulation: a launch runs the kernel on the CPU and leaves its report in `last_report`.
#pragma once

#include <simt.h>  // csrc/cuda's

struct CUstream_st;

namespace mvit {

struct dim3 {
  unsigned x, y = 1;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};

namespace emulation {

MVIT_OWN inline uint64_t seed = 0;  // for the next launch
MVIT_OWN inline std::string last_report;

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, CUstream_st*,
           const Arguments&... arguments) {
  emulation::last_report = emulation::emulate(emulation::seed, blocks.x, static_cast<int>(blocks.y), threads,
                                              static_cast<uint32_t>(shared_bytes), kernel, arguments...);
  return !emulation::last_report.empty();
}

}  // namespace mvit
