// SPDX-License-Identifier: Apache-2.0
// Binding of transformer_packed.cuda: argument checks around transformer_kernel.cu, which writes the map that it is given.
// mvit_kernels/backends/cuda/transformer.py packs the weights (packing.py), chooses the launch plan (plans.py), makes the
// map and calls this.
#include "transformer.h"

#include <vector>

#include "maps.h"

namespace mvit {
namespace {

void transformer(const Tensor& x_argument, const Tensor& packed, int64_t version, int64_t layers, int64_t head_dim,
                 int64_t hidden, bool final_norm, std::vector<int64_t> patch, double eps, int64_t tiles,
                 int64_t sequences_of_a_block, int64_t slot, const Tensor& out) {
  STD_TORCH_CHECK(x_argument.dim() == 4, "transformer: x must be (B, H, W, d), not of ", x_argument.dim(), " axes");
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0 && x_argument.size(1) % patch[0] == 0 &&
                      x_argument.size(2) % patch[1] == 0,
                  "transformer: a map of ", x_argument.size(1), " x ", x_argument.size(2),
                  " does not divide into the patches");
  const ScalarType type = x_argument.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "transformer: the CUDA kernels take float16 and bfloat16");
  STD_TORCH_CHECK(version == kTransformerVersion, "transformer: the weights were packed by version ", version,
                  " of the order, and the library reads version ", kTransformerVersion, ": build it again");
  const int64_t images = x_argument.size(0), height = x_argument.size(1), width = x_argument.size(2);
  const int64_t d = x_argument.size(3);
  TransformerLaunch* launch = Transformers::find(d, head_dim, tiles, type == ScalarType::Half);
  STD_TORCH_CHECK(launch != nullptr, "transformer: no kernel for rows of ", d, ", heads of ", head_dim, " and warps of ",
                  16 * tiles, " rows");
  const TransformerLayout layout{static_cast<int>(d), static_cast<int>(head_dim)};
  constexpr int64_t most = 1 << 20;  // bound of layers and hidden units, so that their bytes do not overflow
  STD_TORCH_CHECK(layers > 0 && layers < most && hidden > 0 && hidden < most && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.get_device_index() == x_argument.get_device_index() &&
                      packed.numel() == layout.packed_bytes(layers, (hidden + kHiddenChunk - 1) / kHiddenChunk),
                  "transformer: the packed weights are not those of ", layers, " layers with ", hidden, " hidden units");

  const Device device(x_argument);
  check_out("transformer", out, x_argument, images, height, width, d);
  if (images == 0 || height == 0 || width == 0) return;
  const Tensor x = has_whole_units(x_argument) ? x_argument : torch::stable::contiguous(torch::stable::clone(x_argument));
  const int64_t tokens = height / patch[0] * (width / patch[1]);
  STD_TORCH_CHECK(sequences_of_a_block > 0 && sequences_of_a_block <= kMostWarps && tokens <= kMostWarps * 16 * tiles &&
                      images * patch[0] * patch[1] < (int64_t{1} << 31),
                  "transformer: ", sequences_of_a_block, " sequences of ", tokens, " tokens are no block");
  constexpr int64_t most_slot = 1 << 20;
  STD_TORCH_CHECK(slot >= layout.least_slot() && slot % 128 == 0 && slot < most_slot, "transformer: slots of ", slot,
                  " bytes; multiples of 128 from ", layout.least_slot(), " on are wanted");
  TransformerArgs args = transformer_args(layout, {tiles, sequences_of_a_block, slot}, images, height, width, patch[0], patch[1], layers,
                                          hidden, final_norm, eps);
  STD_TORCH_CHECK(args.warps <= kMostWarps, "transformer: ", sequences_of_a_block, " sequences of ", tokens,
                  " tokens are no block");
  args.in = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  args.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  args.weights = static_cast<const unsigned char*>(packed.const_data_ptr());
  check_launch("transformer", launch(args, device.stream()));
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("transformer_packed.cuda", TORCH_BOX(&mvit::transformer));
}
