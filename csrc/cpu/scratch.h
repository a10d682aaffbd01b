// SPDX-License-Identifier: Apache-2.0
// The memory that kernels work in, which a thread keeps from call to call.
#pragma once

#include <cstddef>

namespace mvit {

// one_thread is for one piece of work on one thread; shared is for the thread that gives out work, for what the threads
// share meanwhile; and a network's workspace lasts over many of either.
enum class ScratchUse { one_thread, shared, network };

// So much memory of the calling thread for as long as this lives: aligned to a cache line, its contents undefined. A
// thread has one of each use at a time. Throws where there is no such memory.
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
