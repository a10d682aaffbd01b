// SPDX-License-Identifier: Apache-2.0
// Interface between the bindings of patch_attention (patch_attention.cpp) and its kernels: arguments, and launch plans
// with their threads and shared memory.
//
// The kernels work on strands. A strand is one head of one (image, patch position) sequence; strands are numbered
// (image · positions + position) · heads + head. Tensors are maps of tokens whose channels are adjacent.
#pragma once

#include <cstdint>
#include <type_traits>

#include "shared_rows.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

// A map and its strides in elements. Token n of a strand at patch position (i, j) is at
// row n / columns · patch_height + i and column n % columns · patch_width + j.
struct TokenMap {
  void* data;
  int64_t image, row, column;
};

struct PatchAttentionShape {
  int strands, heads, head_dim, tokens;
  int patch_height, patch_width, columns;  // columns: patches per row of the map
  float scale;
};

struct PatchAttentionForward {
  PatchAttentionShape shape;
  TokenMap qkv, out;
  float* logsumexp;  // [strand][token]
};

struct PatchAttentionBackward {
  PatchAttentionShape shape;
  TokenMap qkv, out, grad_out, grad_qkv;
  const float* logsumexp;
};

constexpr int kMostHeadDim = 64;
constexpr int kMostTokens = 1 << 16;  // below this, n / columns by multiplication is exact

// The width to which a head is padded; kernels are compiled for each of these values.
constexpr int padded_head_dim(int head_dim) { return head_dim > 48 ? 64 : (head_dim + 7) / 8 * 8; }

// Tiles of 16 rows that a warp processes at once. Two tiles halve the reads of the other operand but need twice the
// registers.
constexpr int tiles_of_warp(int padded) { return padded <= 40 ? 2 : 1; }

// A block serves `groups` strands with `warps` warps each; block y processes `rows` tokens of a strand, from token
// y · rows on. The other operand (keys; in backward queries as well) is streamed through `slots` slots of `chunk` rows.
struct PatchAttentionPlan {
  int warps, groups, rows, chunk, slots;
  int copy_bytes;  // bytes per copy from global memory: 16, 8 or 4

  int threads() const { return 32 * warps * groups; }
  int blocks_x(int strands) const { return (strands + groups - 1) / groups; }
  int blocks_y(int tokens) const { return (tokens + rows - 1) / rows; }
};

constexpr int kBlockWarps = 4, kChunk = 64;

inline PatchAttentionPlan plan_patch_attention(const PatchAttentionShape& shape, int copy_bytes) {
  const int tile_rows = 16 * tiles_of_warp(padded_head_dim(shape.head_dim));
  PatchAttentionPlan plan{};
  plan.warps = 1;
  while (plan.warps < kBlockWarps && plan.warps * tile_rows < shape.tokens) plan.warps *= 2;
  plan.groups = kBlockWarps / plan.warps;
  plan.rows = plan.warps * tile_rows;
  plan.chunk = shape.tokens < kChunk ? (shape.tokens + 15) / 16 * 16 : kChunk;
  plan.slots = shape.tokens > kChunk ? 2 : 1;
  plan.copy_bytes = copy_bytes;
  return plan;
}

// Forward: each group holds its queries, and slots of keys and values.
inline int patch_attention_shared_bytes(const PatchAttentionPlan& plan, int padded) {
  return plan.groups * (plan.rows + 2 * plan.slots * plan.chunk) * shared_row_bytes(padded);
}

// Backward: each group holds its own rows and slots, both of two kinds, and two numbers per token. Up to
// kMostBackwardTokens tokens a block fits in 99 KB, the smallest limit of compute capability 8.x.
constexpr int kMostBackwardTokens = 4096;

inline int patch_attention_backward_shared_bytes(const PatchAttentionPlan& plan, int padded, int tokens) {
  const int chunks = (tokens + plan.chunk - 1) / plan.chunk;
  return plan.groups * (2 * (plan.rows + plan.slots * plan.chunk) * shared_row_bytes(padded) + 8 * chunks * plan.chunk);
}

// Backward of short sequences, whose keys can be distributed over the warps of one block. The block holds all rows of a
// strand, the dS that its warps exchange for 64 queries at a time (in the memory of the values), and two numbers per
// token: at most 98 KB.
constexpr int kWholeWarps = 8;

inline bool is_whole(const PatchAttentionShape& shape) {
  return shape.tokens <= kWholeWarps * 16 * tiles_of_warp(padded_head_dim(shape.head_dim));
}

inline PatchAttentionPlan plan_patch_attention_backward_whole(const PatchAttentionShape& shape, int copy_bytes) {
  const int tile_rows = 16 * tiles_of_warp(padded_head_dim(shape.head_dim));
  PatchAttentionPlan plan = plan_patch_attention(shape, copy_bytes);
  plan.warps = (shape.tokens + tile_rows - 1) / tile_rows;
  plan.groups = plan.warps < kBlockWarps ? kBlockWarps / plan.warps : 1;
  plan.rows = plan.warps * tile_rows;
  return plan;
}

constexpr int patch_attention_backward_whole_shared_bytes(const PatchAttentionPlan& plan, int padded) {
  const int row = shared_row_bytes(padded), ds_row = shared_row_bytes(plan.chunk);
  return plan.groups * plan.rows * (3 * row + (row > ds_row ? row : ds_row) + 8);
}

// Calls f(std::integral_constant<int, padded>{}).
template <typename F>
auto for_padded_head_dim(int padded, const F& f) {
  switch (padded) {
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 24:
      return f(std::integral_constant<int, 24>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 40:
      return f(std::integral_constant<int, 40>{});
    case 48:
      return f(std::integral_constant<int, 48>{});
    default:
      return f(std::integral_constant<int, 64>{});
  }
}

// Kernel launches; each returns a cudaError_t.
template <bool HALF>  // false: bfloat16
int launch_patch_attention(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream);
template <bool HALF>
int launch_patch_attention_backward_whole(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream);
template <bool HALF>
int launch_patch_attention_backward(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream);

}  // namespace mvit
