// SPDX-License-Identifier: Apache-2.0
// Threads, as kernels' callers see them. parallel.cpp has PyTorch's, so that torch.set_num_threads is respected;
// csrc/runtime has its own.
#pragma once

#include <cstdint>

#include "subnormals.h"

namespace mvit {

// How many threads run_parts may use.
int64_t thread_count();

// Calls body(begin, end, context) for parts of [0, items), of `grain` items or more, at most one a thread.
void run_parts(int64_t items, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(begin, end, context) for parts of [0, items) which are so long that each is worth being waited for: a team
// takes one item after another, as each member comes to it.
void run_each(int64_t items, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(context) while PyTorch's threads are a team (team.h) for what it runs. For network.cpp: the runtime's
// networks have threads of their own.
void with_team(void (*body)(void* context), void* context);

template <typename Body>
void run_parts(int64_t items, int64_t grain, const Body& body) {
  run_parts(
      items, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <typename Body>
void run_each(int64_t items, const Body& body) {
  run_each(
      items, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <typename Body>
void with_team(const Body& body) {
  with_team([](void* context) { (*static_cast<const Body*>(context))(); },
            const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) for parts of [0, items). On every thread subnormal numbers are zero inside (subnormals.h). A
// thread gets at least so many items that flops_per_item × items >= 2^18 operations, about 2 µs of one core; for less,
// waking a thread does not pay.
template <typename Body>
void parallel_for(int64_t items, double flops_per_item, const Body& body) {
  constexpr double worth_a_thread = 1 << 18;
  const double grain = flops_per_item > 0 ? worth_a_thread / flops_per_item : 1;
  run_parts(items, grain < 1 ? 1 : static_cast<int64_t>(grain), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    body(begin, end);
  });
}

}  // namespace mvit
