// SPDX-License-Identifier: Apache-2.0
// Run-time selection of the instruction set: the best one that the CPU and the operating system support, or the one
// named by MVIT_KERNELS_CPU_ISA. Also exports what Python asks about it.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mvit {
namespace {

struct InstructionSet {
  const char* name;
  int vector_bytes;
  bool bf16_pairs;
  bool (*supported)();
};

// __builtin_cpu_supports also checks that the operating system saves the registers.
#define MVIT_ENTRY(set, plain_set, vector_bytes, bf16_pairs, supported) \
  {#set, vector_bytes, bf16_pairs, [] { return static_cast<bool>(supported); }},
constexpr InstructionSet kBestFirst[] = {MVIT_INSTRUCTION_SETS(MVIT_ENTRY)};
#undef MVIT_ENTRY
constexpr int kCount = sizeof kBestFirst / sizeof *kBestFirst;

constexpr const char* kKnown[] = {MVIT_KNOWN_INSTRUCTION_SETS};
constexpr int kKnownCount = sizeof kKnown / sizeof *kKnown;

std::string all_known() {  // "avx2 and portable"
  std::string names = kKnown[0];
  for (int i = 1; i < kKnownCount; ++i) names += std::string(i + 1 < kKnownCount ? ", " : " and ") + kKnown[i];
  return names;
}

int choose() {
  const char* variable = std::getenv("MVIT_KERNELS_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (int i = 0; i < kCount; ++i)  // the last entry, portable, is always supported
    if ((wanted.empty() || wanted == kBestFirst[i].name) && kBestFirst[i].supported()) return i;
  for (const char* name : kKnown)
    if (wanted == name)
      throw std::runtime_error("MVIT_KERNELS_CPU_ISA is '" + wanted +
                               "', which this processor, or the compiler that built the library, does not support; "
                               "unset it, or choose a lower one of " + all_known());
  throw std::runtime_error("MVIT_KERNELS_CPU_ISA is '" + wanted + "'; choose one of " + all_known() +
                           ", or unset it for the best that is supported");
}

}  // namespace

int current_isa() {
  static const int isa = choose();  // if the initialiser throws, the next call runs it again
  return isa;
}

bool this_cpu_has_bf16_pairs() { return kBestFirst[current_isa()].bf16_pairs; }

}  // namespace mvit

// For Python (ctypes): name of the instruction set in use, its vector width in bytes and whether it has products of
// bfloat16 pairs. An empty string and zeros if MVIT_KERNELS_CPU_ISA is invalid.
#define MVIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
const mvit::InstructionSet& in_use() noexcept {
  static constexpr mvit::InstructionSet none{"", 0, false, nullptr};
  try {
    return mvit::kBestFirst[mvit::current_isa()];
  } catch (const std::exception&) {
    return none;
  }
}
}  // namespace

MVIT_EXPORT const char* mvit_kernels_cpu_isa() noexcept { return in_use().name; }
MVIT_EXPORT int mvit_kernels_cpu_vector_bytes() noexcept { return in_use().vector_bytes; }
MVIT_EXPORT int mvit_kernels_cpu_bf16_pairs() noexcept { return in_use().bf16_pairs; }
