// SPDX-License-Identifier: Apache-2.0
// The parts of LibTorch's stable ABI (2.10) and of the CUDA runtime that the bindings use.
#pragma once

#ifdef MVIT_EMULATED
#include "emulated_cuda/tensors.h"
#else

#include <cuda_runtime_api.h>

#include <cstdint>

// The only symbol that a PyTorch without CUDA lacks. It is weak, so that the library loads there too.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define MVIT_DISPATCH_KEY CUDA

namespace mvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device current for the lifetime of this object, and gives its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Raises the error of a failed launch, or of an earlier kernel.
inline void check_launch(const char* operator_name, int code) {
  const auto error = static_cast<cudaError_t>(code);
  STD_TORCH_CHECK(error == cudaSuccess, operator_name, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Properties of the current device that launch plans depend on.
struct Limits {
  int multiprocessors = 0, shared_bytes = 0;  // shared_bytes: the most that a block can have

  explicit Limits(const char* operator_name) {
    int device = 0;
    check_launch(operator_name, cudaGetDevice(&device));
    check_launch(operator_name, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check_launch(operator_name,
                 cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }
};

}  // namespace mvit

#endif  // MVIT_EMULATED
