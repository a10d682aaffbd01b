// SPDX-License-Identifier: Apache-2.0
// What patch_attention's binding (patch_attention.cpp) tells its kernels, and how many threads and bytes these take.
//
// The kernels work on "strands": one head of one (image, patch position) sequence, numbered
// (image · positions + position) · heads + head. Tensors are maps of tokens whose channels are adjacent.
#pragma once

#include <cstdint>
#include <type_traits>

#include "shared_rows.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

// A map by its strides, in elements. Token n of a strand at (i, j) of the patches is in row n / columns · patch_height
// + i and column n % columns · patch_width + j.
struct TokenMap {
  void* data;
  int64_t image, row, column;
};

struct PatchAttentionShape {
  int strands, heads, head_dim, tokens;
  int patch_height, patch_width, columns;  // columns: patches in a row of the map
  float scale;
};

struct PatchAttentionForward {
  PatchAttentionShape shape;
  TokenMap qkv, out;
  float* logsumexp;  // of each strand's tokens
};

struct PatchAttentionBackward {
  PatchAttentionShape shape;
  TokenMap qkv, out, grad_out, grad_qkv;
  const float* logsumexp;
};

constexpr int kMostHeadDim = 64;
constexpr int kMostTokens = 1 << 16;  // for which n / columns by multiplication is right

// The columns that a head of `head_dim` is padded to; kernels are compiled for each of these.
constexpr int padded_head_dim(int head_dim) { return head_dim > 48 ? 64 : (head_dim + 7) / 8 * 8; }

// Rows of 16 that a warp works on at once: two halve what it reads of the other operand, and want twice the registers.
constexpr int tiles_of_warp(int padded) { return padded <= 40 ? 2 : 1; }

// A block serves `groups` strands, each by `warps` warps; block y takes `rows` of a strand's tokens from y · rows on.
// The others (keys; in backward queries too) pass through `slots` slots of `chunk` rows.
struct PatchAttentionPlan {
  int warps, groups, rows, chunk, slots;
  int copy_bytes;  // at once, from global memory: 16, 8 or 4

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

// In forward a group has its queries, and slots of keys and values.
inline int patch_attention_shared_bytes(const PatchAttentionPlan& plan, int padded) {
  return plan.groups * (plan.rows + 2 * plan.slots * plan.chunk) * shared_row_bytes(padded);
}

// In backward, own rows and slots of two kinds, and two numbers a token.
constexpr int kMostBackwardTokens = 4096;  // with which a block fits into 99 KB, the least of compute capability 8

inline int patch_attention_backward_shared_bytes(const PatchAttentionPlan& plan, int padded, int tokens) {
  const int chunks = (tokens + plan.chunk - 1) / plan.chunk;
  return plan.groups * (2 * (plan.rows + plan.slots * plan.chunk) * shared_row_bytes(padded) + 8 * chunks * plan.chunk);
}

// Backward of sequences whose keys the warps of a block can share out has all rows of a strand, what its warps hand
// each other of 64 queries at a time (in the place of the values), and two numbers a token: at most 98 KB.
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

// f(std::integral_constant<int, padded>{}).
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

// The launches, each of which returns a cudaError_t.
template <bool HALF>  // else bfloat16
int launch_patch_attention(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream);
template <bool HALF>
int launch_patch_attention_backward_whole(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream);
template <bool HALF>
int launch_patch_attention_backward(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream);

}  // namespace mvit
