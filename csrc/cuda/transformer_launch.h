// SPDX-License-Identifier: Apache-2.0
// Launches of the transformer kernel, for the files that compile some of its instances.
#pragma once

#include "transformer_kernel.h"
#include "transformer_table.h"

namespace mvit {

template <typename T, int WIDTH, int HEAD_DIM, int M>
cudaError_t launch_transformer(const TransformerArgs& args, cudaStream_t stream) {
  constexpr TransformerLayout layout{WIDTH, HEAD_DIM};
  const auto kernel = transformer_kernel<T, WIDTH, HEAD_DIM, M>;
  const int bytes = layout.shared_bytes(args.warps * 16 * M);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (args.sequences + args.sequences_of_a_block - 1) / args.sequences_of_a_block;
  kernel<<<static_cast<unsigned>(blocks), args.warps * 32, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace mvit
