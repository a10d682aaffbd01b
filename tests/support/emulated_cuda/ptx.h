// SPDX-License-Identifier: Apache-2.0
// What kernels translated from PTX (support/ptx/translate.py) are made of: its operations, on the emulation's machine.
#pragma once

#include <array>
#include <bit>
#include <cmath>

#include <simt.h>  // csrc/cuda's; MVIT_EMULATED is defined

#define MVIT_APART __attribute__((noinline))  // kernels have thousands of these calls, and are compiled once a run

namespace mvit::ptx {

using emulation::Access;
using emulation::machine;
using emulation::Where;

// The launch, of which there is one at a time.
MVIT_OWN inline uint32_t threads = 0, blocks_x = 0, blocks_y = 0;
MVIT_OWN inline const unsigned char* parameters = nullptr;
MVIT_OWN inline std::vector<int64_t> visits;

inline uint32_t thread() { return static_cast<uint32_t>(machine.thread()); }
inline uint32_t block_x() { return static_cast<uint32_t>(machine.block_x); }
inline uint32_t block_y() { return static_cast<uint32_t>(machine.block_y); }

inline float f(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t u(float value) { return std::bit_cast<uint32_t>(value); }

template <typename T, int COUNT>
struct Several {
  T x[COUNT];
};

// ------------------------------------------------------------------------------------------------------------ integers

template <typename T>
T div(T a, T b) {
  return b ? a / b : static_cast<T>(~T{});  // as the hardware has it
}
template <typename T>
T rem(T a, T b) {
  return b ? a % b : a;
}
template <typename T>
T high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
}
template <typename T>
T left(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T{} : static_cast<T>(a << by);
}
template <typename T>
T right(T a, uint32_t by) {
  constexpr uint32_t kMost = 8 * sizeof(T) - 1;
  return by > kMost ? (std::is_signed_v<T> ? static_cast<T>(a >> kMost) : T{}) : static_cast<T>(a >> by);
}
template <typename T>
T extract(T a, uint32_t from, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  using Unsigned = std::make_unsigned_t<T>;
  from &= 255, length &= 255;
  if (length == 0) return T{};
  const bool sign = std::is_signed_v<T> && (a >> std::min(from + length - 1, kBits - 1) & 1);
  const Unsigned mask = length >= kBits ? ~Unsigned{} : (Unsigned{1} << length) - 1;
  const Unsigned part = right<Unsigned>(static_cast<Unsigned>(a), from) & mask;
  return static_cast<T>(sign ? part | ~mask : part);
}
template <typename T>
T insert(T a, T into, uint32_t from, uint32_t length) {
  from &= 255, length &= 255;
  const T mask = left<T>(length >= 8 * sizeof(T) ? ~T{} : (T{1} << length) - 1, from);
  return (left<T>(a, from) & mask) | (into & ~mask);
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (which & 7) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline uint32_t logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <int WRAP>
uint32_t funnel_l(uint32_t low, uint32_t high, uint32_t by) {
  by = WRAP ? by & 31 : std::min(by, 32u);
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << by >> 32);
}
template <int WRAP>
uint32_t funnel_r(uint32_t low, uint32_t high, uint32_t by) {
  by = WRAP ? by & 31 : std::min(by, 32u);
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> by);
}

// -------------------------------------------------------------------------------------------------------------- floats

using emulation::flushed;

template <typename T>
T negative(T a) {
  return -a;
}
template <typename T>
T absolute(T a) {
  return a < 0 ? -a : a;
}
inline float absolute(float a) { return std::fabs(a); }
template <typename T>
T minimum(T a, T b) {
  return a < b ? a : b;
}
inline float minimum(float a, float b) { return std::fmin(a, b); }
template <typename T>
T maximum(T a, T b) {
  return a > b ? a : b;
}
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline bool unordered(float a, float b) { return std::isnan(a) || std::isnan(b); }
inline float fma(float a, float b, float c) { return std::fmaf(a, b, c); }

