// SPDX-License-Identifier: Apache-2.0
// layer_norm_mlp for the 16 rows of one warp, from chunks of 32 hidden units. Nothing but weights comes from memory: the
// hidden values are packed where they were summed, as left operand of the second product (see lane_rows.h).
#pragma once

#include "lane_rows.h"
#include "layer_norm_mlp.h"

namespace mvit {

// LayerNorm's weight and bias and fc2's bias in shared memory, in float32, each filled up with zeros to `padded` values.
template <typename T>
MVIT_DEVICE void store_vectors(Shared to, const RowMlp& args, int padded, int thread, int threads) {
  const auto value = [](const void* from, int c, bool in_float) {
    return in_float ? load_constant<float>(static_cast<const char*>(from) + 4 * c)
                    : unpack<T>(load_constant<T>(static_cast<const char*>(from) + 2 * c));
  };
  MVIT_ROLLED
  for (int c = thread; c < padded; c += threads) {
    const bool exists = c < args.channels;
    store_shared(to + 4 * c, exists ? value(args.norm.weight, c, args.norm.weight_in_float) : 0.0f);
    store_shared(to + 4 * (padded + c), exists ? value(args.norm.bias, c, args.norm.bias_in_float) : 0.0f);
    store_shared(to + 4 * (2 * padded + c), exists ? value(args.fc2_bias, c, false) : 0.0f);
  }
}

// Copies the 16 rows of a tile; those that do not exist become zero. 16 threads copy a row.
MVIT_DEVICE void copy_tile(Shared to, const RowMlp& args, int64_t tile, int thread, int threads) {
  const Shared stride = lane_row_bytes(args.channels);
  const int64_t left = args.count - kMlpRows * tile;
  const char* const from = static_cast<const char*>(args.x) + 2 * kMlpRows * tile * args.channels;
  MVIT_ROLLED
  for (int row = thread / 16; row < kMlpRows; row += threads / 16) {
    const bool exists = row < left;
    MVIT_ROLLED
    for (int c = 8 * (thread % 16); c < args.channels; c += 8 * 16)
      copy_async<16>(to + row * stride + 2 * c, exists ? from + 2 * (row * args.channels + c) : args.x, exists);
  }
}

// A chunk of the weights in shared memory: 32 rows of fc1, then 32 columns of fc2, both in lines, and fc1's biases.
template <int TILES>
struct SharedChunk {
  // Places of this lane's first parts; *_end: of the last of an odd number of tiles.
  Shared fc1, fc1_end, fc2, fc2_end, biases;

  static constexpr bool kInPieces = false;
  static constexpr int kFc1 = line_bytes(kMlpChunk, 2 * TILES);  // bytes before fc2
  static constexpr int kBias = kFc1 + line_bytes(16 * TILES, kMlpChunk / 8);

  MVIT_DEVICE explicit SharedChunk(Shared at)
      : fc1(at + lane_place<2, 2>(0, TILES)),
        fc1_end(at + lane_place<2, 1>(TILES - 1, TILES)),
        fc2(at + kFc1 + lane_place<2, 2>(0, 2)),
        fc2_end(at + kFc1 + line_bytes(16 * (TILES - 1), kMlpChunk / 8) + lane_place<1, 2>(0, 2)),
        biases(at + kBias + lane_column<2>(0) * 2) {}

  // Of this lane's eight hidden units.
  MVIT_DEVICE Words4 bias() const { return load_shared<Words4>(biases); }

  // Of hidden units 8t + 2j and 8t + 2j + 1, t = 0 to 3.
  template <int COUNT>
  MVIT_DEVICE LanePart<COUNT> fc1_part(int j, int tile) const {
    const Shared first = COUNT == 2 ? fc1 + 128 * (tile / 2) : fc1_end;
    return load_shared<LanePart<COUNT>>(first + line_pair_bytes(2 * TILES) * j);
  }
  // Of tile n of eight columns of the result.
  MVIT_DEVICE Words4 fc2_part(int n) const {
    const bool end = TILES % 2 == 1 && n / 2 == TILES - 1;
    return load_shared<Words4>(end ? fc2_end + 128 * (n % 2) : fc2 + 2048 * (n / 4) + 128 * (n % 4));
  }
};

// The same, in global memory. Rows and columns that do not exist are zero.
template <int TILES>
struct GlobalChunk {
  const char *fc1, *fc2, *fc2_end, *biases;
  int channels, hidden_channels;
  bool fc1_exists, fc2_exists;

  static constexpr bool kInPieces = true;

  MVIT_DEVICE GlobalChunk(const RowMlp& args, int first)
      : channels(args.channels), hidden_channels(args.hidden_channels) {
    const int unit = first + lane_row<2>(), column = first + lane_column<2>(0);
    const auto row = [&](int c) {
      return static_cast<const char*>(args.fc2_weight) + 2 * (static_cast<int64_t>(c) * hidden_channels + column);
    };
    fc1 = static_cast<const char*>(args.fc1_weight) + 2 * (static_cast<int64_t>(unit) * channels);
    fc2 = row(lane_row<2>()), fc2_end = row(16 * (TILES - 1) + lane_row<1>());
    biases = static_cast<const char*>(args.fc1_bias) + 2 * column;
    fc1_exists = unit < hidden_channels;  // hidden units end with a multiple of 8, and so with a lane's
    fc2_exists = column < hidden_channels;
  }

  MVIT_DEVICE Words4 bias() const { return fc2_exists ? load_constant<Words4>(biases) : Words4{}; }

