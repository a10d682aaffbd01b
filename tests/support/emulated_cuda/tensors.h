// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/tensors.h for the emulation: bindings are registered for CPU tensors, and the report of a launch becomes
// its error.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

struct CUstream_st;

#define MVIT_DISPATCH_KEY CPU

namespace mvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace emulation {

__attribute__((visibility("hidden"))) extern std::string last_report;

}  // namespace emulation

class Device {
 public:
  explicit Device(const Tensor&) {}
  CUstream_st* stream() const { return nullptr; }
};

inline void check_launch(const char* operator_name, int code) {
  STD_TORCH_CHECK(code == 0, operator_name, ": ", emulation::last_report);
}

struct Limits {  // a GPU for which plans of all kinds occur: few multiprocessors, and the smallest shared memory
  int multiprocessors = 4, shared_bytes = 99 << 10;

  explicit Limits(const char*) {}
};

}  // namespace mvit