// With the hardware's error; subnormal results remain.
inline float roughly(double value, float argument, double relative) {
  emulation::Random hash{u(argument)};
  const double part = static_cast<double>(hash.next() >> 11) * 0x1p-52 - 1;
  return static_cast<float>(value * (1 + relative * part));
}
inline float divided(float a, float b) { return roughly(static_cast<double>(a) / b, b, 0x1p-23); }  // 2 units at most
template <int FTZ>
float ex2(float x) {
  return FTZ ? exp2_approximate(x) : roughly(std::exp2(static_cast<double>(x)), x, 0x1p-22);
}
template <int FTZ>
float lg2(float x) {
  if (FTZ || std::fpclassify(x) != FP_SUBNORMAL) return log2_approximate(x);
  return static_cast<float>(std::log2(static_cast<double>(x)));
}
template <int APPROXIMATE>
float rcp(float x) {
  return APPROXIMATE ? reciprocal_approximate(x) : 1 / x;
}
template <int APPROXIMATE>
float rsqrt(float x) {
  static_assert(APPROXIMATE);
  return rsqrt_approximate(x);
}
template <int APPROXIMATE>
float sqrt(float x) {
  return APPROXIMATE ? roughly(std::sqrt(static_cast<double>(x)), x, 0x1p-22) : std::sqrt(x);
}
inline float tanh(float x) { return tanh_approximate(x); }

template <typename T>
T clamped(float x) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(x)) return T{};
  if (static_cast<double>(x) <= static_cast<double>(Limits::min())) return Limits::min();
  return static_cast<double>(x) >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<T>(x);
}
template <typename T>
T rzi(float x) {
  return clamped<T>(std::trunc(x));
}
template <typename T>
T rni(float x) {
  return clamped<T>(std::nearbyint(x));
}
template <typename T>
T rmi(float x) {
  return clamped<T>(std::floor(x));
}
template <typename T>
T rpi(float x) {
  return clamped<T>(std::ceil(x));
}
inline uint32_t to_tf32(float x) { return (u(x) + 0x1000) & ~0x1fffu; }  // to nearest, ties away from zero

// -------------------------------------------------------------------------------------------------------------- memory

template <typename T>
T parameter(uint64_t offset) {
  T value;
  std::memcpy(&value, parameters + offset, sizeof value);
  return value;
}
template <typename T, int COUNT>
MVIT_APART Several<T, COUNT> load_global(uint64_t at, const Where& where = Where::current()) {
  Several<T, COUNT> value;
  const void* from = machine.global(Access::read, reinterpret_cast<const void*>(at), sizeof value, where);
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename T, int COUNT>
MVIT_APART void store_global(const Several<T, COUNT>& value, uint64_t at, const Where& where = Where::current()) {
  void* to = machine.global(Access::write, reinterpret_cast<const void*>(at), sizeof value, where, &value);
  std::memcpy(to, &value, sizeof value);
}
template <typename T, int COUNT>
MVIT_APART Several<T, COUNT> load_shared(uint32_t at, const Where& where = Where::current()) {
  Several<T, COUNT> value;
  std::memcpy(&value, machine.shared(Access::read, at, sizeof value, where), sizeof value);
  return value;
}
template <typename T, int COUNT>
MVIT_APART void store_shared(const Several<T, COUNT>& value, uint32_t at, const Where& where = Where::current()) {
  std::memcpy(machine.shared(Access::write, at, sizeof value, where, false, &value), &value, sizeof value);
}
template <int BYTES>
MVIT_APART void copy_async(uint32_t to, uint64_t from, uint32_t given, const Where& where = Where::current()) {
  if (given != 0 && given != BYTES) machine.fault("a copy of a part: " + std::to_string(given) + " bytes");
  machine.copy(to, reinterpret_cast<const void*>(from), BYTES, given != 0, where);
}
inline void wait_copies(uint32_t later) { machine.wait_copies(later); }

// -------------------------------------------------------------------------------------------------- all lanes together

inline void whole(uint32_t mask) {
  if (mask != ~0u) machine.fault("a collective of some of the lanes");
}

enum class Shuffle { up, down, bfly, idx };
struct Shuffled {
  uint32_t value;
  bool valid;
};
template <Shuffle MODE>
MVIT_APART Shuffled shuffle(uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask,
                            const Where& where = Where::current()) {
  whole(mask);
  const auto lane = static_cast<int>(thread() % 32), step = static_cast<int>(by & 31);
  const auto segment = static_cast<int>(clamp >> 8 & 31), limit = static_cast<int>(clamp & 31);
  const int last = (lane & segment) | (limit & ~segment), first = lane & segment;
  int from = MODE == Shuffle::up     ? lane - step
             : MODE == Shuffle::down ? lane + step
             : MODE == Shuffle::bfly ? lane ^ step
                                     : first | (step & ~segment);
  const bool valid = MODE == Shuffle::up ? from >= last : from <= last;
  if (!valid) from = lane;
  return {mvit::shuffle<uint32_t>(value, from, where), valid};
}

inline uint32_t ballot(bool so, uint32_t mask, const Where& where = Where::current()) {
  whole(mask);
  const uint32_t given[1] = {so};
  uint32_t taken[1];
  machine.collective(emulation::Kind::any_lane, 0, where, given, taken, [](emulation::Warp& warp) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= warp.operands[lane][0] << lane;
    for (int lane = 0; lane < 32; ++lane) warp.results[lane][0] = votes;
  });
  return taken[0];
}

