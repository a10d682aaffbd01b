// SPDX-License-Identifier: Apache-2.0
// The threads of a network: they sleep between runs, and wait actively for the next piece of work within one.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "../cpu/team.h"

namespace mvit {

class ThreadPool {
 public:
  // A fork has no threads but the one that made it, and what its other threads held or waited for stays so for ever:
  // there a pool is not used, nor its memory freed.
  struct Retire {
    void operator()(ThreadPool* pool) const;
  };
  using Pointer = std::unique_ptr<ThreadPool, Retire>;

  static Pointer make(int threads);  // the calling one included
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(team_.members()); }

  // While an object of this lives, run_parts (../cpu/parallel.h) on this thread uses the pool's threads, if no other
  // thread has them; else only this one. Results do not depend on it.
  class Use {
   public:
    explicit Use(ThreadPool& pool);
    ~Use();

   private:
    ThreadPool* pool_;
    std::optional<Team::Lead> lead_;
  };

 private:
  explicit ThreadPool(int threads);
  ~ThreadPool();

  bool is_of_another_process() const;
  void set_awake(bool awake);
  void work(int index);

  const int process_;  // that made it
  Team team_;
  std::vector<std::thread> workers_;
  std::mutex user_;  // held by the thread that uses the pool

  std::mutex mutex_;
  std::condition_variable wake_;
  bool awake_ = false, ends_ = false;  // under mutex_
};

}  // namespace mvit
