// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels run on.
//
// Every operator's kernels, <operator>_kernel.cpp, are compiled once per instruction set and define one table of function
// pointers each time, <operator>_<set>. The operator's front (<operator>.cpp, compiled for the plain architecture) picks
// the table at run time with MVIT_KERNELS_FOR_THIS_CPU(<operator>), or with MVIT_KERNELS_WITH_BF16_PAIRS(<operator>) if its
// kernels have products of bfloat16 pairs. Operators without them are not compiled for a set that has them, and use the
// best one below.
//
// The sets are listed in CMakeLists.txt and nowhere in here. CMake writes instruction_sets.h, which defines
//   MVIT_INSTRUCTION_SETS(X, ...)  X(set, plain_set, vector_bytes, bf16_pairs, supported, ...) for each set in the library,
//                                  best first: plain_set is the best without pairs up to this one, supported asks
//                                  the processor
//   MVIT_KNOWN_INSTRUCTION_SETS    the names of these and of those that the compiler has no flags for, best first
#pragma once

#include "instruction_sets.h"

namespace mvit {

// The best set that this processor and operating system support, or the one that the environment variable
// MVIT_KERNELS_CPU_ISA names, which is read once: its place in MVIT_INSTRUCTION_SETS.
// Throws std::runtime_error when the variable names an unknown set or one that this machine cannot run.
int current_isa();

// Whether that set's kernels have products of bfloat16 pairs. Throws as current_isa.
bool this_cpu_has_bf16_pairs();

// In an operator's header: the tables that its kernels define.
#define MVIT_DECLARE_TABLE_(set, plain_set, vector_bytes, bf16_pairs, supported, Kernels, op) extern const Kernels op##_##set;
#define MVIT_DECLARE_KERNELS(Kernels, op) \
  MVIT_INSTRUCTION_SETS(MVIT_DECLARE_TABLE_, Kernels, op) static_assert(true)

// Use: const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(patch_attention);
#define MVIT_PLAIN_TABLE_(set, plain_set, vector_bytes, bf16_pairs, supported, op) &op##_##plain_set,
#define MVIT_KERNELS_FOR_THIS_CPU(op) MVIT_SELECT_(op, MVIT_PLAIN_TABLE_)

// The same for operators whose kernels are compiled for every set.
#define MVIT_TABLE_WITH_PAIRS_(set, plain_set, vector_bytes, bf16_pairs, supported, op) &op##_##set,
#define MVIT_KERNELS_WITH_BF16_PAIRS(op) MVIT_SELECT_(op, MVIT_TABLE_WITH_PAIRS_)

#define MVIT_SELECT_(op, X)                                                                    \
  (*[] {                                                                                       \
    static constexpr decltype(&op##_portable) best_first[] = {MVIT_INSTRUCTION_SETS(X, op)};   \
    return best_first[::mvit::current_isa()];                                                  \
  }())

}  // namespace mvit
