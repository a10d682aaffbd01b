// SPDX-License-Identifier: Apache-2.0
// Shared by the host and the kernel of `transformer`: arguments, launch plan, the order of the packed weights (written
// by mvit_kernels/backends/cuda/packing.py) and the layout of a block's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

struct CUstream_st;  // what a cudaStream_t points to

namespace mvit {

constexpr int kTransformerVersion = 1;  // of the packed weights; VERSION in packing.py must be equal

constexpr int kHeads = 4;         // in every MobileViT
constexpr int kHiddenChunk = 32;  // hidden units per chunk of fc1 and fc2
constexpr int kMostWarps = 8;     // at 255 registers per thread

// Weights are streamed through shared memory in chunks, each stored in memory as the kernel reads it. The chunks of a
// layer:
//
//   for each head: `kv_parts` chunks of key and value, then one of query, or all three in a single chunk (`joint`);
//   then `proj_parts` chunks of the out-projection;
//   then one chunk of fc1 and fc2 for each 32 hidden units.
//
// Matrices are stored as fragments (see fragments.h) of 16 × 8 elements. Widths are padded to 16, head dims to 8,
// hidden units to 32, with zeros. The matrices of q, k, v and fc1 are followed by their vectors: for every eight
// columns, each of four lanes has two column sums and two biases in float32. Each tile of the out-projection is
// followed by its 16 biases. After all layers, in float32 and `padded` wide: fc2's bias of every layer, then weight and
// bias of the final LayerNorm.
struct TransformerLayout {
  int width;
  int head_dim;

  constexpr int tiles() const { return (width + 15) / 16; }
  constexpr int padded() const { return 16 * tiles(); }
  constexpr int head() const { return (head_dim + 7) / 8 * 8; }

  constexpr int mlp_chunk() const { return 2 * padded() * kHiddenChunk * 2 + kHiddenChunk * 8; }
  // A chunk larger than the MLP's is split if it would make a slot of the ring larger than 24 KB.
  constexpr int most() const { return mlp_chunk() > 24576 ? mlp_chunk() : 24576; }
  constexpr int kv_parts() const {
    int parts = 1;
    while (tiles() % parts || kv_chunk(parts) > most()) ++parts;
    return parts;
  }
  constexpr int kv_tiles() const { return tiles() / kv_parts(); }
  constexpr int kv_matrix() const { return 16 * kv_tiles() * 2 * head() * 2; }  // bytes before the vectors
  constexpr int kv_chunk() const { return kv_chunk(kv_parts()); }
  constexpr int q_matrix() const { return padded() * head() * 2; }
  constexpr int q_chunk() const { return q_matrix() + head() * 8; }
  // Whether key, value and query of a head share one chunk. For narrow rows the products finish before the next chunk
  // has arrived; attention takes longer.
  constexpr bool joint() const { return kv_parts() == 1 && kv_chunk() + q_chunk() <= 26624; }
  constexpr int head_chunk() const { return kv_chunk() + (joint() ? q_chunk() : 0); }  // the first chunk of a head

  constexpr int proj_tile() const { return kHeads * head() * 16 * 2 + 16 * 4; }
  constexpr int proj_parts() const {
    int parts = 1;
    while (tiles() % parts || tiles() / parts * proj_tile() > most()) ++parts;
    return parts;
  }
  constexpr int proj_tiles() const { return tiles() / proj_parts(); }
  constexpr int proj_chunk() const { return proj_tiles() * proj_tile(); }

  // The least that a slot of the ring has. A larger one holds several chunks of the MLP, or all parts of the key and
  // value or of the out-projection, which then are copied at once and share a barrier (see Copies).
  constexpr int least_slot() const {
    int most = mlp_chunk();
    for (int bytes : {head_chunk(), q_chunk(), proj_chunk()}) most = bytes > most ? bytes : most;
    return (most + 127) / 128 * 128;
  }
  constexpr int64_t layer_bytes(int64_t hidden_chunks) const {
    return kHeads * (int64_t{kv_parts()} * kv_chunk() + q_chunk()) + int64_t{proj_parts()} * proj_chunk() +
           hidden_chunks * mlp_chunk();
  }
  constexpr int64_t packed_bytes(int64_t layers, int64_t hidden_chunks) const {
    return layers * layer_bytes(hidden_chunks) + (layers + 2) * padded() * 4;
  }

  // Rows of values are an odd number of 16-byte units apart, so ldmatrix has no bank conflicts.
  constexpr int value_stride() const { return (head() / 8 | 1) * 16; }
  constexpr int key_stride() const { return head() * 2; }

  // Shared memory: the two slots of the ring, then for every 16 rows of the block: the rows themselves as A fragments,
  // their means and 1 / σ, keys as fragments, and values. Every address is the start of a tile plus a constant, which
  // saves registers.
  constexpr int norms() const { return 16 * padded() * 2; }
  constexpr int keys() const { return norms() + 16 * 8; }
  constexpr int values() const { return keys() + 16 * key_stride(); }
  constexpr int tile_bytes() const { return values() + 16 * value_stride(); }
  constexpr int shared_bytes(int rows, int slot) const { return 2 * slot + rows / 16 * tile_bytes(); }

