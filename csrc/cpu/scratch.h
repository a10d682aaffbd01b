// SPDX-License-Identifier: Apache-2.0
// Scratch memory for kernels, kept by each thread across calls.
#pragma once

#include <cstddef>

namespace mvit {

// one_thread: one piece of work on one thread. shared: allocated by the thread that distributes work, for data that all
// threads share meanwhile. The others outlive several of both. call: an operator's packed weights, or images as a network
// reads them. network: its workspace. result: of a network, before it is converted.
enum class ScratchUse { one_thread, shared, call, network, result };

// `bytes` bytes of the calling thread's memory for the lifetime of this object: aligned to a cache line, contents
// undefined. A thread can hold one of each use at a time. Throws if the allocation fails.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes, ScratchUse use = ScratchUse::one_thread);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }

 private:
  ScratchUse use_;
  char* data_;
};

}  // namespace mvit
