// SPDX-License-Identifier: Apache-2.0
// transformer: the whole stack in one launch. The rows of a sequence are read once, stay on chip through all layers and
// the final LayerNorm, and are written once.
//
// A block owns whole sequences; a warp owns M tiles of 16 rows of one of them, and everything but attention involves
// only a warp's own rows. Shared memory holds the residual stream in 16 bits, key and value of one head for all rows,
// and a ring of two slots through which the weights are streamed. There is one barrier for what is copied at once,
// which also orders the exchange of keys and values between warps. LayerNorm is folded into the next product: with
// W' = γ∘W, rounded,
//
//     LN(x) Wᵀ + b  =  rstd · (x W'ᵀ − mean · ΣW') + (W β + b)
//
// where ΣW' sums each row of W'. Products of 16-bit numbers are exact in float32, so what cancels where the mean is
// large is no more than the rounding error of x itself.
#include "launch.h"
#include "transformer.h"
#include "transformer_layer.h"

namespace mvit {

template <typename T, int WIDTH, int HEAD_DIM, int M>
MVIT_KERNEL(kMostWarps * 32, 1) transformer_kernel(const TransformerArgs args) {
  const int threads = args.warps * 32;
  Transformer<T, WIDTH, HEAD_DIM, M> transformer{{{{args}, {args}}}};
  transformer.ring.fetch(0, transformer.bytes_of_head(), threads);
  transformer.read_rows();
  MVIT_ROLLED
  for (int layer = 0; layer < args.layers; ++layer) {
    transformer.attention_half(threads);
    transformer.mlp_half(layer, threads);
  }
  transformer.write_rows();
}

template <typename T, int WIDTH, int HEAD_DIM, int M>
int launch_transformer(const TransformerArgs& args, CUstream_st* stream) {
  const int bytes = TransformerLayout{WIDTH, HEAD_DIM}.shared_bytes(args.warps * 16 * M, args.slot);
  return launch(transformer_kernel<T, WIDTH, HEAD_DIM, M>, dim3(args.blocks()), 32 * args.warps, bytes, stream, args);
}

// Heads are a quarter of the width, or 8 as in Kornia. Warps of 32 rows serve widths up to 192, beyond which registers
// do not suffice. Warps of 16 rows serve all widths; up to 192 they are for sequences of at most 16 tokens, with heads
// of a quarter of the width only.
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

#ifdef MVIT_WIDTH  // set by CMakeLists.txt; files that include this one need only the templates
template TransformerLaunch* find_transformer<MVIT_WIDTH>(int64_t head_dim, int64_t tiles, bool half);
#endif

}  // namespace mvit
