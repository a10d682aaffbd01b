// SPDX-License-Identifier: Apache-2.0
// Shared by the host and the kernel of `inverted_residual`: arguments, the table of tiles, the order of the packed
// weights (written by mvit_kernels/backends/cuda/inverted_residual_packing.py) and the layout of a block's shared
// memory.
#pragma once

#include <cstdint>

#include "shared_rows.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

constexpr int kInvertedResidualVersion = 1;  // of the packed weights; VERSION in inverted_residual_packing.py is equal

constexpr int kExpandedChunk = 32;                   // expanded channels at a time
constexpr int kExpandedBytes = 2 * kExpandedChunk;   // of one pixel of the wide buffer
constexpr int kPatchSpan = 4;                        // expanded columns from one lane's patch to the next one's

// A block computes `rows` × `columns` output pixels of one image. A lane has a patch of `patch_rows` × (4 / stride) of
// them, for 8 of the 32 channels of a chunk. With two wide buffers (`buffers`) a chunk is expanded while the one before
// is filtered, between the same barriers. With two `shares` twice as many warps have the same patches, each for one half
// of the channels, and their sums are added at the end. `blocks` on a multiprocessor bound the registers.
struct InvertedResidualTile {
  int rows, columns, patch_rows, buffers, shares, blocks;
};

// Weights are packed in chunks of 32 expanded channels, each stored in memory as the kernel reads it:
//
//   what expands:  the fragments (see fragments.h) of four tiles of columns for every 16 input channels, then the 32
//                  biases in float32, two for every lane and tile;
//   what projects: the fragments of all output columns for each 16 expanded channels; the filters, in two halves of
//                  nine taps of four channels a lane; the depthwise biases in float32, in the same halves.
//
// After all chunks, the biases of the projection in float32. Input channels are padded to 16 (24 to 32), expanded
// channels to 32, with zeros. What precedes a SiLU is halved: silu(2u) = u + u · tanh u.
struct InvertedResidualLayout {
  int channels, out, stride;
  InvertedResidualTile tile;

  constexpr int padded() const { return channels == 24 ? 32 : channels; }
  constexpr int expand_matrix() const { return padded() * kExpandedChunk * 2; }
  constexpr int expand_bytes() const { return expand_matrix() + kExpandedChunk * 4; }
  constexpr int project_matrix() const { return out * kExpandedChunk * 2; }
  constexpr int filters() const { return 9 * kExpandedChunk * 2; }
  constexpr int project_bytes() const { return project_matrix() + filters() + kExpandedChunk * 4; }
  constexpr int chunk_bytes() const { return expand_bytes() + project_bytes(); }
  constexpr int64_t packed_bytes(int64_t chunks) const { return chunks * chunk_bytes() + int64_t{4} * out; }

  constexpr int patch_columns() const { return kPatchSpan / stride; }
  constexpr int patches_of_a_row() const { return tile.columns / patch_columns(); }
  constexpr int pixels_of_a_lane() const { return tile.patch_rows * patch_columns(); }
  constexpr int warps() const { return tile.rows / tile.patch_rows * patches_of_a_row() / 8 * tile.shares; }

  // The map that a block expands, with the border that its 3 × 3 windows read.
  constexpr int expanded_rows() const { return (tile.rows - 1) * stride + 3; }
  constexpr int expanded_columns() const { return (tile.columns - 1) * stride + 3; }
  constexpr int expanded_pixels() const { return expanded_rows() * expanded_columns(); }
  constexpr int expanded_tiles() const { return (expanded_pixels() + 15) / 16; }  // of 16 pixels, in order

  // Shared memory: the wide buffers; x, a pixel a row; for every pixel its place in a wide buffer; two slots for what
  // expands and two for what projects. Rows of a wide buffer are whole lines of 128 bytes: two pixels.
  constexpr int wide_row() const { return (expanded_columns() + 1) / 2 * 2 * kExpandedBytes; }
  constexpr int wide_bytes() const { return expanded_rows() * wide_row(); }
  constexpr int x_row() const { return shared_row_bytes(padded()); }
  constexpr int x() const { return tile.buffers * wide_bytes(); }
  constexpr int places() const { return x() + 16 * expanded_tiles() * x_row(); }
  constexpr int expand_slots() const { return places() + 16 * expanded_tiles() * 4; }
  constexpr int project_slots() const { return expand_slots() + 2 * expand_bytes(); }
  constexpr int shared_bytes() const { return project_slots() + 2 * project_bytes(); }
};

