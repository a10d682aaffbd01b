// SPDX-License-Identifier: Apache-2.0
// One SIMD register, Vec<float> or Vec<double>, of the instruction set that the including file is compiled for: loads,
// stores, arithmetic, shuffles and conversions from and to bfloat16.
//
// Every <operator>_kernel.cpp is compiled once per instruction set, with the flags of the set and, from CMakeLists.txt,
//   MVIT_ISA             amx | avx512bf16 | avx512 | avx2 | portable: the namespace that everything here is in
//   MVIT_VECTOR_BYTES    64  | 64         | 64     | 32   | 16
//   MVIT_BF16_PAIRS      1 if the set has products of bfloat16 pairs (amx, avx512bf16), else not defined
//   MVIT_TILES           1 if they are done on matrix tiles (amx): see tiles.h
//   MVIT_TILES_EMULATED  1 if these are emulated (amx_emulated)
// Each set has its own namespace because the linker keeps only one copy of an inline function (a weak symbol): if the
// portable kernels called the AVX-512 copy, they would fault on an illegal instruction. For the same reason kernels and
// their headers call no inline functions or templates of the standard library and include no PyTorch header.
//
// Built on the vector extensions of GCC and Clang; intrinsics only for what these cannot express.
#pragma once

#if !defined(MVIT_ISA) || !defined(MVIT_VECTOR_BYTES)
#error "a kernel is compiled with MVIT_ISA and MVIT_VECTOR_BYTES defined: see CMakeLists.txt"
#endif

#include <cstdint>
#include <cstring>
#include <utility>  // std::integer_sequence: a type, no code

// The portable set takes what every processor of the architecture has: on aarch64 that is NEON, 32 registers of 16 bytes
// with fused multiply-adds.
#if MVIT_VECTOR_BYTES == 16 && defined(__aarch64__)
#define MVIT_NEON 1
#endif

#if MVIT_VECTOR_BYTES >= 32
#include <immintrin.h>
#elif defined(MVIT_NEON)
#include <arm_neon.h>
#endif
#if MVIT_VECTOR_BYTES == 64 && \
    !(defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__))
#error "vectors of 64 bytes need -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
#elif MVIT_VECTOR_BYTES == 32 && !(defined(__AVX2__) && defined(__FMA__))
#error "vectors of 32 bytes need -mavx2 -mfma"
#endif
#if defined(MVIT_BF16_PAIRS) && !defined(__AVX512BF16__)
#error "MVIT_BF16_PAIRS needs -mavx512bf16 beside the flags of vectors of 64 bytes"
#endif

#define MVIT_INLINE inline __attribute__((always_inline))

// The operator's dispatch table for this instruction set: MVIT_TABLE(patch_attention) is patch_attention_avx2.
#define MVIT_JOIN_(a, b) a##_##b
#define MVIT_JOIN(a, b) MVIT_JOIN_(a, b)
#define MVIT_TABLE(op) MVIT_JOIN(op, MVIT_ISA)

// Entries of a dispatch table: a set with products of bfloat16 pairs has those of pairs alone (see isa.h).
#if defined(MVIT_BF16_PAIRS)
#define MVIT_PLAIN_ENTRY(...) {}
#define MVIT_PAIRS_ENTRY(...) __VA_ARGS__
#else
#define MVIT_PLAIN_ENTRY(...) __VA_ARGS__
#define MVIT_PAIRS_ENTRY(...) {}
#endif

