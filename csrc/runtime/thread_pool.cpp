// SPDX-License-Identifier: Apache-2.0
// The runtime's threads (see thread_pool.h), and ../cpu/parallel.h with them.
#include "thread_pool.h"

#include <unistd.h>

#include "../cpu/parallel.h"

namespace mvit {

ThreadPool::ThreadPool(int threads) : process_(getpid()), team_(threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::is_of_another_process() const { return getpid() != process_; }

ThreadPool::Pointer ThreadPool::make(int threads) { return Pointer(new ThreadPool(threads)); }

void ThreadPool::Retire::operator()(ThreadPool* pool) const {
  if (!pool->is_of_another_process()) delete pool;
}

ThreadPool::Use::Use(ThreadPool& pool) : pool_(nullptr) {
  if (pool.workers_.empty() || Team::led_here() != nullptr || pool.is_of_another_process() || !pool.user_.try_lock()) return;
  pool_ = &pool;
  lead_.emplace(pool.team_);
  pool.set_awake(true);
}

ThreadPool::Use::~Use() {
  if (pool_ == nullptr) return;
  pool_->set_awake(false);
  lead_.reset();
  pool_->user_.unlock();
}

void ThreadPool::set_awake(bool awake) {
  {
    const std::lock_guard lock(mutex_);
    awake_ = awake;
  }
  if (awake) wake_.notify_all();
}

void ThreadPool::work(int index) {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return awake_ || ends_; });
      if (ends_) return;
    }
    team_.serve(index);
  }
}

int64_t thread_count() {
  const Team* const team = Team::led_here();
  return team == nullptr ? 1 : team->members();
}

void run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (Team* const team = Team::led_here()) return team->run_parts(items, grain, body, context);
  if (items > 0) body(0, items, context);
}

void run_each(int64_t items, void (*body)(int64_t, int64_t, void*), void* context) {
  if (Team* const team = Team::led_here()) return team->run(items, 1, body, context);
  if (items > 0) body(0, items, context);
}

}  // namespace mvit
