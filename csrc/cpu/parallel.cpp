// SPDX-License-Identifier: Apache-2.0
// PyTorch's threads (see parallel.h).
#include "parallel.h"

#include <exception>

#include "team.h"
#include "tensors.h"

namespace mvit {

int64_t thread_count() {
  const Team* const team = Team::led_here();
  return team != nullptr ? team->members() : torch::stable::get_num_threads();
}

void run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (Team* const team = Team::led_here()) return team->run_parts(items, grain, body, context);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void run_each(int64_t items, void (*body)(int64_t, int64_t, void*), void* context) {
  if (Team* const team = Team::led_here()) return team->run(items, 1, body, context);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// One parallel region, in which the thread with the first index leads. Where there is none, inside of another or with
// one thread, the only call has all indices, and the team one member that comes.
void with_team(void (*body)(void*), void* context) {
  const int64_t threads = thread_count();
  if (threads <= 1) return body(context);
  Team team(threads);
  std::exception_ptr error;  // not through PyTorch's frames, which would tell only its text
  torch::stable::parallel_for(0, threads, 1, [&](int64_t index, int64_t) {
    if (index > 0) return team.serve(index);
    const Team::Lead lead(team);
    try {
      body(context);
    } catch (...) {
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace mvit
