// SPDX-License-Identifier: Apache-2.0
// Run-time selection of the instruction set: the best one that the CPU and the operating system support, or the one
// named by MVIT_KERNELS_CPU_ISA. Also exports what Python asks about it.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mvit {
namespace {

struct InstructionSet {
  const char* name;
  const char* plain_name;  // of the best set without pairs, this one or below
  int vector_bytes;
  Bf16Products bf16_products;
  bool (*supported)();
  bool (*preferred)();  // whether it is faster than the sets below it
};

// Whether vdpbf16ps does twice the work of a float32 multiply-add in its time, as on AMD. Intel's issue one every two
// cycles (Sapphire Rapids: 121 against 241 GFLOP/s a core), which is slower than converting and multiplying in float32.
[[maybe_unused]] bool multiplies_pairs_fast() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Whether this process may use matrix tiles for bfloat16: the processor has AMX-TILE and AMX-BF16 with eight tiles of 1
// KB, the system saves them (XCR0 bits 17 and 18), and grants their use. Without the last the first tile instruction
// would be an illegal one. A grant holds for all threads of the process, and for its children.
[[maybe_unused]] bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx >> 27 & 1) == 0) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 22 & 1) == 0 || (edx >> 24 & 1) == 0) return false;
  if (!__get_cpuid_count(0x1d, 1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned tile_bytes = eax >> 16, row_bytes = ebx & 0xffff, tiles = ebx >> 16, rows = ecx & 0xffff;
  if (tile_bytes != 1024 || row_bytes != 64 || tiles < 8 || rows < 16) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports also checks that the operating system saves the registers.
#define MVIT_ENTRY(set, plain_set, vector_bytes, products, supported, preferred)               \
  {#set, #plain_set, vector_bytes, Bf16Products::products, [] { return static_cast<bool>(supported); }, \
   [] { return static_cast<bool>(preferred); }},
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
    if ((wanted.empty() ? kBestFirst[i].preferred() : wanted == kBestFirst[i].name) && kBestFirst[i].supported())
      return i;
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

Bf16Products this_cpus_bf16_products() { return kBestFirst[current_isa()].bf16_products; }

namespace {
const InstructionSet& in_use() noexcept {
  static constexpr InstructionSet none{"", "", 0, Bf16Products::none, nullptr, nullptr};
  try {
    return kBestFirst[current_isa()];
  } catch (const std::exception&) {
    return none;
  }
}
}  // namespace

const char* instruction_set_name() noexcept { return in_use().name; }

}  // namespace mvit

// For Python (ctypes): name of the instruction set in use, of the one that serves what it has no kernels for, its vector
// width in bytes and its Bf16Products. Empty strings and zeros if MVIT_KERNELS_CPU_ISA is invalid.
#define MVIT_EXPORT extern "C" __attribute__((visibility("default")))

MVIT_EXPORT const char* mvit_kernels_cpu_isa() noexcept { return mvit::instruction_set_name(); }
MVIT_EXPORT const char* mvit_kernels_cpu_plain_isa() noexcept { return mvit::in_use().plain_name; }
MVIT_EXPORT int mvit_kernels_cpu_vector_bytes() noexcept { return mvit::in_use().vector_bytes; }
MVIT_EXPORT int mvit_kernels_cpu_bf16_products() noexcept { return static_cast<int>(mvit::in_use().bf16_products); }
