// SPDX-License-Identifier: Apache-2.0
// MobileNetV2's inverted residual in one pass: expand 1×1, SiLU, depthwise 3×3, SiLU, project 1×1 (+ residual). The
// expanded tensor is never materialised. Expanded rows go into a ring buffer of the 2 · dilation + 1 rows that the
// depthwise convolution reads at once, which stays in L2 (98 to 198 KB in MobileViT-S at 256 px, float32). The
// depthwise output goes into a buffer of kBufferPixels pixels, which is projected immediately. In float32 with AVX-512
// the buffer has 8 KB at 64 hidden channels, 48 KB at 384 and 64 KB at 512: the smaller sizes stay in L1, the larger
// ones exceed Zen 4's 32 KB and stay in L2.
//
// A row of the ring is [block of one vector of hidden channels][position][channel], so the pixels of one block are a
// contiguous stream. Positions are columns with zeros on both sides, so the depthwise convolution has no left or right
// edge; above and below the map it reads a row of zeros.
#include "depthwise.h"
#include "inverted_residual.h"
#if defined(MVIT_TILES)
#include "tile_inverted_residual.h"
#endif

namespace mvit {
namespace MVIT_ISA {

// Whole tiles, and an even number. On AVX2, 24 pixels are 16 % faster than 8; on AVX-512, 8 to 32 make little
// difference.
constexpr int64_t kBufferPixels = 4 * kTileRows;

template <typename P>
struct PackedInvertedResidual {
  using Operand = typename P::Operand;
  int64_t hidden;      // padded to whole vectors
  Operand* expand;     // panels of in_channels × hidden
  Operand* depthwise;  // [block of one vector][tap][channel]
  Operand* project;    // panels of hidden × out_channels
  float *expand_bias, *depthwise_bias, *project_bias;  // padded to whole vectors
  std::size_t end;

  PackedInvertedResidual(const InvertedResidualShape& shape, const void* memory) {
    hidden = round_up(shape.hidden, Vec<float>::size);
    PanelPieces pieces(memory);
    expand = pieces.take<Operand>(panels_size<P>(shape.hidden, shape.in_channels));
    depthwise = pieces.take<Operand>(9 * hidden);
    project = pieces.take<Operand>(panels_size<P>(shape.out_channels, shape.hidden));
    expand_bias = pieces.take<float>(hidden);
    depthwise_bias = pieces.take<float>(hidden);
    project_bias = pieces.take<float>(round_up(shape.out_channels, Vec<float>::size));
    end = pieces.at;
  }
};

template <typename P>
std::size_t packed_inverted_residual_bytes(const InvertedResidualShape& shape) {
  return PackedInvertedResidual<P>(shape, nullptr).end;
}

template <typename P>
void pack_inverted_residual(const InvertedResidualShape& shape, const InvertedResidualWeights& weights, void* memory) {
  using Weight = typename P::Weight;
  constexpr int64_t size = Vec<float>::size;
  const PackedInvertedResidual<P> packed(shape, memory);
  const auto* expand = static_cast<const Weight*>(weights.expand);
  const auto* depthwise = static_cast<const Weight*>(weights.depthwise);
  const auto* project = static_cast<const Weight*>(weights.project);
  pack_panels<P>(packed.expand, shape.hidden, shape.in_channels,
                 [&](int64_t column, int64_t k) { return expand[column * shape.in_channels + k]; });
  for (int64_t c = 0; c < shape.hidden; c += size)
    Depthwise<P>::pack(packed.depthwise + c * 9, depthwise + c * 9, smaller(size, shape.hidden - c));
  pack_panels<P>(packed.project, shape.out_channels, shape.hidden,
                 [&](int64_t column, int64_t k) { return project[column * shape.hidden + k]; });
  pack_bias(packed.expand_bias, weights.expand_bias, shape.hidden);
  pack_bias(packed.depthwise_bias, weights.depthwise_bias, shape.hidden);
  pack_bias(packed.project_bias, weights.project_bias, shape.out_channels);
}

template <typename P, typename E>
struct InvertedResidualScratch {
  using Operand = typename P::Operand;
  using Weight = typename P::Weight;
  // Whether input elements are converted to the arithmetic's dtype.
  static constexpr bool kConverts = sizeof(E) != sizeof(Weight);
  int64_t ring_rows;
  int64_t block_size, row_size;  // size in Operands of one channel block of a ring row, and of the whole row
  int64_t row_ld;                // elements from one pixel to the next in `row`
  Operand* ring;                 // [row][block][position][channel]
  Operand* zeros;                // [position][channel]; stands in for any block of a row outside the map
  Weight* buffer;                // [kBufferPixels][hidden]
  Weight* row;                   // one row of the input, converted
  std::size_t end;