namespace mvit {
namespace MVIT_ISA {

struct bfloat16 {
  uint16_t bits;
};

typedef float NativeFloat __attribute__((vector_size(MVIT_VECTOR_BYTES)));
typedef double NativeDouble __attribute__((vector_size(MVIT_VECTOR_BYTES)));
typedef int32_t NativeInt32 __attribute__((vector_size(MVIT_VECTOR_BYTES)));
typedef int64_t NativeInt64 __attribute__((vector_size(MVIT_VECTOR_BYTES)));
typedef uint32_t NativeBits __attribute__((vector_size(MVIT_VECTOR_BYTES)));
typedef uint16_t NativeHalfBits __attribute__((vector_size(MVIT_VECTOR_BYTES / 2)));

template <typename T>
struct NativeOf;
template <>
struct NativeOf<float> {
  using Native = NativeFloat;
  using Integer = int32_t;
  using NativeInteger = NativeInt32;
};
template <>
struct NativeOf<double> {
  using Native = NativeDouble;
  using Integer = int64_t;
  using NativeInteger = NativeInt64;
};

template <typename T>
struct Vec {
  static constexpr int size = MVIT_VECTOR_BYTES / static_cast<int>(sizeof(T));
  using Native = typename NativeOf<T>::Native;
  using Integer = typename NativeOf<T>::Integer;
  using NativeInteger = typename NativeOf<T>::NativeInteger;

  Native native;

  Vec() = default;
  MVIT_INLINE Vec(Native n) : native(n) {}
  MVIT_INLINE Vec(T value) : native(value - Native{}) {}  // broadcast; x - 0 is x for every x, whereas -0 + 0 is 0

  friend MVIT_INLINE Vec operator-(Vec a) { return -a.native; }
  friend MVIT_INLINE Vec operator+(Vec a, Vec b) { return a.native + b.native; }
  friend MVIT_INLINE Vec operator-(Vec a, Vec b) { return a.native - b.native; }
  friend MVIT_INLINE Vec operator*(Vec a, Vec b) { return a.native * b.native; }
  friend MVIT_INLINE Vec operator/(Vec a, Vec b) { return a.native / b.native; }
};

// ---- loads and stores, unaligned ------------------------------------------------------------------------------------

template <typename T>
MVIT_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v.native, p, sizeof v.native);
  return v;
}

template <typename T>
MVIT_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v.native, sizeof v.native);
}

// GCC's AddressSanitizer does not check masked accesses, so in its builds their bytes are read one by one first.
template <typename T>
MVIT_INLINE void look_at([[maybe_unused]] const T* p, [[maybe_unused]] int n) {
#ifdef __SANITIZE_ADDRESS__
  const volatile unsigned char* bytes = reinterpret_cast<const volatile unsigned char*>(p);
  for (int i = 0; i < n * static_cast<int>(sizeof(T)); ++i) (void)bytes[i];
#endif
}

// Loads the first n elements (0 < n <= size); the rest are zero.
template <typename T>
MVIT_INLINE Vec<T> load_first(const T* p, int n) {
  if (n == Vec<T>::size) return load(p);
#if MVIT_VECTOR_BYTES == 64
  look_at(p, n);
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Native(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  else
    return typename Vec<T>::Native(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
  T buffer[Vec<T>::size] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}

template <typename T>
MVIT_INLINE void store_first(T* p, Vec<T> v, int n) {
  if (n == Vec<T>::size) return store(p, v);
#if MVIT_VECTOR_BYTES == 64
  look_at(p, n);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v.native);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v.native);
#else
  T buffer[Vec<T>::size];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// bfloat16 in memory, float in registers.

MVIT_INLINE Vec<float> load_first(const bfloat16* p, int n) {
  NativeHalfBits half{};
  if (n == Vec<float>::size) {
    std::memcpy(&half, p, sizeof half);
  } else {
#if MVIT_VECTOR_BYTES == 64
    look_at(p, n);
    half = NativeHalfBits(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
    uint16_t buffer[Vec<float>::size] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
    std::memcpy(&half, buffer, sizeof half);
#endif
  }
#if MVIT_VECTOR_BYTES == 64  // GCC 12 would convert halves and join them
  return Vec<float>::Native(NativeBits(_mm512_maskz_cvtepu16_epi32(-1, (__m256i)half)) << 16);
#else
  return Vec<float>::Native(__builtin_convertvector(half, NativeBits) << 16);
#endif
}

MVIT_INLINE void store_first(bfloat16* p, Vec<float> v, int n) {
#if defined(MVIT_BF16_PAIRS)
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v.native);
  if (n == Vec<float>::size) {
    std::memcpy(p, &rounded, sizeof rounded);
  } else {
    look_at(p, n);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), rounded);
  }
