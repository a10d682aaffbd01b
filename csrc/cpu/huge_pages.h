// SPDX-License-Identifier: Apache-2.0
// Huge pages for what a network reads and writes in every call: its weights and its maps. A processor that has done
// something else meanwhile has forgotten where its pages are, and in a virtual machine each is looked up through two tables:
// 3,300 pages of 4 KB for S in bfloat16, or a dozen of 2 MB.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mvit {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Asks the system for them, where they lie whole in `memory`, which nobody has written yet. A system that gives none is no
// error: everything works in small pages.
inline void ask_for_huge_pages(char* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace mvit
