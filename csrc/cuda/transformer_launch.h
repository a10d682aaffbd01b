// SPDX-License-Identifier: Apache-2.0
// Launches of the transformer kernel, for the files that compile it for rows of one width each.
#pragma once

#include "launch.h"
#include "transformer_kernel.h"

namespace mvit {

template <typename T, int WIDTH, int HEAD_DIM, int M>
int launch_transformer(const TransformerArgs& args, CUstream_st* stream) {
  const int bytes = TransformerLayout{WIDTH, HEAD_DIM}.shared_bytes(args.warps * 16 * M);
  return launch(transformer_kernel<T, WIDTH, HEAD_DIM, M>, dim3(args.blocks()), 32 * args.warps, bytes, stream, args);
}

// Heads are a quarter of the rows, or 8 as in Kornia. Warps of 32 rows take rows up to 192 wide, beyond which they have
// not the registers; warps of 16 take all, but up to 192 only where sequences are that short.
template <int WIDTH>
TransformerLaunch* find_transformer(int64_t head_dim, int64_t tiles, bool half) {
  constexpr int most_tiles = WIDTH <= 192 ? 2 : 1;
  if (head_dim == WIDTH / 4 && tiles == 1)
    return half ? launch_transformer<Half, WIDTH, WIDTH / 4, 1> : launch_transformer<BFloat16, WIDTH, WIDTH / 4, 1>;
  if (head_dim == WIDTH / 4 && tiles == most_tiles)
    return half ? launch_transformer<Half, WIDTH, WIDTH / 4, most_tiles>
                : launch_transformer<BFloat16, WIDTH, WIDTH / 4, most_tiles>;
  if (head_dim == 8 && tiles == most_tiles)
    return half ? launch_transformer<Half, WIDTH, 8, most_tiles> : launch_transformer<BFloat16, WIDTH, 8, most_tiles>;
  return nullptr;
}

}  // namespace mvit