#else
  const NativeBits bits = NativeBits(v.native);
  const NativeBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // round to nearest even
  // For a NaN, rounding could carry the payload into infinity: it becomes a quiet one.
#if MVIT_VECTOR_BYTES == 64
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v.native, v.native, _CMP_UNORD_Q);
  const __m512i quiet_bit = _mm512_set1_epi32(0x40);
  const NativeHalfBits half = NativeHalfBits(_mm512_maskz_cvtepi32_epi16(
      -1, _mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)(bits >> 16), quiet_bit)));
#else
  const NativeBits quiet_nan = (bits >> 16) | 0x40, is_nan = NativeBits(v.native != v.native);
  const NativeHalfBits half = __builtin_convertvector((rounded & ~is_nan) | (quiet_nan & is_nan), NativeHalfBits);
#endif
  if (n == Vec<float>::size) {
    std::memcpy(p, &half, sizeof half);
  } else {
    uint16_t buffer[Vec<float>::size];
    std::memcpy(buffer, &half, sizeof half);
    for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
  }
#endif
}

#if defined(MVIT_BF16_PAIRS)
// The two bfloat16 values of one step of a product, the first in the lower half.
struct bf16x2 {
  uint32_t bits;
};

// p[i] = {first[i], second[i]} for i in [0, n)
MVIT_INLINE void store_first(bf16x2* p, Vec<float> first, Vec<float> second, int n) {
  // All of `first`, then all of `second`.
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second.native, first.native);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i pairs = _mm512_maskz_permutexvar_epi16(-1, order, halves);
  look_at(p, n);
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(n == 16 ? 0xffff : (1u << n) - 1), pairs);
}

// {first[i], second[i]} = p[i] for i in [0, 16)
MVIT_INLINE void store_halves(bfloat16* first, bfloat16* second, const bf16x2* p) {
  __m512i pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  const __m256i lower = _mm512_maskz_cvtepi32_epi16(-1, pairs);
  const __m256i upper = _mm512_maskz_cvtepi32_epi16(-1, _mm512_maskz_srli_epi32(-1, pairs, 16));
  std::memcpy(first, &lower, sizeof lower);
  std::memcpy(second, &upper, sizeof upper);
}
#endif

// ---- arithmetic -----------------------------------------------------------------------------------------------------

template <typename T>
MVIT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  using Native = typename Vec<T>::Native;
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Native(_mm512_fmadd_ps(a.native, b.native, c.native));
  else
    return Native(_mm512_fmadd_pd(a.native, b.native, c.native));
#elif MVIT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return Native(_mm256_fmadd_ps(a.native, b.native, c.native));
  else
    return Native(_mm256_fmadd_pd(a.native, b.native, c.native));
#elif defined(MVIT_NEON)  // not left to the compiler, which must not contract under -ffp-contract=off
  if constexpr (sizeof(T) == 4)
    return Native(vfmaq_f32(c.native, a.native, b.native));
  else
    return Native(vfmaq_f64(c.native, a.native, b.native));
#else
  return Native(a.native * b.native + c.native);  // a single instruction where the architecture has one
#endif
}

#if defined(MVIT_NEON)
// a[i] · b + c: NEON multiplies by an element of a register as fast as by a whole one.
template <int i, typename T>
MVIT_INLINE Vec<T> fma_element(Vec<T> a, Vec<T> b, Vec<T> c) {
  using Native = typename Vec<T>::Native;
  if constexpr (sizeof(T) == 4)
    return Native(vfmaq_laneq_f32(c.native, b.native, a.native, i));
  else
    return Native(vfmaq_laneq_f64(c.native, b.native, a.native, i));
}
#endif

