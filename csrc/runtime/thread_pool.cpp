// SPDX-License-Identifier: Apache-2.0
// The runtime's threads (see thread_pool.h), and ../cpu/parallel.h with them.
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "../cpu/parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace mvit {
namespace {

thread_local ThreadPool* in_use = nullptr;

void pause() {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done`. Active for about 20 µs, as long as most steps of a network take at most; then the processor is
// offered to whoever needs it, without which more threads than processors would wait for each other.
template <typename Done>
void wait_for(const Done& done) {
  for (int tries = 0; !done(); ++tries)
    if (tries < 1000)
      pause();
    else
      std::this_thread::yield();
}

}  // namespace

ThreadPool::ThreadPool(int threads) : process_(getpid()) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
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
  if (pool.workers_.empty() || in_use != nullptr || pool.is_of_another_process() || !pool.user_.try_lock()) return;
  pool_ = in_use = &pool;
  pool.in_use_ = true;
  {
    const std::lock_guard lock(pool.mutex_);
    pool.awake_ = true;
  }
  pool.wake_.notify_all();
}

ThreadPool::Use::~Use() {
  if (pool_ == nullptr) return;
  in_use = nullptr;
  {
    const std::lock_guard lock(pool_->mutex_);
    pool_->awake_ = false;
  }
  pool_->in_use_ = false;
  pool_->user_.unlock();
}

// One that is still asleep when a piece of work begins takes no part in it: `busy_` counts those that do.
void ThreadPool::work() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return awake_ || ends_; });
      if (ends_) return;
    }
    int64_t seen = 0;
    while (in_use_) {
      wait_for([&] { return work_ != seen || !in_use_; });
      if (!in_use_) break;
      busy_.fetch_add(1);
      seen = work_;
      if (seen % 2 == 1) take_parts();  // odd while there is work
      busy_.fetch_sub(1);
    }
  }
}

void ThreadPool::take_parts() {
  for (;;) {
    const int64_t begin = next_.fetch_add(share_);
    if (begin >= items_) return;
    try {
      body_(begin, std::min(items_, begin + share_), context_);
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
}

void ThreadPool::run(int64_t items, int64_t share, void (*body)(int64_t, int64_t, void*), void* context) {
  items_ = items;
  share_ = share;
  body_ = body;
  context_ = context;
  next_ = 0;
  work_.fetch_add(1);  // odd: workers begin
  take_parts();
  work_.fetch_add(1);  // even: a worker that comes now finds nothing to do
  wait_for([this] { return busy_ == 0; });
  if (error_) {
    const std::exception_ptr error = std::exchange(error_, nullptr);
    std::rethrow_exception(error);
  }
}

int64_t thread_count() { return in_use == nullptr ? 1 : in_use->threads(); }

void run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (items <= 0) return;
  ThreadPool* const pool = in_use;
  const int64_t threads = std::min(thread_count(), (items + grain - 1) / grain);
  if (threads <= 1) return body(0, items, context);
  in_use = nullptr;  // a call inside another is not shared out
  struct Restore {
    ThreadPool* pool;
    ~Restore() { in_use = pool; }
  } const restore{pool};
  pool->run(items, (items + threads - 1) / threads, body, context);
}

}  // namespace mvit