 private:
  constexpr int kv_chunk(int parts) const { return padded() / parts * 2 * head() * 2 + 2 * head() * 8; }
};

// Strides in elements; channels are adjacent.
struct TransformerMap {
  void* data;
  int64_t image, row, column;
};

// w / n, rounded down, for 0 ≤ w < kMostWarps and 0 < n ≤ kMostWarps: the host divides, once a launch, and the kernel
// multiplies, where a division would be some twenty instructions in every head of every layer.
constexpr int inverse_of(int n) { return (64 + n - 1) / n; }
constexpr int divide(int w, int inverse) { return w * inverse >> 6; }
constexpr bool divides_rightly() {
  for (int n = 1; n <= kMostWarps; ++n)
    for (int w = 0; w < kMostWarps; ++w)
      if (divide(w, inverse_of(n)) != w / n) return false;
  return true;
}
static_assert(divides_rightly());

// How many chunks are copied at once into a slot of so many bytes: of key and value, and of the out-projection, one or
// all.
struct Copies {
  int kv, proj, mlp;

  constexpr Copies() : Copies(TransformerLayout{16, 8}, 0, 1) {}
  constexpr Copies(const TransformerLayout& layout, int slot, int hidden_chunks)
      : kv(layout.kv_parts() * layout.kv_chunk() <= slot ? layout.kv_parts() : 1),
        proj(layout.proj_parts() * layout.proj_chunk() <= slot ? layout.proj_parts() : 1),
        mlp(slot > layout.mlp_chunk() ? slot / layout.mlp_chunk() : 1) {
    const int times = (hidden_chunks + mlp - 1) / mlp;  // about as many each time
    mlp = (hidden_chunks + times - 1) / times;
  }
};

struct TransformerArgs {
  TransformerMap in, out;  // both aligned to 16 bytes
  const unsigned char* weights;
  int sequences;
  int patch_height, patch_width;  // a sequence is one patch position of one image
  int patch_columns;              // patches per row of the map
  int tokens;                     // per sequence: patches per image
  int padded_tokens;              // rounded up to the rows of a warp
  int warps_of_a_sequence;        // 1 to kMostWarps
  int inverse_warps;              // inverse_of(warps_of_a_sequence)
  int sequences_of_a_block;
  int layers;
  int hidden_chunks;
  int warps;
  int slot;  // bytes of each of the ring's two
  Copies copies;
  bool final_norm;
  float eps;

  // The first warp of the sequence that `warp` works on.
  constexpr int first_warp_of_a_sequence(int warp) const {
    return divide(warp, inverse_warps) * warps_of_a_sequence;
  }

  unsigned blocks() const {
    return static_cast<unsigned>((sequences + sequences_of_a_block - 1) / sequences_of_a_block);
  }
};

// Launch plan: a warp processes `tiles` · 16 rows of one sequence, a block `sequences_of_a_block` sequences, and a slot
// of the ring has `slot` bytes, a multiple of 128.
struct TransformerPlan {
  int64_t tiles;
  int64_t sequences_of_a_block;
  int64_t slot;
};

// Arguments for maps of images × height × width rows; the caller fills in both maps and the weights.
inline TransformerArgs transformer_args(const TransformerLayout& layout, const TransformerPlan& plan, int64_t images,
                                        int64_t height, int64_t width, int64_t patch_height, int64_t patch_width,
                                        int64_t layers, int64_t hidden, bool final_norm, double eps) {
  const int64_t rows = 16 * plan.tiles, tokens = height / patch_height * (width / patch_width);
  const int64_t padded = (tokens + rows - 1) / rows * rows;
  TransformerArgs args{};
  args.sequences = static_cast<int>(images * patch_height * patch_width);
  args.patch_height = static_cast<int>(patch_height);
  args.patch_width = static_cast<int>(patch_width);
  args.patch_columns = static_cast<int>(width / patch_width);
  args.tokens = static_cast<int>(tokens);
  args.padded_tokens = static_cast<int>(padded);
  args.warps_of_a_sequence = static_cast<int>(padded / rows);
  args.inverse_warps = inverse_of(args.warps_of_a_sequence);
  args.sequences_of_a_block = static_cast<int>(plan.sequences_of_a_block);
  args.layers = static_cast<int>(layers);
  args.hidden_chunks = static_cast<int>((hidden + kHiddenChunk - 1) / kHiddenChunk);
  args.warps = static_cast<int>(plan.sequences_of_a_block * padded / rows);
  args.slot = static_cast<int>(plan.slot);
  args.copies = Copies(layout, args.slot, args.hidden_chunks);
  args.final_norm = final_norm;
  args.eps = static_cast<float>(eps);
  return args;
}

// The launch function for rows of WIDTH in float16 (`half`) or bfloat16; null if that kernel is not compiled. It
// returns a cudaError_t.
using TransformerLaunch = int(const TransformerArgs& args, CUstream_st* stream);
template <int WIDTH>
TransformerLaunch* find_transformer(int64_t head_dim, int64_t tiles, bool half);

// The same for a width of the published models, null for another. A template: only what calls it has all kernels.
template <int... WIDTHS>
struct TransformersOf {
  static TransformerLaunch* find(int64_t width, int64_t head_dim, int64_t tiles, bool half) {
    TransformerLaunch* found = nullptr;
    ((width == WIDTHS ? void(found = find_transformer<WIDTHS>(head_dim, tiles, half)) : void()), ...);
    return found;
  }
};
using Transformers = TransformersOf<64, 80, 96, 120, 144, 192, 240>;

}  // namespace mvit
