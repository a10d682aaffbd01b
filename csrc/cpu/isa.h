// SPDX-License-Identifier: Apache-2.0
// Dispatch on the instruction set at run time.
//
// Every operator's kernels, <operator>_kernel.cpp, are compiled once per instruction set; each compilation defines one
// dispatch table of function pointers, <operator>_<set>. A set with products of bfloat16 pairs has kernels for these
// alone, and is used with the best set below it that has none. The operator's front end, <operator>.cpp (argument checks,
// memory, threads; compiled for the baseline architecture), picks a table with MVIT_KERNELS_FOR_THIS_CPU(<operator>), or
// with MVIT_PAIR_KERNELS_FOR_THIS_CPU(<operator>) for bfloat16 pairs.
//
// CMakeLists.txt holds the only list of the sets. From it CMake writes instruction_sets.h, which defines
//   MVIT_INSTRUCTION_SETS(X, ...)  X(set, plain_set, vector_bytes, products, supported, preferred, ...) for each compiled
//                                  set, best first. plain_set: the best set without pairs, this one or below.
//                                  products: a Bf16Products. supported, preferred: expressions that ask the CPU.
//   MVIT_KNOWN_INSTRUCTION_SETS    the names of all sets, also those for which the compiler has no flags; best first
#pragma once

#include "instruction_sets.h"

namespace mvit {

// Index in MVIT_INSTRUCTION_SETS of the set in use: the best that this CPU and operating system support, or the one
// that the environment variable MVIT_KERNELS_CPU_ISA names. The variable is read once. Throws std::runtime_error if it
// names an unknown set or one that this machine cannot run.
int current_isa();

// Its name, of those in CMakeLists.txt; "" where current_isa throws.
const char* instruction_set_name() noexcept;

// What a set has for products of bfloat16 pairs: nothing, vectors, or matrix tiles.
enum class Bf16Products { none, pairs, tiles };

// Of the set in use. Throws like current_isa.
Bf16Products this_cpus_bf16_products();
inline bool this_cpu_has_bf16_pairs() { return this_cpus_bf16_products() != Bf16Products::none; }

// For an operator's header: declares the dispatch tables that its kernels define.
#define MVIT_DECLARE_TABLE_(set, plain_set, vector_bytes, products, supported, preferred, Kernels, op) \
  extern const Kernels op##_##set;
#define MVIT_DECLARE_KERNELS(Kernels, op) \
  MVIT_INSTRUCTION_SETS(MVIT_DECLARE_TABLE_, Kernels, op) static_assert(true)

// Use: const auto& kernels = MVIT_KERNELS_FOR_THIS_CPU(patch_attention);
#define MVIT_PLAIN_TABLE_(set, plain_set, vector_bytes, products, supported, preferred, op) &op##_##plain_set,
#define MVIT_KERNELS_FOR_THIS_CPU(op) MVIT_SELECT_(op, MVIT_PLAIN_TABLE_)

// The table with the kernels of bfloat16 pairs; on a CPU without any, the table above, where they are null.
#define MVIT_TABLE_WITH_PAIRS_(set, plain_set, vector_bytes, products, supported, preferred, op) &op##_##set,
#define MVIT_PAIR_KERNELS_FOR_THIS_CPU(op) MVIT_SELECT_(op, MVIT_TABLE_WITH_PAIRS_)

// One or the other: const auto& kernels = MVIT_KERNELS_FOR(transformer, pairs);
#define MVIT_KERNELS_FOR(op, pairs) ((pairs) ? MVIT_PAIR_KERNELS_FOR_THIS_CPU(op) : MVIT_KERNELS_FOR_THIS_CPU(op))

#define MVIT_SELECT_(op, X)                                                                    \
  (*[] {                                                                                       \
    static constexpr decltype(&op##_portable) best_first[] = {MVIT_INSTRUCTION_SETS(X, op)};   \
    return best_first[::mvit::current_isa()];                                                  \
  }())

}  // namespace mvit
