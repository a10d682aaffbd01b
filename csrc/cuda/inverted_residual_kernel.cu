// SPDX-License-Identifier: Apache-2.0
// inverted_residual: expand 1×1, SiLU, depthwise 3×3, SiLU, project 1×1 (+ x) in one launch. The expanded map, two to
// four times as wide as x, exists only for one tile and 32 of its channels at a time, in shared memory.
//
// A block computes a tile of one image's output. For every chunk of 32 expanded channels, its warps
//
//   expand:  x · W₁ᵀ on tensor cores for all pixels that the tile's windows read, 16 at a time, and SiLU, into the wide
//            buffer;
//   filter:  a lane takes four channels (two halves of eight) of a patch of pixels from the wide buffer, in float32
//            (or, with HALF_FILTER, in float16), and SiLU. What comes out, packed, is the left operand of
//   project: · W₂ᵀ, whose sums stay in registers over all chunks.
//
// With two wide buffers, the next chunk is expanded between the same barriers as this one is filtered. Weights are
// streamed through two slots each. Padding belongs to the expanded map: cells outside of the image are cleared once and
// never written.
//
// With HALF_FILTER, the wide buffer, the filters and W₂ are float16, whatever T is: mvit_kernels.freezing.half_range says
// for which weights and data that is within range.
#include <type_traits>

#include "fragments.h"
#include "inverted_residual.h"
#include "inverted_residual_block.h"
#include "inverted_residual_filter.h"
#include "launch.h"

namespace mvit {

template <typename T, int CHANNELS, int OUT, int STRIDE, bool SMALL, bool HALF_FILTER = false>
struct InvertedResidual : InvertedResidualBlock<T, CHANNELS, OUT, STRIDE, SMALL> {
  using Block = InvertedResidualBlock<T, CHANNELS, OUT, STRIDE, SMALL>;
  using Channels = std::conditional_t<HALF_FILTER, HalfChannels, FloatChannels<T>>;
  using Wide = typename Channels::Element;
  using Block::args, Block::layout, Block::warp, Block::patch_row, Block::patch_column;
  using Block::WARPS, Block::THREADS, Block::SHARES, Block::BUFFERS, Block::PATCH_ROWS, Block::PATCH_COLUMNS, Block::M;
  using Block::N, Block::K, Block::CHUNK_BYTES, Block::EXPANDED_TILES, Block::WIDE_ROW, Block::WIDE_BYTES, Block::X;
  using Block::X_ROW, Block::PLACES;
  static constexpr int WINDOW_ROWS = (PATCH_ROWS - 1) * STRIDE + 3, WINDOW_COLUMNS = (PATCH_COLUMNS - 1) * STRIDE + 3;
  static constexpr int EXPAND_SLOTS = layout.expand_slots(), EXPAND_BYTES = layout.expand_bytes();
  static constexpr int EXPAND_MATRIX = layout.expand_matrix();
  static constexpr int PROJECT_SLOTS = layout.project_slots(), PROJECT_BYTES = layout.project_bytes();
  static constexpr int PROJECT_MATRIX = layout.project_matrix(), FILTERS = layout.filters();

  MVIT_DEVICE explicit InvertedResidual(const InvertedResidualArgs& arguments) : Block(arguments) {}

  // -------------------------------------------------------------------------------------------------------- weights

  static MVIT_DEVICE Shared expand_slot(int chunk) { return EXPAND_SLOTS + chunk % 2 * EXPAND_BYTES; }
  static MVIT_DEVICE Shared project_slot(int chunk) { return PROJECT_SLOTS + chunk % 2 * PROJECT_BYTES; }
  static MVIT_DEVICE Shared wide_buffer(int chunk) { return chunk % BUFFERS * WIDE_BYTES; }

  static MVIT_DEVICE void copy(Shared to, const unsigned char* from, int bytes) {
    MVIT_ROLLED
    for (int i = thread_index() * 16; i < bytes; i += THREADS * 16) copy_async<16>(to + i, from + i);
  }
  MVIT_DEVICE void copy_what_expands(int chunk) const {
    if (chunk < args.chunks)
      copy(expand_slot(chunk), args.weights + int64_t{chunk} * CHUNK_BYTES, EXPAND_BYTES);
  }
  MVIT_DEVICE void copy_what_projects(int chunk) const {
    if (chunk < args.chunks)
      copy(project_slot(chunk), args.weights + int64_t{chunk} * CHUNK_BYTES + EXPAND_BYTES, PROJECT_BYTES);
  }

  // ----------------------------------------------------------------------------------------------------- arithmetic