  template <int COUNT>
  MVIT_DEVICE LanePart<COUNT> fc1_part(int j, int tile) const {
    const int column = lane_column<COUNT>(tile);
    if (!fc1_exists || column >= channels) return {};
    return load_constant<LanePart<COUNT>>(fc1 + 2 * (2 * j * channels + column));
  }
  MVIT_DEVICE Words4 fc2_part(int n) const {
    const bool end = TILES % 2 == 1 && n / 2 == TILES - 1;
    const int further = end ? n % 2 * 2 : n / 4 * 32 + n % 4 * 2;
    const int row = end ? 16 * (TILES - 1) + lane_row<1>() + further : lane_row<2>() + further;
    if (!fc2_exists || row >= channels) return {};
    return load_constant<Words4>((end ? fc2_end : fc2) + 2 * further * hidden_channels);
  }
};

// x + fc2's bias, as the beginning of the result's sums, from rows in shared memory; and the rows' means.
template <typename T, int TILES>
MVIT_DEVICE void begin_sums(float (&sums)[2 * TILES][4], float (&mean)[2], const SharedLaneRows<T, TILES>& rows,
                            Shared biases) {
  float of_row[2][2] = {};
  for_parts<TILES>([&](auto tile, auto count) {
    if (16 * tile() >= rows.channels) return;
    uint32_t part[4 * count()];
    float bias[4 * count()];
    rows.template load<count()>(part, tile);
    load_vector(bias, biases, lane_column<count()>(tile));
    MVIT_UNROLL
    for (int i = 0; i < 4 * count(); ++i) {
      const float low = unpack_low<T>(part[i]), high = unpack_high<T>(part[i]);
      of_row[i % 2][0] += low, of_row[i % 2][1] += high;
      float(&sum)[4] = sums[2 * tile + i / 2];
      sum[i % 2 * 2] = low + bias[i / 2 * 2], sum[i % 2 * 2 + 1] = high + bias[i / 2 * 2 + 1];
    }
  });
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half)
    mean[half] = mean_of(sum_of_row(of_row[half][0] + of_row[half][1]), static_cast<float>(rows.channels));
}

// The statistics of 16 rows, of which the first is row `first` of all.
MVIT_DEVICE void store_statistics(const RowMlp& args, int64_t first, const float (&mean)[2], const float (&rstd)[2]) {
  MVIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane_index() / 4 + 8 * half;
    if (lane_index() % 4 != 0 || row >= args.count) continue;
    store_global(args.mean + row, mean[half]);
    store_global(args.rstd + row, rstd[half]);
  }
}

template <typename T>
MVIT_DEVICE void multiply_pair(float (&d)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high) {
  const uint32_t b[2] = {low, high};
  mma<T>(d, a, b);
}

// The hidden values of a chunk, packed as left operands. left(a, tile) is a tile of normalised rows.
template <typename T, int TILES, typename Left, typename Chunk>
MVIT_DEVICE void hidden_values(uint32_t (&values)[2][4], const Left& left, const Chunk& weights, int channels) {
  const Words4 bias = weights.bias();
  const uint32_t biases[4] = {bias.x, bias.y, bias.z, bias.w};
  float hidden[4][4];
  MVIT_UNROLL
  for (int j = 0; j < 4; ++j) {
    hidden[j][0] = hidden[j][2] = unpack_low<T>(biases[j]);
    hidden[j][1] = hidden[j][3] = unpack_high<T>(biases[j]);
  }
  for_parts<TILES>([&](auto tile, auto count) {
    if (Chunk::kInPieces && 16 * tile() >= channels) return;
    LanePart<count()> parts[4];
    uint32_t a[4];
    MVIT_UNROLL
    for (int j = 0; j < 4; ++j) parts[j] = weights.template fc1_part<count()>(j, tile);
    left(a, tile);
    MVIT_UNROLL
    for (int j = 0; j < 4; ++j) multiply_pair<T>(hidden[j], a, parts[j].x, parts[j].y);
    if constexpr (count() == 2) {
      left(a, tile + 1);
      MVIT_UNROLL
      for (int j = 0; j < 4; ++j) multiply_pair<T>(hidden[j], a, parts[j].z, parts[j].w);
    }
  });
  MVIT_UNROLL
  for (int i = 0; i < 8; ++i)
    values[i / 4][i % 4] = pack<T>(silu<T>(hidden[i / 2][i % 2 * 2]), silu<T>(hidden[i / 2][i % 2 * 2 + 1]));
}

// sums += the hidden values of a chunk times its part of fc2, 64 columns at a time. That these exist is asked so that
// the compiler has no more of fc2 in registers: with all of it, 72 at width 144, it spilled x in every chunk.
template <typename T, int TILES, typename Chunk>
MVIT_DEVICE void add_chunk(float (&sums)[2 * TILES][4], const uint32_t (&values)[2][4], const Chunk& weights,
                           int channels) {
  MVIT_UNROLL
  for (int first = 0; first < 2 * TILES; first += 8) {
    if (8 * first >= channels) break;
    Words4 parts[8];
    MVIT_UNROLL
    for (int i = 0; i < 8 && first + i < 2 * TILES; ++i) parts[i] = weights.fc2_part(first + i);
    MVIT_UNROLL
    for (int i = 0; i < 8 && first + i < 2 * TILES; ++i)
      multiply_pair<T>(sums[first + i], values[0], parts[i].x, parts[i].y);
    MVIT_UNROLL
    for (int i = 0; i < 8 && first + i < 2 * TILES; ++i)
      multiply_pair<T>(sums[first + i], values[1], parts[i].z, parts[i].w);
  }
}

template <typename T, int TILES>
MVIT_DEVICE void store_tile(const RowMlp& args, int64_t first, const float (&sums)[2 * TILES][4]) {
  store_rows<T>(static_cast<char*>(args.out) + 2 * first * args.channels, args.channels, args.count - first, sums);
}

}  // namespace mvit
