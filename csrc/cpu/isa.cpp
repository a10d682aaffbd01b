// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mvit {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  switch (isa) {
    case Isa::avx512bf16:
      return kHaveAvx512Bf16 && __builtin_cpu_supports("avx512bf16") && supported(Isa::avx512);
    case Isa::avx512:
      return kHaveAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && supported(Isa::avx2);
    case Isa::avx2:
      return kHaveAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::portable:
      return true;
  }
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const struct {
    const char* name;
    Isa isa;
  } best_first[] = {{"avx512bf16", Isa::avx512bf16},
                    {"avx512", Isa::avx512},
                    {"avx2", Isa::avx2},
                    {"portable", Isa::portable}};
  const char* wanted = std::getenv("MVIT_KERNELS_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const auto& candidate : best_first) {
    if (!any && std::string(candidate.name) != wanted) continue;
    if (supported(candidate.isa)) return candidate.isa;
    if (!any)
      throw std::runtime_error(std::string("MVIT_KERNELS_CPU_ISA is '") + wanted +
                               "', which this processor, or the compiler that built the library, does not support; "
                               "unset it, or choose a lower one of avx512bf16, avx512, avx2 and portable");
  }
  throw std::runtime_error(std::string("MVIT_KERNELS_CPU_ISA is '") + wanted +
                           "'; choose one of avx512bf16, avx512, avx2 and portable, or unset it for the best that is supported");
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose();  // a throwing initialiser runs again at the next call, and throws again
  return isa;
}

}  // namespace mvit

// For `mvit-kernels info` and the tests, by ctypes: the set in use, or the empty string where the variable is wrong.
extern "C" __attribute__((visibility("default"))) const char* mvit_kernels_cpu_isa() noexcept {
  try {
    switch (mvit::current_isa()) {
      case mvit::Isa::avx512bf16:
        return "avx512bf16";
      case mvit::Isa::avx512:
        return "avx512";
      case mvit::Isa::avx2:
        return "avx2";
      case mvit::Isa::portable:
        return "portable";
    }
  } catch (const std::exception&) {
  }
  return "";
}
