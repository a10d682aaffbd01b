// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch.h for the emulation: a launch runs the kernel on the CPU and leaves its report in `last_report`.
#pragma once

#include <dlfcn.h>
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

// Gets launches instead of the emulation, if it is set: the kernel's mangled name, and its parameters as the GPU would.
using Watcher = void (*)(const char* kernel, int64_t blocks_x, int64_t blocks_y, int64_t threads, int64_t shared_bytes,
                         const unsigned char* parameters, int64_t bytes);
MVIT_OWN inline Watcher watcher = nullptr;

template <typename T>
void append(std::vector<unsigned char>& parameters, const T& value) {
  const std::size_t at = (parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  parameters.resize(at + sizeof(T));
  std::memcpy(&parameters[at], &value, sizeof(T));
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, CUstream_st*,
           const Arguments&... arguments) {
  if (emulation::watcher) {
    Dl_info found{};
    dladdr(reinterpret_cast<const void*>(kernel), &found);
    std::vector<unsigned char> parameters;
    (emulation::append<std::remove_cv_t<Parameters>>(parameters, arguments), ...);
    emulation::last_report.clear();
    emulation::watcher(found.dli_sname ? found.dli_sname : "", blocks.x, blocks.y, threads, shared_bytes,
                       parameters.data(), static_cast<int64_t>(parameters.size()));
    return 0;
  }
  emulation::last_report = emulation::emulate(emulation::seed, blocks.x, static_cast<int>(blocks.y), threads,
                                              static_cast<uint32_t>(shared_bytes), kernel, arguments...);
  return !emulation::last_report.empty();
}

}  // namespace mvit

// For support/ptx/compiled_cuda.py.
extern "C" __attribute__((used)) inline void emulation_watch(mvit::emulation::Watcher watcher) {
  mvit::emulation::watcher = watcher;
}
