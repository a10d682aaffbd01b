// SPDX-License-Identifier: Apache-2.0
// Subnormal numbers count as zero while kernels run.
//
// An instruction that reads or makes a subnormal number takes a microcode assist on Intel processors: about 150 cycles
// instead of one. Ordinary large activations meet it, since SiLU's reciprocal of 1 + e^87 is subnormal: an inverted
// residual takes 4 to 6 times as long when its input is 300 times larger (docs/kernels/numerics.md).
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace mvit {

// For the lifetime of this object the calling thread reads subnormal operands and rounds subnormal results to zero. The
// destructor, hence also an exception, restores the whole control register, flags included. The setting belongs to a
// thread: each one that runs a kernel needs its own object (`parallel_for` in parallel.h makes it). Only code behind a
// call that the compiler cannot see into is affected for certain, as kernels are: they are called by pointer.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(read()) { write(before_ | kFlush); }
  ~FlushSubnormals() { write(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE__)
  using Register = uint32_t;
  static constexpr Register kFlush = 0x8040;  // MXCSR: FTZ, results; DAZ, operands
  static Register read() { return _mm_getcsr(); }
  static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kFlush = uint64_t{1} << 24;  // FPCR.FZ: results and operands of float32 and float64
  static Register read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value)::"memory");
    return value;
  }
  static void write(Register value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
  using Register = int;
  static constexpr Register kFlush = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  const Register before_;
};

}  // namespace mvit