  // Lane t = lane % 4 has channels 8t to 8t + 7 of a pixel, over the four tiles of columns.
  MVIT_DEVICE void expand(int chunk) const {
    const int lane = lane_index();
    const Shared weights = expand_slot(chunk), wide = wide_buffer(chunk) + lane % 4 * 8;
    uint32_t b[K][4][2];
    MVIT_UNROLL
    for (int k = 0; k < K; ++k) load_fragments(b[k], weights + k * 4 * kFragmentBytes);
    float bias[4][4];
    MVIT_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto two = load_shared<Floats2>(weights + EXPAND_MATRIX + (n * 4 + lane % 4) * 8);
      bias[n][0] = bias[n][2] = two.x, bias[n][1] = bias[n][3] = two.y;
    }
    MVIT_ROLLED
    for (int tile = warp; tile < EXPANDED_TILES; tile += WARPS) {
      float u[4][4];
      MVIT_UNROLL
      for (int k = 0; k < K; ++k) {
        uint32_t a[4];
        load_matrices(a, X + (16 * tile + lane % 16) * X_ROW + (2 * k + lane / 16) * 16);
        MVIT_UNROLL
        for (int n = 0; n < 4; ++n)
          if (k == 0)
            mma<T>(u[n], a, b[k][n], bias[n]);
          else
            mma<T>(u[n], a, b[k][n]);
      }
      MVIT_UNROLL
      for (int n = 0; n < 4; ++n)
        MVIT_UNROLL
        for (int i = 0; i < 4; ++i) u[n][i] = silu_of_double<T>(u[n][i]);
      MVIT_UNROLL
      for (int half = 0; half < 2; ++half) {  // pixel g or g + 8, g = lane / 4
        const int place = load_shared<int>(PLACES + 4 * (16 * tile + 8 * half + lane / 4));
        uint32_t pairs[4];
        MVIT_UNROLL
        for (int n = 0; n < 4; ++n) pairs[n] = pack<Wide>(u[n][2 * half], u[n][2 * half + 1]);
        if (place >= 0) {
          store_shared(wide + place, Words2{pairs[0], pairs[1]});
          store_shared(wide + (place ^ 32), Words2{pairs[2], pairs[3]});
        }
      }
    }
  }

  // sums += silu(filtered) · W₂ᵀ for this chunk's channels, 16 at a time: channels 8t + 4 · half to 8t + 4 · half + 3.
  MVIT_DEVICE void filter_and_project(float (&sums)[M][N][4], int chunk) const {
    const int lane = lane_index();
    const Shared weights = project_slot(chunk);
    const Shared corner = wide_buffer(chunk) + patch_row * PATCH_ROWS * STRIDE * WIDE_ROW +
                          patch_column * kPatchSpan * kExpandedBytes + lane % 4 * 8;
    MVIT_ROLLED
    for (int half = warp % SHARES; half < 2; half += SHARES) {
      uint32_t a[M][4];
      filter(a, corner, (patch_column % 4 ^ half) * 32, ((patch_column + 1) % 4 ^ half) * 32,
             weights + PROJECT_MATRIX + half * (FILTERS / 2) + lane % 4 * 8,
             weights + PROJECT_MATRIX + FILTERS + half * 64 + lane % 4 * 16);
      const Shared from = weights + half * N * kFragmentBytes;
      MVIT_UNROLL
      for (int n = 0; n + 1 < N; n += 2) {
        uint32_t b[2][2];
        load_fragments(b, from + n * kFragmentBytes);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m)
          MVIT_UNROLL
          for (int i = 0; i < 2; ++i) mma<Wide>(sums[m][n + i], a[m], b[i]);
      }
      if constexpr (N % 2 == 1) {
        uint32_t b[1][2];
        load_fragments(b, from + (N - 1) * kFragmentBytes);
        MVIT_UNROLL
        for (int m = 0; m < M; ++m) mma<Wide>(sums[m][N - 1], a[m], b[0]);
      }
    }
  }

  // The depthwise convolution and SiLU for four channels of this lane's patch. `near` and `far` are what place_of adds
  // in the patch's first four columns and in those after them.
  static MVIT_DEVICE void filter(uint32_t (&a)[M][4], Shared corner, int near, int far, Shared filters, Shared biases) {
    Words2 taps[9];
    MVIT_UNROLL
    for (int tap = 0; tap < 9; ++tap) taps[tap] = load_shared<Words2>(filters + tap * 32);
    const auto bias = load_shared<Floats4>(biases);
    Channels y[2 * M];
    MVIT_UNROLL
    for (int pixel = 0; pixel < 2 * M; ++pixel) y[pixel] = Channels::start(bias);
    MVIT_UNROLL
    for (int row = 0; row < WINDOW_ROWS; ++row) {
      Channels values[WINDOW_COLUMNS];
      MVIT_UNROLL
      for (int column = 0; column < WINDOW_COLUMNS; ++column) {
        const int order = (column % 2 * 2 ^ column / 2 % 2) * 32 ^ (column < kPatchSpan ? near : far);
        values[column] = Channels::unpacked(load_shared<Words2>(corner + row * WIDE_ROW + column / 2 * 128 + order));
      }
      MVIT_UNROLL
      for (int patch_row = 0; patch_row < PATCH_ROWS; ++patch_row) {
        const int tap_row = row - patch_row * STRIDE;
        if (tap_row < 0 || tap_row > 2) continue;
        MVIT_UNROLL
        for (int tap_column = 0; tap_column < 3; ++tap_column) {
          const Channels tap = Channels::unpacked(taps[3 * tap_row + tap_column]);
          MVIT_UNROLL
          for (int pixel = 0; pixel < PATCH_COLUMNS; ++pixel)
            y[patch_row * PATCH_COLUMNS + pixel].add_product(values[pixel * STRIDE + tap_column], tap);
        }
      }
    }
    MVIT_UNROLL
    for (int i = 0; i < 4 * M; ++i)  // pixels 2m and 2m + 1 are rows g and g + 8 of the product's tile m
      a[i / 4][i % 4] = y[i / 4 * 2 + i % 2].silu_of_double_pair(i % 4 / 2);
  }

  // ------------------------------------------------------------------------------------------------------- the block

  MVIT_DEVICE void run() const {
    this->copy_x();
    copy_what_expands(0);
    if constexpr (BUFFERS == 1) copy_what_projects(0);
    commit_copies();
    this->prepare_places();
    float sums[M][N][4];
    this->start_with_bias(sums);
    if constexpr (BUFFERS == 2) {
      wait_copies<0>();
      sync_threads();
      copy_what_expands(1);
      copy_what_projects(0);
      commit_copies();
      expand(0);
    }
    MVIT_ROLLED
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      wait_copies<0>();
      sync_threads();  // copies and the wide buffer are there, and everyone has left the slots of the chunk before
      copy_what_expands(chunk + BUFFERS);
      copy_what_projects(chunk + 1);
      if (chunk + 1 < args.chunks) commit_copies();
      if constexpr (BUFFERS == 2) {
        if (chunk + 1 < args.chunks) expand(chunk + 1);
      } else {
        expand(chunk);
        sync_threads();  // the wide buffer is there
      }
      filter_and_project(sums, chunk);
    }
    if constexpr (SHARES == 2) this->join_shares(sums);
    if (warp % SHARES == 0) this->write(sums);
  }
};

