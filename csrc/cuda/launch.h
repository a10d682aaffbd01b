// SPDX-License-Identifier: Apache-2.0
// Kernel launches for the .cu files. launch() raises the dynamic shared memory limit if needed and returns a
// cudaError_t.
#pragma once

#ifdef MVIT_EMULATED
#include "emulated_cuda/launch.h"
#else

#include <cuda_runtime.h>

namespace mvit {

constexpr int kOrdinarySharedBytes = 48 << 10;  // available without opting in

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
           const Arguments&... arguments) {
  if (shared_bytes > kOrdinarySharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mvit

#endif  // MVIT_EMULATED
