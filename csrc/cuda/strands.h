// SPDX-License-Identifier: Apache-2.0
// Addresses of a strand's tokens in a map, and their copies into shared memory (see patch_attention.h for strands).
#pragma once

#include "patch_attention.h"
#include "tiles.h"

namespace mvit {

// The warps of a block that serve one strand.
struct StrandGroup {
  int index;        // index of the group in the block
  int warp;         // index of the warp in the group
  int thread;       // index of the thread in the group
  int strand;
  bool has_strand;  // false in the last block's surplus groups, which only take part in barriers
};

MVIT_DEVICE StrandGroup strand_group(const PatchAttentionShape& shape, const PatchAttentionPlan& plan) {
  StrandGroup group;
  const int warp = warp_index();
  group.index = warp / plan.warps;
  group.warp = warp - group.index * plan.warps;
  group.thread = 32 * group.warp + lane_index();
  group.strand = static_cast<int>(block_index()) * plan.groups + group.index;
  group.has_strand = group.strand < shape.strands;
  if (!group.has_strand) group.strand = 0;
  return group;
}

// The tokens of one strand in one map.
struct Tokens {
  char* first;  // channel 0 of the strand's head in token 0
  int64_t down, right;  // bytes from one patch to the next
  uint32_t columns, magic;

  // n / columns = n · magic >> 32 for n and columns below 2^16, since magic · columns exceeds 2^32 by at most
  // `columns`. A single column would need magic = 2^32, so such a map is treated as a single row whose step is `down`.
  MVIT_DEVICE char* at(int n) const {
    const uint32_t row = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic >> 32);
    return first + row * down + (n - row * columns) * right;
  }
};

MVIT_DEVICE Tokens tokens_of(const TokenMap& map, const PatchAttentionShape& shape, int strand) {
  const int sequence = strand / shape.heads, head = strand - sequence * shape.heads;
  const int positions = shape.patch_height * shape.patch_width, image = sequence / positions;
  const int position = sequence - image * positions, i = position / shape.patch_width;
  const int j = position - i * shape.patch_width;
  Tokens tokens;
  tokens.first = static_cast<char*>(map.data) +
                 2 * (image * map.image + i * map.row + j * map.column + static_cast<int64_t>(head) * shape.head_dim);
  tokens.down = 2 * shape.patch_height * map.row;
  tokens.right = 2 * shape.patch_width * map.column;
  tokens.columns = static_cast<uint32_t>(shape.columns);
  if (tokens.columns == 1) {
    tokens.columns = static_cast<uint32_t>(shape.tokens);
    tokens.right = tokens.down;
  }
  tokens.magic = ~0u / tokens.columns + 1;  // 0 for a single token, for which it is correct
  return tokens;
}

// How the threads of a group divide up rows of `units` copies: a thread's first copy and the step to its next one.
struct CopyOrder {
  int row, unit, row_step, unit_step, units;

  MVIT_DEVICE void next() {
    row += row_step;
    unit += unit_step;
    if (unit >= units) unit -= units, ++row;
  }
};

MVIT_DEVICE CopyOrder copy_order(int thread, int threads, int units) {
  CopyOrder order;
  order.units = units;
  order.row = thread / units;
  order.unit = thread - order.row * units;
  order.row_step = threads / units;
  order.unit_step = threads - order.row_step * units;
  return order;
}

// Copies a head's rows of tokens [begin, begin + count) to rows of `stride` bytes; tokens from `token_count` on become
// zero. The padding columns of the head are not written.
template <int BYTES>
MVIT_DEVICE void copy_rows(Shared to, Shared stride, const Tokens& tokens, int begin, int count, int token_count,
                           CopyOrder order) {
  MVIT_ROLLED
  for (; order.row < count; order.next()) {
    const int n = begin + order.row;
    const bool valid = n < token_count;
    const char* from = tokens.at(valid ? n : 0) + order.unit * BYTES;
    copy_async<BYTES>(to + order.row * stride + order.unit * BYTES, from, valid);
  }
}

MVIT_DEVICE void copy_rows(int copy_bytes, Shared to, Shared stride, const Tokens& tokens, int begin, int count,
                           int token_count, const CopyOrder& order) {
  if (copy_bytes == 16)
    copy_rows<16>(to, stride, tokens, begin, count, token_count, order);
  else if (copy_bytes == 8)
    copy_rows<8>(to, stride, tokens, begin, count, token_count, order);
  else
    copy_rows<4>(to, stride, tokens, begin, count, token_count, order);
}

// Zeroes the padding columns of a head in `count` rows.
MVIT_DEVICE void clear_padding(Shared rows, Shared stride, int count, int head_dim, int padded, int thread,
                               int threads) {
  if (head_dim == padded) return;
  MVIT_ROLLED
  for (int row = thread; row < count; row += threads)
    for (int column = head_dim; column < padded; column += 2)
      store_shared<uint32_t>(rows + row * stride + 2 * column, 0);
}

}  // namespace mvit
