// SPDX-License-Identifier: Apache-2.0
// Per-thread scratch memory, reused across calls and released when it is oversized (see scratch.h).
#include "scratch.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "errors.h"
#include "huge_pages.h"

namespace mvit {
namespace {

// Memory is kept because fresh pages cost up to 0.6 ms per megabyte (in a virtual machine), more than the kernels of a
// small map take. It is released because otherwise a thread that once processed a 3072² image would keep 234 MB
// forever, where a 224² image takes 2 MB. A block of more than kUsual bytes is freed when kPatience consecutive pieces
// of work, of any use, needed less than a quarter of it. An image is 10 to 40 pieces of work, so a few ordinary images
// release the memory; a stream of large images needs it more often than that and never faults a page twice; and an
// occasional large image spends a few hundredths of its time on page faults.
constexpr std::size_t kUsual = std::size_t{8} << 20, kMuch = 4;
constexpr int64_t kPatience = 256;

std::atomic<int64_t> kept{0};  // in bytes, over all threads

struct Block {
  char* data = nullptr;
  std::size_t size = 0;
  int64_t needed = 0;  // the last piece of work that needed more than a quarter of it
  bool in_use = false;

  ~Block() { free(); }

  void free() {
    std::free(data);
    kept -= static_cast<int64_t>(size);
    data = nullptr;
    size = 0;
  }

  void allocate(std::size_t bytes) {
    free();
    void* memory = nullptr;
    std::size_t alignment = 64, room = bytes;
#ifndef __SANITIZE_ADDRESS__
    if (bytes >= kHugePage / 2) {  // from there on a huge page is not mostly empty
      alignment = kHugePage;
      room = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    }
#endif
    // Not operator new, which aborts under AddressSanitizer instead of throwing.
    MVIT_CHECK(posix_memalign(&memory, alignment, room) == 0, "mvit_kernels: there is no memory for ", bytes,
                    " bytes that this call works in");
    data = static_cast<char*>(memory);
    ask_for_huge_pages(data, room);
    size = bytes;
    kept += static_cast<int64_t>(size);
  }
};

struct Blocks {
  Block of_use[5];
  int64_t pieces = 0;  // pieces of work so far
};

Blocks& of_this_thread() {
  thread_local Blocks blocks;
  return blocks;
}

}  // namespace

Scratch::Scratch(std::size_t bytes, ScratchUse use) : use_(use) {
  Blocks& mine = of_this_thread();
  const int64_t now = ++mine.pieces;
  Block& block = mine.of_use[static_cast<int>(use)];
#ifdef __SANITIZE_ADDRESS__
  block.allocate(bytes);  // a new allocation of the exact size, so that AddressSanitizer sees any overrun
#endif
  if (bytes > block.size / kMuch) block.needed = now;
  for (Block& other : mine.of_use)
    if (other.size > kUsual && now - other.needed > kPatience && !other.in_use) other.free();
  if (block.size < bytes) block.allocate(bytes);
  block.in_use = true;
  data_ = block.data;
}

Scratch::~Scratch() { of_this_thread().of_use[static_cast<int>(use_)].in_use = false; }

}  // namespace mvit

// For the tests (ctypes): the bytes that all threads hold at the moment.
extern "C" __attribute__((visibility("default"))) int64_t mvit_kernels_cpu_kept_bytes() noexcept { return mvit::kept; }
