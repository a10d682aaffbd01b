// SPDX-License-Identifier: Apache-2.0
// What the front of transformer (transformer.cpp) and the frozen network tell its kernels (transformer_kernel.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

// One pre-norm layer's weights: matrices as nn.Linear keeps them, contiguous, in float32 or (where the arithmetic is
// bfloat16 pairs) bfloat16; vectors in float32. qkv_bias may be null.
struct TransformerLayer {
  const float *norm1_weight, *norm1_bias;
  const void* qkv_weight;
  const float* qkv_bias;
  const void* proj_weight;
  const float* proj_bias;
  const float *norm2_weight, *norm2_bias;
  const void* fc1_weight;
  const float* fc1_bias;
  const void* fc2_weight;
  const float* fc2_bias;
};

struct TransformerShape {
  int64_t images, patch_rows, patch_columns;  // a map has patch_rows × patch_columns patches …
  int64_t patch_height, patch_width;          // … of patch_height × patch_width positions
  int64_t width, heads, head_dim, hidden, layers;
  float eps;

  int64_t positions() const { return patch_height * patch_width; }
  int64_t tokens() const { return patch_rows * patch_columns; }  // of a sequence
  int64_t inner() const { return heads * head_dim; }
  int64_t sequences() const { return images * positions(); }
};

struct TransformerArgs {
  TransformerShape shape;
  Map in, out;  // may be the same map
  const TransformerLayer* layers;
  const float *final_norm_weight, *final_norm_bias;  // null: no final norm
};

// Sequences are worked on in units of some whole ones, laid out one after another in blocks of 32 lanes. A step works on
// one block of a unit; between steps all blocks of the unit must be done. No step of one unit touches another's memory.
struct TransformerKernels {
  int64_t (*unit_lanes)(const TransformerShape&, int64_t sequences);
  std::size_t (*unit_bytes)(const TransformerShape&, int64_t sequences);  // memory that lasts from step to step
  std::size_t (*step_bytes)(const TransformerShape&);                     // scratch of one step
  // The first step reads the map; each layer is two; the last one writes the map.
  int64_t (*steps)(const TransformerShape&);
  void (*step)(const TransformerArgs&, int64_t step, int64_t first_sequence, int64_t sequences, int64_t block,
               void* unit, void* scratch);
};

// Which arithmetic: Single is float32 throughout (maps may be bfloat16), Pairs products of bfloat16 pairs.
struct TransformerTable {
  TransformerKernels single;         // float32 maps
  TransformerKernels single_bf16;    // bfloat16 maps
  TransformerKernels pairs;          // bfloat16 maps and matrices; null functions where the set has none
};

MVIT_DECLARE_KERNELS(TransformerTable, transformer);

// The whole stack, with `threads` of PyTorch's pool or on the calling thread alone.
void run_transformer(const TransformerKernels& kernels, const TransformerArgs& args, bool on_this_thread_alone);

}  // namespace mvit
