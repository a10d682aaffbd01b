// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA runtime linked into the library works with the installed driver.
#include <cuda_runtime_api.h>

// "" or the problem: a driver older than the runtime, no driver, no GPU. Called from Python through ctypes.
extern "C" __attribute__((visibility("default"))) const char* mvit_kernels_cuda_problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
