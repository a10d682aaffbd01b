// SPDX-License-Identifier: Apache-2.0
#include "team.h"

#include <algorithm>
#include <thread>
#include <utility>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace mvit {
namespace {

thread_local Team* led = nullptr;

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

Team::Lead::Lead(Team& team) : team_(team) {
  led = &team;
  team.ended_ = false;
}

Team::Lead::~Lead() {
  team_.ended_ = true;
  led = nullptr;
}

Team* Team::led_here() { return led; }

// One that comes when a piece of work is done takes no part in it: `busy_` counts those that do.
void Team::serve(int64_t index) {
  for (int64_t seen = 0; !ended_;) {
    wait_for([&] { return work_ != seen || ended_; });
    busy_.fetch_add(1);
    seen = work_;
    if (seen % 2 == 1) take_parts(index, seen);
    busy_.fetch_sub(1);
  }
}

// First the parts that are this member's choice, then those of members that have not come to theirs.
void Team::take_parts(int64_t index, int64_t work) {
  for (int64_t other = 0; other < members_; ++other)
    for (int64_t part = (index + other) % members_; part < parts_; part += members_) {
      std::atomic<int64_t>& taken = taken_[static_cast<std::size_t>(part)];
      int64_t before = taken;
      if (before == work || !taken.compare_exchange_strong(before, work)) continue;
      try {
        body_(part * share_, std::min(items_, (part + 1) * share_), context_);
      } catch (...) {
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
}

void Team::run(int64_t items, int64_t share, void (*body)(int64_t, int64_t, void*), void* context) {
  items_ = items;
  share_ = std::max(share, (items + kMostParts - 1) / kMostParts);
  parts_ = (items + share_ - 1) / share_;
  body_ = body;
  context_ = context;
  Team* const leading = std::exchange(led, nullptr);
  const int64_t work = work_.fetch_add(1) + 1;  // odd: members begin
  take_parts(0, work);
  work_.fetch_add(1);  // even: a member that comes now finds nothing to do
  wait_for([this] { return busy_ == 0; });
  led = leading;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t parts = std::min(members_, (items + grain - 1) / grain);
  if (parts > 1) return run(items, (items + parts - 1) / parts, body, context);
  if (items > 0) body(0, items, context);
}

}  // namespace mvit
