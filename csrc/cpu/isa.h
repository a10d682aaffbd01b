// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels run on.
//
// Every operator's kernels are compiled once per instruction set, in files named <operator>_<isa>.cpp, and each such
// file defines one table of function pointers, <operator>_<isa>. The operator's front (<operator>.cpp, compiled for the
// plain architecture) picks the table at run time with MVIT_KERNELS_FOR_THIS_CPU(<operator>). avx512bf16 is avx512 with
// products of bfloat16 pairs; operators that have none of those have no such file, and use that of avx512.
#pragma once

namespace mvit {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The best set that this processor and operating system support, or the one that the environment variable
// MVIT_KERNELS_CPU_ISA names ("avx512bf16", "avx512", "avx2", "portable"), which is read once.
// Throws std::runtime_error when it names an unknown set or one that this machine cannot run.
Isa current_isa();

// setup.py defines MVIT_HAVE_<ISA> where the compiler knows the set's flags and so its files are in the library.
#if defined(MVIT_HAVE_AVX2)
constexpr bool kHaveAvx2 = true;
#define MVIT_AVX2_KERNELS(op) &op##_avx2
#else
constexpr bool kHaveAvx2 = false;
#define MVIT_AVX2_KERNELS(op) nullptr
#endif
#if defined(MVIT_HAVE_AVX512)
constexpr bool kHaveAvx512 = true;
#define MVIT_AVX512_KERNELS(op) &op##_avx512
#else
constexpr bool kHaveAvx512 = false;
#define MVIT_AVX512_KERNELS(op) nullptr
#endif

#if defined(MVIT_HAVE_AVX512BF16)
constexpr bool kHaveAvx512Bf16 = true;
#define MVIT_AVX512BF16_KERNELS(op) &op##_avx512bf16
#else
constexpr bool kHaveAvx512Bf16 = false;
#define MVIT_AVX512BF16_KERNELS(op) nullptr
#endif

template <typename Kernels>
const Kernels& select_isa(const Kernels* portable, const Kernels* avx2, const Kernels* avx512,
                          const Kernels* avx512bf16) {
  switch (current_isa()) {
    case Isa::avx512bf16:
      return *avx512bf16;
    case Isa::avx512:
      return *avx512;
    case Isa::avx2:
      return *avx2;
    case Isa::portable:
      break;
  }
  return *portable;
}

// Use: const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(patch_attention);
#define MVIT_KERNELS_FOR_THIS_CPU(op)                                                                        \
  ::mvit::select_isa<decltype(op##_portable)>(&op##_portable, MVIT_AVX2_KERNELS(op), MVIT_AVX512_KERNELS(op), \
                                              MVIT_AVX512_KERNELS(op))

// The same for operators with products of bfloat16 pairs, in files <operator>_avx512bf16.cpp.
#define MVIT_KERNELS_WITH_BF16_PAIRS(op)                                                                     \
  ::mvit::select_isa<decltype(op##_portable)>(&op##_portable, MVIT_AVX2_KERNELS(op), MVIT_AVX512_KERNELS(op), \
                                              MVIT_AVX512BF16_KERNELS(op))

}  // namespace mvit
