// SPDX-License-Identifier: Apache-2.0
// Device abstraction: everything that a kernel needs from the GPU. No other kernel source in csrc/cuda contains PTX,
// intrinsics, built-in variables or shared memory declarations, so the same source also runs on the CPU: with
// MVIT_EMULATED, tests/support/emulated_cuda/simt.h defines these names there, with a race check and a thread schedule
// drawn from a seed.
//
// Rules for kernels: one-dimensional blocks of whole warps; no thread returns before the others; all 32 lanes call
// collectives (mma, ldmatrix, shuffle, sync_warp); shared memory is accessed only through the functions below.
#pragma once

#include <cstdint>

namespace mvit {

// 16-bit floats are passed as raw bits. Two share a 32-bit register, the first element in the lower half.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Vector types for 8- and 16-byte accesses.
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

using Shared = uint32_t;  // an address in the block's shared memory: bytes from its start

}  // namespace mvit

#ifdef MVIT_EMULATED
#include "emulated_cuda/simt.h"
#else

#include <cuda_runtime.h>

#define MVIT_KERNEL(threads, blocks_of_an_sm) __global__ void __launch_bounds__(threads, blocks_of_an_sm)
#define MVIT_DEVICE __device__ __forceinline__
#define MVIT_UNROLL _Pragma("unroll")
#define MVIT_ROLLED _Pragma("unroll 1")
#define MVIT_UNROLL_BY_4 _Pragma("unroll 4")

namespace mvit {

// ---------------------------------------------------------------------------------------------------- who and where

MVIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MVIT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
// Warp-uniform. The shuffle tells the compiler so: branches on it are not divergent.
MVIT_DEVICE int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0); }
MVIT_DEVICE int64_t block_index() { return blockIdx.x; }
MVIT_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }

// ------------------------------------------------------------------------------------------------ order among threads

MVIT_DEVICE void sync_threads() { __syncthreads(); }
MVIT_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>  // 32 bits
MVIT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <typename T>  // 32 bits; returns the value of lane `from`
MVIT_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(~0u, value, from);
}
// Warp vote: true in all lanes if `so` is true in any.
MVIT_DEVICE bool any_lane(bool so) { return __any_sync(~0u, so); }

// ------------------------------------------------------------------------------------------------------ shared memory

extern __shared__ __align__(128) unsigned char dynamic_shared[];

MVIT_DEVICE unsigned char* shared_pointer(Shared at) { return dynamic_shared + at; }
MVIT_DEVICE uint32_t shared_address(Shared at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)) + at;
}

// T has 2, 4, 8 or 16 bytes; the address is a multiple of its size.
template <typename T>
MVIT_DEVICE T load_shared(Shared at) {
  return *reinterpret_cast<const T*>(shared_pointer(at));
}
template <typename T>
MVIT_DEVICE void store_shared(Shared at, T value) {
  *reinterpret_cast<T*>(shared_pointer(at)) = value;
}

// ldmatrix of four (two) matrices of 8 × 8 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, a
// multiple of 16. In r[i] it receives elements (l / 4, 2 · (l % 4)) and the next one of matrix i, or of its transpose.
MVIT_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MVIT_DEVICE void load_matrices(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
MVIT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MVIT_DEVICE void load_matrices_transposed(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ------------------------------------------------------------------------------------- copies from global memory

// cp.async of BYTES bytes (4, 8 or 16, to which both addresses are aligned), bypassing registers; zeros if not `valid`.
// The data is visible to this thread after wait_copies, to the others after a subsequent sync_threads.
template <int BYTES>
MVIT_DEVICE void copy_async(Shared to, const void* from, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if constexpr (BYTES == 16)  // .cg bypasses L1, which is better used for other data
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid ? BYTES : 0)
                 : "memory");
}
MVIT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>  // waits for all of this thread's groups except the LATER most recent ones
MVIT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// T has 2, 4, 8 or 16 bytes; the address is a multiple of its size. load_constant requires that the memory is not
// written while the kernel runs.
template <typename T>
MVIT_DEVICE T load_global(const void* at) {
  return *static_cast<const T*>(at);
}
template <typename T>
MVIT_DEVICE T load_constant(const void* at) {
  if constexpr (sizeof(T) == 16) {
    Words4 w;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(at));
    return reinterpret_cast<const T&>(w);
  } else if constexpr (sizeof(T) == 8) {
    Words2 w;
    asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(at));
    return reinterpret_cast<const T&>(w);
  } else {
    return *static_cast<const T*>(at);
  }
}
template <typename T>
MVIT_DEVICE void store_global(void* at, T value) {
  *static_cast<T*>(at) = value;
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

// d += a · b on tensor cores: a is 16 × 16 (16 × 8), b 16 × 8 (8 × 8), both of T; d is 16 × 8 in float32.
// With g = l / 4 and t = l % 4, lane l holds
//   of d: elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1);
//   of a: in a[0] and a[1] the pairs at (g, 2t) and (g + 8, 2t), in a[2] and a[3] the same eight columns further right;
//   of b: in b[0] elements (2t, g) and (2t + 1, g), in b[1] the same eight rows further down.
template <typename T>
MVIT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <typename T>
MVIT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
// d = a · b + c, which saves copying c.
template <typename T>
MVIT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

#define MVIT_MMA(T, NAME)                                                                                             \
  template <>                                                                                                         \
  MVIT_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }                                                                                                                   \
  template <>                                                                                                         \
  MVIT_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {                            \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                                                \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                                                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));                                                                  \
  }                                                                                                                   \
  template <>                                                                                                         \
  MVIT_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {       \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                                     \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                        \
  }
MVIT_MMA(Half, "f16")
MVIT_MMA(BFloat16, "bf16")
#undef MVIT_MMA

// Packs two floats, rounded to nearest even, into one register of T; `low` comes first in memory.
template <typename T>
MVIT_DEVICE uint32_t pack(float low, float high);
template <>
MVIT_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
MVIT_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename T>
MVIT_DEVICE float unpack(T value);
template <>
MVIT_DEVICE float unpack<BFloat16>(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
template <>
MVIT_DEVICE float unpack<Half>(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
template <typename T>
MVIT_DEVICE float unpack_low(uint32_t pair) {
  return unpack<T>(T{static_cast<uint16_t>(pair)});
}
template <typename T>
MVIT_DEVICE float unpack_high(uint32_t pair) {
  return unpack<T>(T{static_cast<uint16_t>(pair >> 16)});
}

// One special-function instruction each: 2^x and log2 x to within 2 ulp, 1 / x and 1 / sqrt(x) to within 1 or 2 ulp,
// tanh to within 2^-11.
MVIT_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MVIT_DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MVIT_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MVIT_DEVICE float rsqrt_approximate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MVIT_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two float16 a register: a · b + c, rounded once, and tanh to within 2^-10.987, which takes one special-function
// instruction an element, as in float32.
MVIT_DEVICE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
MVIT_DEVICE uint32_t tanh_halves(uint32_t x) {
  uint32_t y;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace mvit

#endif  // MVIT_EMULATED