// The shapes that have a kernel, those of MobileViT xxs, xs and s, with the tile for each. A second, smaller one of the
// same shape is for GPUs that give a block 99 KB (8.6, 8.9, 12.0), on which the first does not fit, and for calls whose
// blocks would leave multiprocessors idle. Both give the same bits.
//
// The numbers are arithmetic and what nvcc counts. A lane holds out · patch pixels / 4 sums, which bounds patches and
// blocks; a multiprocessor of 9.0 has 228 KB for all its blocks. Eight warps and more are wanted on each: on an H200 it
// is too few of them that bind the other kernels.
constexpr InvertedResidualLayout kInvertedResiduals[] = {
    {16, 16, 1, {16, 16, 2, 1, 1, 3}},   // xxs 1; one chunk, so a second buffer has no use
    {16, 32, 1, {16, 16, 2, 1, 1, 3}},   // xs and s 1; two chunks
    {16, 24, 2, {8, 16, 2, 1, 1, 3}},    // xxs 2; one chunk
    {24, 24, 1, {16, 16, 2, 1, 1, 3}},   // xxs 2; two chunks
    {24, 48, 2, {8, 16, 2, 1, 1, 2}},    // xxs 3
    {32, 48, 2, {8, 16, 2, 1, 1, 2}},    // xs 2
    {32, 64, 2, {8, 16, 2, 1, 1, 2}},    // s 2
    {48, 48, 1, {16, 16, 2, 2, 1, 2}},   // xs 2
    {48, 64, 2, {8, 8, 2, 1, 2, 3}},     // xs 3, xxs 4
    {64, 64, 1, {16, 16, 2, 2, 1, 2}},   // s 2
    {64, 64, 1, {8, 16, 1, 2, 1, 2}},
    {64, 80, 2, {8, 8, 2, 1, 2, 2}},     // xs 4, xxs 5
    {64, 96, 2, {8, 8, 2, 1, 2, 2}},     // s 3
    {80, 96, 2, {8, 8, 2, 1, 2, 2}},     // xs 5
    {96, 128, 2, {8, 8, 2, 1, 2, 2}},    // s 4
    {96, 128, 2, {4, 8, 1, 1, 2, 1}},
    {128, 160, 2, {8, 8, 1, 2, 2, 1}},   // s 5; a second block does not fit, so the one has two buffers
    {128, 160, 2, {4, 8, 1, 1, 2, 1}},
};

// Whether a shape also has kernels that store the expanded map and filter in float16: those whose instructions take the
// longest of all that an H200 does, by nvcc's count. Of the others it is shared memory that takes the longest, of which
// float16 needs as much.
constexpr bool has_half_filter(int64_t channels, int64_t stride) { return stride == 1 || channels <= 32; }

// The layout of a shape, or the `small` one; `channels` is 0 if there is none.
constexpr InvertedResidualLayout inverted_residual_layout(int64_t channels, int64_t out, int64_t stride, bool small) {
  for (const InvertedResidualLayout& layout : kInvertedResiduals)
    if (layout.channels == channels && layout.out == out && layout.stride == stride) {
      if (!small) return layout;
      small = false;
    }
  return {};
}

// Whether the second tile is taken for a call that has `blocks` of the first, on this GPU.
constexpr bool takes_small(const InvertedResidualLayout& first, int64_t blocks, int multiprocessors, int shared_bytes) {
  const bool exists = inverted_residual_layout(first.channels, first.out, first.stride, true).channels != 0;
  return exists && (blocks < multiprocessors || first.shared_bytes() > shared_bytes);
}

// Strides in elements; channels are adjacent.
struct InvertedResidualMap {
  void* data;
  int64_t image, row, column;
};

struct InvertedResidualArgs {
  InvertedResidualMap in, out;  // aligned to 16 bytes
  const unsigned char* weights;
  int height, width;          // of the map that comes in
  int out_height, out_width;  // of the map that goes out
  int tiles, tiles_of_a_row;  // of an image
  int images;
  int chunks;
  bool residual;

  int64_t blocks() const { return int64_t{images} * tiles; }
};

// Arguments for maps of images × height × width pixels; the caller fills in both maps and the weights.
inline InvertedResidualArgs inverted_residual_args(const InvertedResidualLayout& layout, int64_t images, int64_t height,
                                                   int64_t width, int64_t hidden, bool residual) {
  InvertedResidualArgs args{};
  args.height = static_cast<int>(height), args.width = static_cast<int>(width);
  args.out_height = (args.height - 1) / layout.stride + 1, args.out_width = (args.width - 1) / layout.stride + 1;
  args.tiles_of_a_row = (args.out_width + layout.tile.columns - 1) / layout.tile.columns;
  args.tiles = (args.out_height + layout.tile.rows - 1) / layout.tile.rows * args.tiles_of_a_row;
  args.images = static_cast<int>(images);
  args.chunks = static_cast<int>((hidden + kExpandedChunk - 1) / kExpandedChunk);
  args.residual = residual;
  return args;
}

// The launch function for maps of CHANNELS in float16 (`half`) or bfloat16, which stores the expanded map, filters and
// projects in float16 with `half_filter`, for weights that are packed so; null if that kernel is not compiled. It returns
// a cudaError_t.
using InvertedResidualLaunch = int(const InvertedResidualArgs& args, CUstream_st* stream);
template <int CHANNELS>
InvertedResidualLaunch* find_inverted_residual(int64_t out, int64_t stride, bool small, bool half, bool half_filter);

}  // namespace mvit