  InvertedResidualScratch(const InvertedResidualShape& shape, void* memory) {
    constexpr int64_t size = Vec<float>::size;
    const int64_t hidden = round_up(shape.hidden, size);
    ring_rows = 2 * shape.dilation + 1;
    block_size = P::rows(Depthwise<P>::left(shape.dilation) + shape.in_width + shape.dilation) * size;
    row_size = hidden / size * block_size;
    row_ld = kConverts ? round_up(shape.in_channels, size) : 0;
    PanelPieces pieces(memory);
    ring = pieces.take<Operand>(ring_rows * row_size);
    zeros = pieces.take<Operand>(block_size);
    buffer = pieces.take<Weight>(kBufferPixels * hidden);
    row = pieces.take<Weight>(shape.in_width * row_ld);
    end = pieces.at;
  }
};

template <typename P, typename E>
std::size_t inverted_residual_scratch_bytes(const InvertedResidualShape& shape) {
  return InvertedResidualScratch<P, E>(shape, nullptr).end;
}

template <typename P, typename E>
struct InvertedResidual {
  using Weight = typename P::Weight;
  static constexpr int64_t size = Vec<float>::size;
  const InvertedResidualArgs& args;
  const InvertedResidualShape& shape;
  const PackedInvertedResidual<P> packed;
  const InvertedResidualScratch<P, E> scratch;
  const E* in;
  E* out;

  InvertedResidual(const InvertedResidualArgs& arguments, int64_t image, void* memory)
      : args(arguments),
        shape(arguments.shape),
        packed(arguments.shape, arguments.packed),
        scratch(arguments.shape, memory),
        in(static_cast<const E*>(args.in.data) + image * args.in.image_stride),
        out(static_cast<E*>(args.out.data) + image * args.out.image_stride) {}

  typename P::Operand* ring_row(int64_t y) const { return scratch.ring + y % scratch.ring_rows * scratch.row_size; }

  // Zeroes the positions on both sides of every row; everything between is written before it is read. About 200 KB,
  // once per call.
  void clear_ring() const {
    char* const begin = reinterpret_cast<char*>(scratch.ring);
    std::memset(begin, 0, static_cast<std::size_t>(reinterpret_cast<char*>(scratch.buffer) - begin));
  }

  // Expands input row y into the ring.
  void expand(int64_t y) const {
    const Weight* a;
    int64_t lda;
    const E* row = in + y * args.in.row_stride;
    if constexpr (!InvertedResidualScratch<P, E>::kConverts) {
      a = row;
      lda = args.in.column_stride;
    } else {
      a = scratch.row;
      lda = scratch.row_ld;
      for (int64_t x = 0; x < shape.in_width; ++x)
        for (int64_t c = 0; c < shape.in_channels; c += size)
          store(scratch.row + x * lda + c, load_first(row + x * args.in.column_stride + c,
                                                      static_cast<int>(smaller(size, shape.in_channels - c))));
    }
    const int64_t depth = P::rows(shape.in_channels), block = block_of<Weight>(depth);
    in_lane_blocks<float>(0, packed.hidden, [&](auto vectors, int64_t column, int64_t) {
      constexpr int V = decltype(vectors)::value;
      const auto* weights = packed.expand + column * depth;
      auto* blocks = ring_row(y) + column / size * scratch.block_size;
      in_steps<kTileRows>(shape.in_width, [&](auto pixels, int64_t x) {
        constexpr int R = decltype(pixels)::value;
        Vec<float> tile[R][V];
        begin_with_bias(tile, packed.expand_bias + column);
        multiply_add_in_blocks<R, V, Operand::row_major>(tile, a + x * lda, lda, weights, V * size, depth, block);
        map_tile(tile, [](Vec<float> value, int, int) { return silu_for<P>(value); });
        Depthwise<P>::store_expanded(blocks, scratch.block_size, Depthwise<P>::left(shape.dilation) + x, tile);
      });
    });
  }

  // buffer[i] = SiLU(depthwise) of output pixels (y, x + i), i < count
  template <int kStride, int kDilation>
  void filter(int64_t y, int64_t x, int64_t count) const {
    const typename P::Operand* row[3];
    int64_t step[3];
    for (int i = 0; i < 3; ++i) {
      const int64_t at = y * shape.stride + (i - 1) * shape.dilation;
      const bool inside = at >= 0 && at < shape.in_height;
      row[i] = inside ? ring_row(at) : scratch.zeros;
      step[i] = inside ? scratch.block_size : 0;
    }
    for (int64_t c = 0; c < packed.hidden; c += size) {
      const typename Depthwise<P>::template Filter<kStride, kDilation> weights(packed.depthwise + c * 9, shape.stride,
                                                                               shape.dilation);
      const Vec<float> bias = load(packed.depthwise_bias + c);
      const auto pixels = [&](auto n, int64_t i) {
        Vec<float> sum[decltype(n)::value];
        for (auto& s : sum) s = bias;
        weights.add(sum, row, x + i);
        for (int p = 0; p < decltype(n)::value; ++p)
          store_first(scratch.buffer + (i + p) * packed.hidden + c, silu_for<P>(sum[p]), size);
      };
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) pixels(std::integral_constant<int, 4>{}, i);
      for (; i + 2 <= count; i += 2) pixels(std::integral_constant<int, 2>{}, i);  // always starts at an even pixel
      if (i < count) pixels(std::integral_constant<int, 1>{}, i);
      for (int j = 0; j < 3; ++j) row[j] += step[j];
    }
  }