template <int MATRICES, bool TRANSPOSED>
MVIT_APART Several<uint32_t, MATRICES> load_matrices(uint32_t row, const Where& where = Where::current()) {
  Several<uint32_t, MATRICES> r;
  emulation::load_matrices<MATRICES, TRANSPOSED>(r.x, row, where);
  return r;
}

struct Tf32 {};

// The product of 16 × 8 and 8 × 8 numbers that lie in registers as float32, of whose bits the last 13 do not count.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  uint32_t operands[10], result[4];
  for (int i = 0; i < 4; ++i) operands[i] = u(d[i]), operands[4 + i] = a[i] & ~0x1fffu;
  for (int i = 0; i < 2; ++i) operands[8 + i] = b[i] & ~0x1fffu;
  machine.collective(emulation::Kind::mma, -1, where, operands, result, [](emulation::Warp& warp) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = f(warp.operands[lane][4 + i]);
      for (int i = 0; i < 2; ++i) right[t + i * 4][g] = f(warp.operands[lane][8 + i]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        float sum = f(warp.operands[lane][i]);
        for (int k = 0; k < 8; ++k) sum += left[m][k] * right[k][n];
        warp.results[lane][i] = u(sum);
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = f(result[i]);
}

template <typename T, int A>
MVIT_APART Several<uint32_t, 4> mma(const Several<uint32_t, 4>& c, const Several<uint32_t, A>& a,
                                    const Several<uint32_t, A / 2>& b, const Where& where = Where::current()) {
  float d[4] = {f(c.x[0]), f(c.x[1]), f(c.x[2]), f(c.x[3])};
  if constexpr (std::is_same_v<T, Tf32>)
    mma_tf32(d, a.x, b.x, where);
  else
    mvit::mma<T, A>(d, a.x, b.x, where);
  return {{u(d[0]), u(d[1]), u(d[2]), u(d[3])}};
}

}  // namespace mvit::ptx

void kernel();  // the translation

// ------------------------------------------------------------------------------------------ for support/ptx/program.py

extern "C" {
// Null, or what is wrong. `visits` has a count for each stretch of the kernel, to which this launch's are added.
__attribute__((used)) inline const char* ptx_launch(uint64_t seed, int64_t blocks_x, int64_t blocks_y, int64_t threads,
                                                    int64_t shared_bytes, const unsigned char* parameters,
                                                    int64_t* visits, int64_t stretches) {
  using namespace mvit;
  ptx::blocks_x = static_cast<uint32_t>(blocks_x), ptx::blocks_y = static_cast<uint32_t>(blocks_y);
  ptx::threads = static_cast<uint32_t>(threads);
  ptx::parameters = parameters;
  ptx::visits.assign(static_cast<std::size_t>(stretches), 0);
  const std::string report =
      emulation::machine.launch(seed, blocks_x, static_cast<int>(blocks_y), static_cast<int>(threads),
                                static_cast<uint32_t>(shared_bytes), [] { kernel(); });
  for (int64_t i = 0; i < stretches; ++i) visits[i] += ptx::visits[static_cast<std::size_t>(i)];
  return emulation_result(report);
}
}
