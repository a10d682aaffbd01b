// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/simt.h for the emulation: the same names, implemented on the CPU by machine.h. Tests compile a kernel's own
// source with -DMVIT_EMULATED and run it through `emulate`.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"

#define MVIT_KERNEL(threads, blocks_of_an_sm) inline void
#define MVIT_DEVICE inline
#define MVIT_UNROLL
#define MVIT_ROLLED
#define MVIT_UNROLL_BY_4

namespace mvit {

namespace emulation {

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Launches kernel(arguments...); returns "" or a description of the fault. The seed determines the order of blocks,
// warps and lanes.
template <typename Kernel, typename... Arguments>
std::string emulate(uint64_t seed, int64_t blocks_x, int blocks_y, int threads, uint32_t shared_bytes, Kernel kernel,
                    Arguments... arguments) {
  return machine.launch(seed, blocks_x, blocks_y, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------------------- who and where

inline int thread_index() { return emulation::machine.thread(); }
inline int lane_index() { return emulation::machine.lane(); }
inline int64_t block_index() { return emulation::machine.block_x; }
inline int block_index_y() { return emulation::machine.block_y; }

inline int warp_index(const emulation::Where& where = emulation::Where::current()) {
  uint32_t unused[1] = {}, warp[1];
  emulation::machine.collective(emulation::Kind::warp_index, 0, where, unused, warp, [](emulation::Warp&) {});
  return emulation::machine.thread() / 32;
}

// ------------------------------------------------------------------------------------------------ order among threads

inline void sync_threads(const emulation::Where& where = emulation::Where::current()) {
  emulation::machine.sync_threads(where);
}
inline void sync_warp(const emulation::Where& where = emulation::Where::current()) {
  uint32_t unused[1] = {}, result[1];
  emulation::machine.collective(emulation::Kind::sync_warp, 0, where, unused, result,
                                [](emulation::Warp& warp) { ++warp.epoch; });
}

template <typename T>
T shuffle(T value, int from, const emulation::Where& where = emulation::Where::current()) {
  const uint32_t given[2] = {emulation::bits<uint32_t>(value), static_cast<uint32_t>(from) & 31};
  uint32_t taken[1];
  emulation::machine.collective(emulation::Kind::shuffle, 0, where, given, taken, [](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) warp.results[lane][0] = warp.operands[warp.operands[lane][1]][0];
  });
  return emulation::bits<T>(taken[0]);
}
template <typename T>
T shuffle_xor(T value, int mask, const emulation::Where& where = emulation::Where::current()) {
  return shuffle(value, emulation::machine.lane() ^ mask, where);
}
inline bool any_lane(bool so, const emulation::Where& where = emulation::Where::current()) {
  const uint32_t given[1] = {so};
  uint32_t taken[1];
  emulation::machine.collective(emulation::Kind::any_lane, 0, where, given, taken, [](emulation::Warp& warp) {
    uint32_t any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= warp.operands[lane][0];
    for (int lane = 0; lane < 32; ++lane) warp.results[lane][0] = any;
  });
  return taken[0] != 0;
}

// ------------------------------------------------------------------------------------------------------ shared memory

template <typename T>
T load_shared(Shared at, const emulation::Where& where = emulation::Where::current()) {
  T value;
  std::memcpy(&value, emulation::machine.shared(emulation::Access::read, at, sizeof(T), where), sizeof(T));
  return value;
}
template <typename T>
void store_shared(Shared at, T value, const emulation::Where& where = emulation::Where::current()) {
  std::memcpy(emulation::machine.shared(emulation::Access::write, at, sizeof(T), where), &value, sizeof(T));
}

namespace emulation {

// The matrices are read on behalf of the whole warp: without a barrier not even a lane's own store is ordered before
// the read.
template <int MATRICES, bool TRANSPOSED>
void load_matrices(uint32_t (&r)[MATRICES], Shared row, const Where& where) {
  const uint32_t address[1] = {row};
  uint32_t result[4];
  const auto perform = [&](Warp& warp) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i)  // a row spans four of the 32 banks
        for (int j = 0; j < i; ++j) {
          const uint32_t a = warp.operands[8 * matrix + i][0], b = warp.operands[8 * matrix + j][0];
          if (a != b && a / 16 % 8 == b / 16 % 8) ++machine.matrix_conflicts;
        }
      for (int i = 0; i < 8; ++i)
        std::memcpy(elements[i], machine.shared(Access::read, warp.operands[8 * matrix + i][0], 16, where, true), 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t low = TRANSPOSED ? elements[j][i] : elements[i][j];
        const uint16_t high = TRANSPOSED ? elements[j + 1][i] : elements[i][j + 1];
        warp.results[lane][matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  };
  machine.collective(Kind::load_matrices, 2 * MATRICES + TRANSPOSED, where, address, result, perform);
  std::memcpy(r, result, sizeof r);
}

}  // namespace emulation

template <int MATRICES>
void load_matrices(uint32_t (&r)[MATRICES], Shared row, const emulation::Where& where = emulation::Where::current()) {
  emulation::load_matrices<MATRICES, false>(r, row, where);
}
template <int MATRICES>
void load_matrices_transposed(uint32_t (&r)[MATRICES], Shared row,
                              const emulation::Where& where = emulation::Where::current()) {
  emulation::load_matrices<MATRICES, true>(r, row, where);
}

// ------------------------------------------------------------------------------------- copies from global memory

template <int BYTES>
void copy_async(Shared to, const void* from, bool valid = true,
                const emulation::Where& where = emulation::Where::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::machine.copy(to, from, BYTES, valid, where);
}
inline void commit_copies() { emulation::machine.commit_copies(); }
template <int LATER>
void wait_copies() {
  emulation::machine.wait_copies(LATER);
}

template <typename T>
T load_global(const void* at, const emulation::Where& where = emulation::Where::current()) {
  T value;
  std::memcpy(&value, emulation::machine.global(emulation::Access::read, at, sizeof(T), where), sizeof(T));
  return value;
}
template <typename T>
T load_constant(const void* at, const emulation::Where& where = emulation::Where::current()) {
  return load_global<T>(at, where);
}
template <typename T>
void store_global(void* at, T value, const emulation::Where& where = emulation::Where::current()) {
  std::memcpy(emulation::machine.global(emulation::Access::write, at, sizeof(T), where), &value, sizeof(T));
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

namespace emulation {

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), bits<float>(sign | 1u));
  return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

// Rounded once, to nearest even, whatever the value has beyond float32.
inline uint16_t to_half(double value) {
  const uint64_t raw = bits<uint64_t>(value);
  const auto sign = static_cast<uint32_t>(raw >> 48 & 0x8000);
  const double size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  // At or above the midpoint between the largest number and the next.
  if (size >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x1p-14)  // subnormals are multiples of 2^-24; 1024 units are the first number of the next exponent
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24))));
  // 42 bits are dropped; if rounding carries, the bits are the first number of the next exponent.
  const uint64_t rounded = (raw & ~(uint64_t{1} << 63)) + 0x1ffffffffff + (raw >> 42 & 1);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>((rounded >> 42) - ((1023 - 15) << 10)));
}

inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t raw = bits<uint32_t>(value);
  return static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}

// Models the hardware's error: up to `relative`, drawn from a hash of the argument, so that equal arguments give equal
// results.
inline float approximately(double value, float argument, double relative) {
  Random hash{bits<uint32_t>(argument)};
  const double part = static_cast<double>(hash.next() >> 11) * 0x1p-52 - 1;
  const auto result = static_cast<float>(value * (1 + relative * part));
  return std::fabs(result) < std::numeric_limits<float>::min() ? std::copysign(0.0f, result) : result;
}
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace emulation

template <typename T>
uint32_t pack(float low, float high) {
  const auto rounded = [](float value) -> uint32_t {
    if constexpr (std::is_same_v<T, Half>) return emulation::to_half(value);
    return emulation::to_bfloat16(value);
  };
  return rounded(low) | rounded(high) << 16;
}
template <typename T>
float unpack(T value) {
  if constexpr (std::is_same_v<T, Half>) return emulation::from_half(value.bits);
  return emulation::bits<float>(static_cast<uint32_t>(value.bits) << 16);
}
template <typename T>
float unpack_low(uint32_t pair) {
  return unpack<T>(T{static_cast<uint16_t>(pair)});
}
template <typename T>
float unpack_high(uint32_t pair) {
  return unpack<T>(T{static_cast<uint16_t>(pair >> 16)});
}

