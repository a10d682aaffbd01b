// SPDX-License-Identifier: Apache-2.0
// The file of a frozen network, which mvit_kernels/freezing/saved.py writes. Everything is little-endian; the three
// sections begin at multiples of 64, and what lies between them is zero.
//
//   at   bytes
//    0     8   0x89 "MVIT" CR LF 0x1a: what transfers as text would change
//    8     4   version of the format
//   12     4   CRC-32 (zlib's) of all that follows
//   16     8   size of the file
//   24    16   metadata: where, and how many bytes of JSON
//   40    16   program: where, and how many words of 64 bits (../cpu/pack_program.h)
//   56    16   weights: where, and how many bytes
//   72     4   channels of the result; the program may make more, which are dropped
//   76     4   flags: 1, the result is a vector; 2, uint8 images can be normalized; 4, their channels are then reversed
//   80     8   height and width of the images that the network is for, 4 bytes each
//   88    32   mean and standard deviation of the network's first four channels, float32, of values from 0 to 1
//  120     8   how many times each side of an image is halved, rounding up, for Python; zero
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../cpu/pack_program.h"

namespace mvit {

constexpr std::size_t kHeaderBytes = 128, kMaxChannels = 4;

struct NetworkFile {
  std::string metadata;
  Words words;
  Bytes weights;
  StoredType type;
  int64_t channels, height, width;
  bool is_vector, normalizes, reverses_channels;
  float mean[kMaxChannels], deviation[kMaxChannels];
};

// Reads the file's bytes, which lie at a multiple of 64 and must outlive the result. Throws if they are not such a file,
// or damaged; the program is checked by whoever packs it.
NetworkFile read_file(Bytes bytes);

uint32_t crc32(const char* data, std::size_t bytes);

}  // namespace mvit
