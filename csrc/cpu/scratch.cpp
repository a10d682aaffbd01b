// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "tensors.h"

namespace mvit {
namespace {

// Kept, because fresh pages cost up to 0.6 ms a megabyte (in a virtual machine), and a small map's kernels less than
// that. Given back, because a thread once asked for a 3072² image would keep 234 MB for good, where 224² takes 2: memory
// of more than kUsual bytes goes when kPatience pieces of work in a row, of any use, found less than a quarter of it
// enough. An image is 10 to 40 pieces of work, so a few usual images give it back; a stream of large ones asks for it
// more often than that and never faults a page twice; and one large image now and then pays for its pages a few
// hundredths of its own time.
constexpr std::size_t kUsual = std::size_t{8} << 20, kMuch = 4;
constexpr int64_t kPatience = 256;

std::atomic<int64_t> kept{0};  // bytes, of all threads

struct Block {
  char* data = nullptr;
  std::size_t size = 0;
  int64_t needed = 0;  // when the better part of it last was
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
    // Not operator new, which ends a process under AddressSanitizer where it should throw.
    STD_TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "mvit_kernels: there is no memory for ", bytes,
                    " bytes that this call works in");
    data = static_cast<char*>(memory);
    size = bytes;
    kept += static_cast<int64_t>(size);
  }
};

struct Blocks {
  Block of_use[3];
  int64_t pieces = 0;  // of work so far
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
  block.allocate(bytes);  // new each time, and it ends where the caller said, so that a step beyond is seen
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

// For the tests, by ctypes: bytes that all threads keep now.
extern "C" __attribute__((visibility("default"))) int64_t mvit_kernels_cpu_kept_bytes() noexcept { return mvit::kept; }
