// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA runtime that the library has inside gets on with the driver.
#include <cuda_runtime_api.h>

// "" or the problem: a driver that is older than the runtime, no driver, no GPU.
extern "C" __attribute__((visibility("default"))) const char* mvit_kernels_cuda_problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
