// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of patch_attention (patch_attention.cpp) and its kernels
// (patch_attention_kernel.cpp).
#pragma once

#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

enum class Dtype { float32, bfloat16, float64 };  // index into the dispatch tables below

struct PatchAttentionShape {
  int64_t images, patch_rows, patch_columns;  // a map has patch_rows × patch_columns patches …
  int64_t patch_height, patch_width;          // … of patch_height × patch_width positions
  int64_t heads, head_dim;
  double scale;

  int64_t positions() const { return patch_height * patch_width; }
  int64_t tokens() const { return patch_rows * patch_columns; }  // per sequence
  int64_t inner() const { return heads * head_dim; }
  int64_t strands() const { return images * positions() * heads; }
  // Operations per score: `products` products of length head_dim, plus about twenty for an exponential.
  double score_flops(int products) const { return 2.0 * products * static_cast<double>(head_dim) + 20; }
};

// The kernels work on strands. A strand is one head of one (image, patch position) sequence; strands are numbered
// (image · positions + position) · heads + head. logsumexp is contiguous and strand-major: (B, positions, heads,
// tokens).

struct PatchAttentionForward {
  PatchAttentionShape shape;
  Map qkv, out;
  void* logsumexp;
};

struct PatchAttentionBackward {
  PatchAttentionShape shape;
  Map grad_out, qkv, out, grad_qkv;
  const void* logsumexp;
};

struct PatchAttentionKernels {
  // Scratch that one call needs, in elements (float; double for float64).
  int64_t (*forward_scratch[3])(const PatchAttentionShape&);
  int64_t (*backward_scratch[3])(const PatchAttentionShape&);
  // Each call processes one strand; forward takes a range of queries [begin, end) of it. No two calls write the same
  // memory.
  void (*forward[3])(const PatchAttentionForward&, int64_t strand, int64_t begin, int64_t end, void* scratch);
  void (*backward[3])(const PatchAttentionBackward&, int64_t strand, void* scratch);
};

MVIT_DECLARE_KERNELS(PatchAttentionKernels, patch_attention);

}  // namespace mvit