// Products are exact and are added in float32 one by one. The second half of the A fragment's registers holds the
// columns eight further right.
template <typename T, int A>
void mma(float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[A / 2],
         const emulation::Where& where = emulation::Where::current()) {
  static_assert(A == 4 || A == 2);
  uint32_t operands[10] = {}, result[4];
  for (int i = 0; i < 4; ++i) operands[i] = emulation::bits<uint32_t>(d[i]);
  for (int i = 0; i < A; ++i) operands[4 + i] = a[i];
  for (int i = 0; i < A / 2; ++i) operands[8 + i] = b[i];
  const int type = std::is_same_v<T, Half>;
  emulation::machine.collective(emulation::Kind::mma, 2 * A + type, where, operands, result, [](emulation::Warp& warp) {
    float left[16][4 * A], right[4 * A][8], sums[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t* given = warp.operands[lane];
      for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][t + i % 2] = emulation::bits<float>(given[i]);
      for (int i = 0; i < A; ++i) {
        left[g + i % 2 * 8][t + i / 2 * 8] = unpack_low<T>(given[4 + i]);
        left[g + i % 2 * 8][t + i / 2 * 8 + 1] = unpack_high<T>(given[4 + i]);
      }
      for (int i = 0; i < A / 2; ++i) {
        right[t + i * 8][g] = unpack_low<T>(given[8 + i]);
        right[t + i * 8 + 1][g] = unpack_high<T>(given[8 + i]);
      }
    }
    for (int k = 0; k < 4 * A; ++k)
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) sums[m][n] += left[m][k] * right[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        warp.results[lane][i] = emulation::bits<uint32_t>(sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  });
  for (int i = 0; i < 4; ++i) d[i] = emulation::bits<float>(result[i]);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
         const emulation::Where& where = emulation::Where::current()) {
  std::memcpy(d, c, sizeof d);
  mma<T>(d, a, b, where);
}

inline float exp2_approximate(float x) {
  x = emulation::flushed(x);
  return x == 0 ? 1.0f : emulation::approximately(std::exp2(static_cast<double>(x)), x, 0x1p-22);
}
inline float log2_approximate(float x) {
  x = emulation::flushed(x);
  const double exact = std::log2(static_cast<double>(x));
  // Near 1 the error is absolute, 2^-22, rather than relative.
  return x > 0.5f && x < 2 ? static_cast<float>(exact + emulation::approximately(0x1p-22, x, 1) - 0x1p-22)
                           : emulation::approximately(exact, x, 0x1p-22);
}
inline float reciprocal_approximate(float x) {
  return emulation::approximately(1 / static_cast<double>(emulation::flushed(x)), x, 0x1p-23);
}
inline float rsqrt_approximate(float x) {
  return emulation::approximately(1 / std::sqrt(static_cast<double>(emulation::flushed(x))), x, 0x1p-22);
}
inline float tanh_approximate(float x) {
  return emulation::approximately(std::tanh(static_cast<double>(x)), x, 0x1p-11);
}

// A product of two float16 has 22 bits. Its sum with a third is exact in 53, or so far from it that the float16 next to
// it is the same.
inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  const auto fma = [](float a, float b, float c) -> uint32_t {
    return emulation::to_half(static_cast<double>(a) * b + c);
  };
  return fma(unpack_low<Half>(a), unpack_low<Half>(b), unpack_low<Half>(c)) |
         fma(unpack_high<Half>(a), unpack_high<Half>(b), unpack_high<Half>(c)) << 16;
}
// The error is absolute: up to 2^-10.987, of which the result's rounding is at most 2^-12.
inline uint32_t tanh_halves(uint32_t x) {
  const auto tanh = [](float x) -> uint32_t {
    const double error = emulation::approximately(1, x, 0x1p-11 - 0x1p-12) - 1;
    const double found = std::tanh(static_cast<double>(x)) + error;
    return emulation::to_half(std::fabs(found) > 1 ? std::copysign(1.0, found) : found);
  };
  return tanh(unpack_low<Half>(x)) | tanh(unpack_high<Half>(x)) << 16;
}

}  // namespace mvit

// -------------------------------------------------------------------------------------- for tests/support/emulation.py

// The global memory that kernels may access from now on, at `host` and known to them as `begin`; with no buffers, they
// may access all memory.
extern "C" {
__attribute__((used)) inline void emulation_forget_buffers() { mvit::emulation::machine.buffers.clear(); }
__attribute__((used)) inline void emulation_add_buffer(uintptr_t begin, uint64_t bytes, int64_t writable,
                                                        uintptr_t host) {
  mvit::emulation::machine.buffers.emplace_back(begin, bytes, writable != 0, host);
}
// Number of times since the library was loaded that two rows of one ldmatrix matrix were in the same banks.
__attribute__((used)) inline int64_t emulation_matrix_conflicts() { return mvit::emulation::machine.matrix_conflicts; }
// The result of a driver's function: null, or a text that is valid until the next call.
MVIT_OWN inline const char* emulation_result(std::string report) {
  static std::string kept;
  kept = std::move(report);
  return kept.empty() ? nullptr : kept.c_str();
}
}