template <typename T, int CHANNELS, int OUT, int STRIDE, bool SMALL, bool HALF_FILTER>
MVIT_KERNEL((InvertedResidual<T, CHANNELS, OUT, STRIDE, SMALL>::THREADS),
            (InvertedResidual<T, CHANNELS, OUT, STRIDE, SMALL>::layout.tile.blocks))
inverted_residual_kernel(const InvertedResidualArgs args) {
  InvertedResidual<T, CHANNELS, OUT, STRIDE, SMALL, HALF_FILTER>(args).run();
}

template <typename T, int CHANNELS, int OUT, int STRIDE, bool SMALL, bool HALF_FILTER = false>
int launch_inverted_residual(const InvertedResidualArgs& args, CUstream_st* stream) {
  constexpr InvertedResidualLayout layout = inverted_residual_layout(CHANNELS, OUT, STRIDE, SMALL);
  return launch(inverted_residual_kernel<T, CHANNELS, OUT, STRIDE, SMALL, HALF_FILTER>,
                dim3(static_cast<unsigned>(args.blocks())), 32 * layout.warps(), layout.shared_bytes(), stream, args);
}

// Compiles the kernels for every entry of kInvertedResiduals with that many channels.
template <int CHANNELS, int ENTRY = 0>
InvertedResidualLaunch* find_entry(int64_t out, int64_t stride, bool small, bool half, bool half_filter) {
  if constexpr (ENTRY < sizeof(kInvertedResiduals) / sizeof(kInvertedResiduals[0])) {
    constexpr InvertedResidualLayout entry = kInvertedResiduals[ENTRY];
    if constexpr (entry.channels == CHANNELS) {
      constexpr InvertedResidualLayout first = inverted_residual_layout(CHANNELS, entry.out, entry.stride, false);
      constexpr bool is_small = first.shared_bytes() != entry.shared_bytes();
      if (entry.out == out && entry.stride == stride && is_small == small) {
        if (!half_filter)
          return half ? launch_inverted_residual<Half, CHANNELS, entry.out, entry.stride, is_small>
                      : launch_inverted_residual<BFloat16, CHANNELS, entry.out, entry.stride, is_small>;
        if constexpr (has_half_filter(CHANNELS, entry.stride))
          return half ? launch_inverted_residual<Half, CHANNELS, entry.out, entry.stride, is_small, true>
                      : launch_inverted_residual<BFloat16, CHANNELS, entry.out, entry.stride, is_small, true>;
      }
    }
    return find_entry<CHANNELS, ENTRY + 1>(out, stride, small, half, half_filter);
  } else {
    return nullptr;
  }
}

template <int CHANNELS>
InvertedResidualLaunch* find_inverted_residual(int64_t out, int64_t stride, bool small, bool half, bool half_filter) {
  return find_entry<CHANNELS>(out, stride, small, half, half_filter);
}

#ifdef MVIT_CHANNELS  // set by CMakeLists.txt; files that include this one need only the templates
template InvertedResidualLaunch* find_inverted_residual<MVIT_CHANNELS>(int64_t out, int64_t stride, bool small,
                                                                       bool half, bool half_filter);
#endif

}  // namespace mvit
