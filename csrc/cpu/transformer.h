// SPDX-License-Identifier: Apache-2.0
// Interface between the front end of transformer (transformer.cpp), the frozen network (run_program.cpp) and the kernels
// (transformer_kernel.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "map.h"

namespace mvit {

// Weights of one pre-norm layer. Matrices are as nn.Linear stores them, contiguous, in float32 or, for products of
// bfloat16 pairs, bfloat16; or packed (see TransformerKernels), qkv_weight as three matrices one after another. Vectors
// are float32. qkv_bias may be null.
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
  int64_t tokens() const { return patch_rows * patch_columns; }  // per sequence
  int64_t inner() const { return heads * head_dim; }
  int64_t sequences() const { return images * positions(); }
};

struct TransformerArgs {
  TransformerShape shape;
  Map in, out;  // may be the same map
  const TransformerLayer* layers;
  const float *final_norm_weight, *final_norm_bias;  // null: no final norm
};

// Sequences are processed in units of one or more whole sequences, laid out one after another in blocks of 32 lanes. A
// call processes one step of one block. All blocks of a unit must finish a step before the next one starts. Units share
// no memory.
struct TransformerKernels {
  int64_t (*unit_lanes)(const TransformerShape&, int64_t sequences);
  std::size_t (*unit_bytes)(const TransformerShape&, int64_t sequences);  // memory that lasts across steps
  std::size_t (*step_bytes)(const TransformerShape&);                     // scratch of one step
  // The first step reads the map, each layer is two steps, the last step writes the map.
  int64_t (*steps)(const TransformerShape&);
  void (*step)(const TransformerArgs&, int64_t step, int64_t first_sequence, int64_t sequences, int64_t block,
               void* unit, void* scratch);
  // Bytes of a (rows, columns) matrix as the kernels read it, a multiple of 64 if it is packed; `pack` is null if
  // matrices are read as they are.
  std::size_t (*matrix_bytes)(int64_t rows, int64_t columns);
  void (*pack)(const void* matrix, int64_t rows, int64_t columns, void* packed);
  int64_t lanes_of_a_unit;  // that pay for reading the weights once
};

// Dispatch table, one entry per arithmetic: `single` is float32 throughout (maps may be bfloat16), `pairs` multiplies
// bfloat16 pairs.
struct TransformerTable {
  TransformerKernels single;         // float32 maps
  TransformerKernels single_bf16;    // bfloat16 maps
  TransformerKernels pairs;          // bfloat16 maps and matrices; null functions if the instruction set has no pairs
};

MVIT_DECLARE_KERNELS(TransformerTable, transformer);

// Runs the whole stack: on all threads (parallel.h) or, with on_this_thread_alone, on the calling thread.
void run_transformer(const TransformerKernels& kernels, const TransformerArgs& args, bool on_this_thread_alone);

}  // namespace mvit