template <typename T>
MVIT_INLINE Vec<T> sqrt(Vec<T> a) {
  using Native = typename Vec<T>::Native;
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Native(_mm512_maskz_sqrt_ps(-1, a.native));
  else
    return Native(_mm512_maskz_sqrt_pd(-1, a.native));
#else
  Native root = a.native;
  for (int i = 0; i < Vec<T>::size; ++i) {
    if constexpr (sizeof(T) == 4)
      root[i] = __builtin_sqrtf(root[i]);
    else
      root[i] = __builtin_sqrt(root[i]);
  }
  return root;
#endif
}

// The larger of each pair, b if either is NaN; likewise minimum. These are the semantics of x86's instructions; NEON's
// give NaN if either is, where x86 would keep a number b beside a NaN in a. No kernel depends on which.
template <typename T>
MVIT_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  using Native = typename Vec<T>::Native;
// Masked forms with all lanes set: GCC 12 warns about the undefined third operand of the plain ones.
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Native(_mm512_mask_max_ps(a.native, -1, a.native, b.native));
  else
    return Native(_mm512_mask_max_pd(a.native, -1, a.native, b.native));
#elif MVIT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return Native(_mm256_max_ps(a.native, b.native));
  else
    return Native(_mm256_max_pd(a.native, b.native));
#elif defined(MVIT_NEON)
  if constexpr (sizeof(T) == 4)
    return Native(vmaxq_f32(a.native, b.native));
  else
    return Native(vmaxq_f64(a.native, b.native));
#else
  return Native(a.native > b.native ? a.native : b.native);
#endif
}

template <typename T>
MVIT_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  using Native = typename Vec<T>::Native;
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Native(_mm512_mask_min_ps(a.native, -1, a.native, b.native));
  else
    return Native(_mm512_mask_min_pd(a.native, -1, a.native, b.native));
#elif MVIT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return Native(_mm256_min_ps(a.native, b.native));
  else
    return Native(_mm256_min_pd(a.native, b.native));
#elif defined(MVIT_NEON)
  if constexpr (sizeof(T) == 4)
    return Native(vminq_f32(a.native, b.native));
  else
    return Native(vminq_f64(a.native, b.native));
#else
  return Native(a.native < b.native ? a.native : b.native);
#endif
}

// ---- shuffles -------------------------------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define MVIT_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MVIT_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename Vec<T>::NativeInteger{__VA_ARGS__})
#endif

// a0 b0 a1 b1 …, from the lower or the upper halves.
template <typename T, int... I>
MVIT_INLINE Vec<T> zip_lower(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return typename Vec<T>::Native(MVIT_SHUFFLE(T, a.native, b.native, (I / 2 + (I % 2) * Vec<T>::size)...));
}
template <typename T, int... I>
MVIT_INLINE Vec<T> zip_upper(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return typename Vec<T>::Native(
      MVIT_SHUFFLE(T, a.native, b.native, (I / 2 + (I % 2) * Vec<T>::size + Vec<T>::size / 2)...));
}

// Transposes a square of `size` vectors in log2(size) rounds, each of which interleaves row i with row i + size / 2.
template <typename T>
MVIT_INLINE void transpose(Vec<T> (&row)[Vec<T>::size]) {
  constexpr int size = Vec<T>::size;
  constexpr std::make_integer_sequence<int, size> lanes{};
#pragma GCC unroll 4
  for (int round = 1; round < size; round *= 2) {
    Vec<T> next[size];
#pragma GCC unroll 16
    for (int i = 0; i < size / 2; ++i) {
      next[2 * i] = zip_lower(row[i], row[i + size / 2], lanes);
      next[2 * i + 1] = zip_upper(row[i], row[i + size / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) row[i] = next[i];
  }
}

// Horizontal sum, as a tree, so that the order of additions does not depend on the compiler.
template <typename T>
MVIT_INLINE T sum(Vec<T> v) {
  T lane[Vec<T>::size];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = Vec<T>::size / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

}  // namespace MVIT_ISA
}  // namespace mvit
