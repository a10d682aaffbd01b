// SPDX-License-Identifier: Apache-2.0
// Binding of inverted_residual_packed.cuda: argument checks around inverted_residual_kernel.cu, which writes the map that
// it is given. mvit_kernels/backends/cuda/inverted_residual.py packs the weights (inverted_residual_packing.py), makes
// the map and calls this.
#include "inverted_residual.h"

#include "maps.h"

namespace mvit {
namespace {

constexpr const char* kOp = "inverted_residual";

InvertedResidualLaunch* kernel_of(const InvertedResidualLayout& layout, bool small, bool half, bool half_filter) {
  switch (layout.channels) {
    case 16: return find_inverted_residual<16>(layout.out, layout.stride, small, half, half_filter);
    case 24: return find_inverted_residual<24>(layout.out, layout.stride, small, half, half_filter);
    case 32: return find_inverted_residual<32>(layout.out, layout.stride, small, half, half_filter);
    case 48: return find_inverted_residual<48>(layout.out, layout.stride, small, half, half_filter);
    case 64: return find_inverted_residual<64>(layout.out, layout.stride, small, half, half_filter);
    case 80: return find_inverted_residual<80>(layout.out, layout.stride, small, half, half_filter);
    case 96: return find_inverted_residual<96>(layout.out, layout.stride, small, half, half_filter);
    case 128: return find_inverted_residual<128>(layout.out, layout.stride, small, half, half_filter);
    default: return nullptr;
  }
}

void inverted_residual(const Tensor& x_argument, const Tensor& packed, int64_t version, int64_t hidden, int64_t stride,
                       bool residual, bool half_filter, const Tensor& y) {
  STD_TORCH_CHECK(x_argument.dim() == 4, kOp, ": x must be (B, H, W, C), not of ", x_argument.dim(), " axes");
  const ScalarType type = x_argument.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, kOp,
                  ": the CUDA kernels take float16 and bfloat16");
  STD_TORCH_CHECK(version == kInvertedResidualVersion, kOp, ": the weights were packed by version ", version,
                  " of the order, and the library reads version ", kInvertedResidualVersion, ": build it again");
  const int64_t images = x_argument.size(0), height = x_argument.size(1), width = x_argument.size(2);
  const int64_t channels = x_argument.size(3);
  constexpr int64_t most = int64_t{1} << 31, most_hidden = 1 << 20;
  STD_TORCH_CHECK(height > 0 && width > 0 && height < most && width < most && height * width < most, kOp, ": a map of ",
                  height, " x ", width, " is empty or has more than ", most - 1, " pixels");
  STD_TORCH_CHECK(images < most && images * (height * width) < most, kOp, ": ", images, " images of ", height, " x ", width,
                  "; at most ", most - 1, " pixels are supported");
  STD_TORCH_CHECK(y.dim() == 4, kOp, ": out must be (B, H, W, C), not of ", y.dim(), " axes");
  const int64_t out = y.size(3);
  InvertedResidualLayout layout = inverted_residual_layout(channels, out, stride, false);
  STD_TORCH_CHECK(layout.channels != 0, kOp, ": no kernel for ", channels, " channels in and ", out,
                  " out with stride ", stride);
  STD_TORCH_CHECK(!half_filter || has_half_filter(channels, stride), kOp, ": no kernel that filters in float16 for ",
                  channels, " channels in and ", out, " out with stride ", stride, "; give half_filter=False");
  STD_TORCH_CHECK(!residual || (stride == 1 && channels == out), kOp,
                  ": residual wants stride 1 and as many channels out as in");
  STD_TORCH_CHECK(hidden > 0 && hidden < most_hidden && packed.scalar_type() == ScalarType::Byte &&
                      packed.is_contiguous() && packed.get_device_index() == x_argument.get_device_index() &&
                      packed.numel() == layout.packed_bytes((hidden + kExpandedChunk - 1) / kExpandedChunk),
                  kOp, ": the packed weights are not those of ", channels, " channels in, ", hidden, " hidden and ",
                  out, " out");

  const Device device(x_argument);
  const Limits limits(kOp);
  InvertedResidualArgs args = inverted_residual_args(layout, images, height, width, hidden, residual);
  check_out(kOp, y, x_argument, images, args.out_height, args.out_width, out);
  if (images == 0) return;
  const bool small = takes_small(layout, args.blocks(), limits.multiprocessors, limits.shared_bytes);
  if (small) {
    layout = inverted_residual_layout(channels, out, stride, true);
    args = inverted_residual_args(layout, images, height, width, hidden, residual);
  }
  STD_TORCH_CHECK(layout.shared_bytes() <= limits.shared_bytes, kOp, ": a block needs ", layout.shared_bytes(),
                  " bytes of shared memory, and this GPU has ", limits.shared_bytes);
  const bool direct = has_whole_units(x_argument);
  const Tensor x = direct ? x_argument : torch::stable::contiguous(torch::stable::clone(x_argument));
  args.in = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  args.out = {y.mutable_data_ptr(), y.stride(0), y.stride(1), y.stride(2)};
  args.weights = static_cast<const unsigned char*>(packed.const_data_ptr());
  check_launch(kOp, kernel_of(layout, small, type == ScalarType::Half, half_filter)(args, device.stream()));
}

}  // namespace
}  // namespace mvit

STABLE_TORCH_LIBRARY_IMPL(mvit_kernels, MVIT_DISPATCH_KEY, m) {
  m.impl("inverted_residual_packed.cuda", TORCH_BOX(&mvit::inverted_residual));
}
