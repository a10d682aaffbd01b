// SPDX-License-Identifier: Apache-2.0
// The threads of a network: they sleep between runs, and wait actively for the next piece of work within one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // While an object of this lives, run_parts (../cpu/parallel.h) on this thread uses the pool's threads, if no other
  // thread has them; else only this one. Results do not depend on it.
  class Use {
   public:
    explicit Use(ThreadPool& pool);
    ~Use();

   private:
    ThreadPool* pool_;
  };

  // Calls body(context, begin, end) for parts of [0, items), `share` long; returns when all are done.
  void run(int64_t items, int64_t share, void (*body)(int64_t, int64_t, void*), void* context);

 private:
  explicit ThreadPool(int threads);
  ~ThreadPool();

  bool is_of_another_process() const;
  void work();
  void take_parts();

  const int process_;  // that made it
  std::vector<std::thread> workers_;
  std::mutex user_;  // held by the thread that uses the pool

  std::mutex mutex_;
  std::condition_variable wake_;
  bool awake_ = false, ends_ = false;  // under mutex_

  // The current piece of work. A worker takes part in it when it sees a new `work_`.
  std::atomic<bool> in_use_{false};
  std::atomic<int64_t> work_{0}, next_{0};
  std::atomic<int> busy_{0};  // workers that are not done with it
  int64_t items_ = 0, share_ = 1;
  void (*body_)(int64_t, int64_t, void*) = nullptr;
  void* context_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace mvit
