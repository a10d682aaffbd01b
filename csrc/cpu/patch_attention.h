// SPDX-License-Identifier: Apache-2.0
// What the front of patch_attention (patch_attention.cpp) tells its kernels (patch_attention_kernel.cpp).
#pragma once

#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

enum class Dtype { float32, bfloat16, float64 };  // indexes the tables below

struct PatchAttentionShape {
  int64_t images, patch_rows, patch_columns;  // a map has patch_rows × patch_columns patches …
  int64_t patch_height, patch_width;          // … of patch_height × patch_width positions
  int64_t heads, head_dim;
  double scale;

  int64_t positions() const { return patch_height * patch_width; }
  int64_t tokens() const { return patch_rows * patch_columns; }  // of a sequence
  int64_t inner() const { return heads * head_dim; }
  int64_t strands() const { return images * positions() * heads; }
  // Operations for each score, with that many products of head_dim; an exponential is about twenty.
  double score_flops(int products) const { return 2.0 * products * static_cast<double>(head_dim) + 20; }
};

// The kernels work on "strands": one head of one (image, patch position) sequence, numbered
// (image · positions + position) · heads + head. logsumexp is contiguous, strand-major: (B, positions, heads, tokens).

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
  // Elements of scratch (float; double for float64) that one call needs.
  int64_t (*forward_scratch[3])(const PatchAttentionShape&);
  int64_t (*backward_scratch[3])(const PatchAttentionShape&);
  // One strand; the forward one for queries [begin, end) only. Each writes memory that no other call does.
  void (*forward[3])(const PatchAttentionForward&, int64_t strand, int64_t begin, int64_t end, void* scratch);
  void (*backward[3])(const PatchAttentionBackward&, int64_t strand, void* scratch);
};

MVIT_DECLARE_KERNELS(PatchAttentionKernels, patch_attention);

}  // namespace mvit
