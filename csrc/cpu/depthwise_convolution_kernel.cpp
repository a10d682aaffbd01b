// SPDX-License-Identifier: Apache-2.0
// Depthwise 3×3 convolution of a map in place, with channels in the lanes: nine products a vector, in float32 for
// bfloat16 maps too. A layer of this kind takes a hundredth of its network's time, so there is one code path a pixel
// count and nothing is packed. Taps outside the map are left out; the map needs no border.
#include "depthwise_convolution.h"
#include "panels.h"

namespace mvit {
namespace MVIT_ISA {

// sum[n] += taps of rows [rows_begin, rows_end) and columns [columns_begin, columns_end) at the n-th of N adjacent
// output pixels. The centre tap of the first is at `centre`.
template <int N, typename E>
MVIT_INLINE void add_taps(Vec<float> (&sum)[N], const Vec<float> (&weight)[9], const E* centre, int64_t tap_row,
                          int64_t tap_column, int64_t next, int present, int rows_begin, int rows_end,
                          int columns_begin, int columns_end) {
  for (int i = rows_begin; i < rows_end; ++i)
    for (int j = columns_begin; j < columns_end; ++j) {
      const E* p = centre + (i - 1) * tap_row + (j - 1) * tap_column;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[n] = fma(load_first(p + n * next, present), weight[3 * i + j], sum[n]);
    }
}

template <typename P>
void depthwise_convolution(const DepthwiseConvolutionArgs& args, int64_t begin, int64_t end) {
  using E = typename P::Weight;
  constexpr int64_t size = Vec<float>::size;
  const DepthwiseConvolutionShape& shape = args.shape;
  const int64_t stride = shape.stride, dilation = shape.dilation, columns = shape.out_width();
  const int64_t tap_row = dilation * args.in.row_stride, tap_column = dilation * args.in.column_stride;
  const int64_t next = stride * args.in.column_stride;
  // Output columns [inner, outer) have all their taps inside the map.
  const int64_t inner = smaller(columns, (dilation + stride - 1) / stride);
  const int64_t reach = shape.in_width - dilation;
  const int64_t outer = reach > 0 && (reach - 1) / stride + 1 > inner ? (reach - 1) / stride + 1 : inner;
  for (int64_t y = begin; y < end; ++y) {
    const int rows_begin = y * stride < dilation ? 1 : 0, rows_end = y * stride + dilation < shape.in_height ? 3 : 2;
    const E* in = static_cast<const E*>(args.in.data) + y * stride * args.in.row_stride;
    E* out = static_cast<E*>(args.out.data) + y * args.out.row_stride;
    const int64_t room = args.out.room(shape.channels);
    for (int64_t c = 0; c < room; c += size) {
      const int present = shape.channels > c ? static_cast<int>(smaller(size, shape.channels - c)) : 0;
      const int written = static_cast<int>(smaller(size, room - c));  // beyond the channels there are zeros
      Vec<float> weight[9];
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) weight[tap] = load_first(args.weights + tap * shape.channels + c, present);
      const Vec<float> bias = load_first(args.weights + 9 * shape.channels + c, present);
      const auto pixels = [&](auto n, int64_t x, int columns_begin, int columns_end) {
        constexpr int N = decltype(n)::value;
        Vec<float> sum[1][N];
        for (auto& s : sum[0]) s = bias;
        add_taps(sum[0], weight, in + x * next + c, tap_row, tap_column, next, present, rows_begin, rows_end,
                 columns_begin, columns_end);
        activate<P>(sum, shape.activation);
        for (int i = 0; i < N; ++i) store_first(out + (x + i) * args.out.column_stride + c, sum[0][i], written);
      };
      const auto edge = [&](int64_t first, int64_t last) {
        for (int64_t x = first; x < last; ++x)
          pixels(std::integral_constant<int, 1>{}, x, x * stride < dilation ? 1 : 0,
                 x * stride + dilation < shape.in_width ? 3 : 2);
      };
      edge(0, inner);
      int64_t x = inner;
      for (; x + 4 <= outer; x += 4) pixels(std::integral_constant<int, 4>{}, x, 0, 3);
      for (; x < outer; ++x) pixels(std::integral_constant<int, 1>{}, x, 0, 3);
      edge(outer, columns);
    }
  }
}

}  // namespace MVIT_ISA

extern const DepthwiseConvolutionTable MVIT_TABLE(depthwise_convolution) = {
    MVIT_PLAIN_ENTRY({MVIT_ISA::depthwise_convolution<MVIT_ISA::Plain<float>>}),
    MVIT_PAIRS_ENTRY({MVIT_ISA::depthwise_convolution<MVIT_ISA::Bf16Pairs>}),
};

}  // namespace mvit