  // Projects the buffer to output pixels (y, x + i), i < count.
  void project(int64_t y, int64_t x, int64_t count) const {
    E* to = out + y * args.out.row_stride + x * args.out.column_stride;
    const E* from = in + y * args.in.row_stride + x * args.in.column_stride;
    const int64_t depth = P::rows(shape.hidden), block = block_of<Weight>(depth);
    in_lane_blocks<float>(0, shape.out_channels, [&](auto vectors, int64_t column, int64_t present) {
      constexpr int V = decltype(vectors)::value;
      in_steps<kTileRows>(count, [&](auto pixels, int64_t i) {
        constexpr int R = decltype(pixels)::value;
        Vec<float> tile[R][V];
        begin_with_bias(tile, packed.project_bias + column);
        multiply_add_in_blocks<R, V, Operand::row_major>(tile, scratch.buffer + i * packed.hidden, packed.hidden,
                                                         packed.project + column * depth, V * size, depth, block);
        if (shape.residual)
          map_tile(tile, [&](Vec<float> value, int r, int v) {
            return value + load_first(from + (i + r) * args.in.column_stride + column + v * size,
                                      static_cast<int>(smaller(size, present - v * size)));
          });
        store_pixels(tile, present, [&](int r) { return to + (i + r) * args.out.column_stride + column; });
      });
    });
  }

  void run(int64_t begin, int64_t end) const {
    clear_ring();
    const int64_t first = begin * shape.stride - shape.dilation;
    int64_t next = first > 0 ? first : 0;
    for (int64_t y = begin; y < end; ++y) {
      const int64_t last = smaller(shape.in_height - 1, y * shape.stride + shape.dilation);
      for (; next <= last; ++next) expand(next);
      for (int64_t x = 0; x < shape.out_width(); x += kBufferPixels) {
        const int64_t count = smaller(kBufferPixels, shape.out_width() - x);
        if (shape.dilation == 1 && shape.stride == 1)
          filter<1, 1>(y, x, count);
        else if (shape.dilation == 1)
          filter<2, 1>(y, x, count);
        else
          filter<0, 0>(y, x, count);
        project(y, x, count);
      }
    }
  }
};

template <typename P, typename E>
void inverted_residual(const InvertedResidualArgs& args, int64_t image, int64_t begin, int64_t end, void* scratch) {
  InvertedResidual<P, E>(args, image, scratch).run(begin, end);
}

}  // namespace MVIT_ISA

#define MVIT_INVERTED_RESIDUAL_KERNELS(P, E)                                                         \
  {                                                                                                  \
    MVIT_ISA::packed_inverted_residual_bytes<MVIT_ISA::P>, MVIT_ISA::pack_inverted_residual<MVIT_ISA::P>, \
        MVIT_ISA::inverted_residual_scratch_bytes<MVIT_ISA::P, E>, MVIT_ISA::inverted_residual<MVIT_ISA::P, E> \
  }

#if defined(MVIT_TILES)
#define MVIT_PAIRS_OF_INVERTED_RESIDUAL                                                       \
  {                                                                                           \
    MVIT_ISA::packed_tile_inverted_residual_bytes, MVIT_ISA::pack_tile_inverted_residual,     \
        MVIT_ISA::tile_inverted_residual_scratch_bytes, MVIT_ISA::inverted_residual_on_tiles \
  }
#else
#define MVIT_PAIRS_OF_INVERTED_RESIDUAL MVIT_INVERTED_RESIDUAL_KERNELS(Bf16Pairs, MVIT_ISA::bfloat16)
#endif

extern const InvertedResidualTable MVIT_TABLE(inverted_residual) = {
    MVIT_PLAIN_ENTRY(MVIT_INVERTED_RESIDUAL_KERNELS(Plain<float>, float)),
    MVIT_PLAIN_ENTRY(MVIT_INVERTED_RESIDUAL_KERNELS(Plain<float>, MVIT_ISA::bfloat16)),
    MVIT_PAIRS_ENTRY(MVIT_PAIRS_OF_INVERTED_RESIDUAL),
};

}  // namespace mvit
