// SPDX-License-Identifier: Apache-2.0
// Matrix tiles (Intel AMX): eight registers of up to 16 rows of 64 bytes, their loads and stores, and the product
// C += A · B of bfloat16 pairs with float32 sums. A thread configures them before use and releases them afterwards.
//
// Compiled with MVIT_TILES_EMULATED, the same functions work on memory instead of the tile unit, with the same bits. So
// kernels written for tiles are tested on processors without them, and AddressSanitizer sees what a tile reads.
#pragma once

#include "vec.h"

#if !defined(MVIT_TILES)
#error "tiles.h is for the instruction sets with TILES in CMakeLists.txt"
#endif

namespace mvit {
namespace MVIT_ISA {

constexpr int kTile = 16;          // rows of a tile, and float32 columns of C
constexpr int kTileDepth = 32;     // bfloat16 values of a row of A: the depth of one product
constexpr int kTilePairs = kTileDepth / 2;
constexpr int kTileBytes = 1024;   // a whole tile

// The register file as this code uses it: C in 0 to 3, A in 4 and 5, B in 6 and 7. A narrow configuration has eight rows
// in C and A: a product then takes 2.7 ns instead of 4.3. A shallow one has fewer pairs in A's rows, and rows in B: that
// takes no less time, but what is beyond them in memory is not read.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit MVIT_INLINE TileConfiguration(int rows_of_c, int pairs = kTilePairs) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_a = tile == 4 || tile == 5;
      row_bytes[tile] = static_cast<uint16_t>(is_a ? 4 * pairs : 64);
      rows[tile] = static_cast<uint8_t>(tile < 6 ? rows_of_c : pairs);
    }
  }
};

#if !defined(MVIT_TILES_EMULATED)

// Own wrappers: GCC 12's _tile_loadconfig declares only eight bytes of its operand, and _tile_loadd no memory at all.
MVIT_INLINE void load_configuration(const TileConfiguration& configuration) {
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}
MVIT_INLINE void release_tiles() { asm volatile("tilerelease" ::); }

template <int tile>
MVIT_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Row r of the tile = 64 bytes at p + r · stride (bytes).
template <int tile>
MVIT_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
MVIT_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
// C[m][n] += Σ_k A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
template <int c, int a, int b>
MVIT_INLINE void multiply_add_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct EmulatedTiles {
  uint8_t rows[8];
  uint16_t row_bytes[8];
  alignas(64) uint8_t bytes[8][kTile][64];
};
inline thread_local EmulatedTiles emulated_tiles;

inline void load_configuration(const TileConfiguration& configuration) {
  std::memset(&emulated_tiles, 0, sizeof emulated_tiles);
  std::memcpy(emulated_tiles.rows, configuration.rows, sizeof emulated_tiles.rows);
  std::memcpy(emulated_tiles.row_bytes, configuration.row_bytes, sizeof emulated_tiles.row_bytes);
}
inline void release_tiles() { std::memset(emulated_tiles.rows, 0, sizeof emulated_tiles.rows); }

// An instruction on a tile that is not configured is an invalid opcode on the processor.
inline void check_configured(int tile) {
  if (emulated_tiles.rows[tile] == 0) __builtin_trap();
}

template <int tile>
inline void zero_tile() {
  check_configured(tile);
  std::memset(emulated_tiles.bytes[tile], 0, kTileBytes);
}
template <int tile>
inline void load_tile(const void* p, int64_t stride) {
  check_configured(tile);
  std::memset(emulated_tiles.bytes[tile], 0, kTileBytes);
  for (int row = 0; row < emulated_tiles.rows[tile]; ++row)
    std::memcpy(emulated_tiles.bytes[tile][row], static_cast<const char*>(p) + row * stride,
                emulated_tiles.row_bytes[tile]);
}
template <int tile>
inline void store_tile(void* p, int64_t stride) {
  check_configured(tile);
  for (int row = 0; row < emulated_tiles.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(p) + row * stride, emulated_tiles.bytes[tile][row], emulated_tiles.row_bytes[tile]);
}

// As the tile unit rounds: the products of even k and those of odd k are two chains of fused multiply-adds from zero,
// whose sum is added to C; to nearest even, with subnormal operands and results flushed whatever MXCSR says.
template <int c, int a, int b>
__attribute__((noinline)) void multiply_add_tiles() {
  for (const int tile : {c, a, b}) check_configured(tile);
  constexpr unsigned kFlush = 0x8040, kDefaults = 0x1f80;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kDefaults | kFlush);
  asm volatile("" ::: "memory");  // everything between is read from and written to memory between the two settings
  for (int row = 0; row < emulated_tiles.rows[c]; ++row) {
    Vec<float> odd_and_even[2] = {Vec<float>(0.0f), Vec<float>(0.0f)};
    for (int k = 0; k < kTile; ++k) {
      uint32_t left;
      NativeBits right;
      std::memcpy(&left, emulated_tiles.bytes[a][row] + 4 * k, sizeof left);
      std::memcpy(&right, emulated_tiles.bytes[b][k], sizeof right);
      const Vec<float> even(Vec<float>::Native(NativeBits{} + (left << 16))), odd(
          Vec<float>::Native(NativeBits{} + (left & 0xffff0000u)));
      odd_and_even[0] = fma(even, Vec<float>(Vec<float>::Native(right << 16)), odd_and_even[0]);
      odd_and_even[1] = fma(odd, Vec<float>(Vec<float>::Native(right & 0xffff0000u)), odd_and_even[1]);
    }
    float* const sum = reinterpret_cast<float*>(emulated_tiles.bytes[c][row]);
    store(sum, load(sum) + (odd_and_even[0] + odd_and_even[1]));
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(before);
}

#endif

// An addition of vectors that does nothing but occur. Where there is none for some 130 products (0.6 µs), the units of wide
// vectors seem to fall asleep, and the next store of a tile takes 250 ns (measured on a Xeon; additions of floats alone keep
// them awake, not moves, stores or additions of integers). So loops of products that may be that long have one now and then.
MVIT_INLINE void keep_vector_units_awake() {
  __m512 sum;
  asm volatile("vaddps %1, %1, %0" : "=v"(sum) : "v"(_mm512_setzero_ps()));
}

// Tiles configured for the calling thread while this object lives: `rows` of C and A, 8 or 16, and `pairs` of A and B.
class Tiles {
 public:
  explicit MVIT_INLINE Tiles(int rows = kTile, int pairs = kTilePairs) {
    load_configuration(TileConfiguration(rows, pairs));
  }
  MVIT_INLINE ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace MVIT_ISA
}  // namespace mvit
