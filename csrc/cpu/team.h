// SPDX-License-Identifier: Apache-2.0
// A team of threads that takes parts of one piece of work after another, without sleeping in between. Whose threads they
// are, and how they came to be awake, is not its business: PyTorch's (parallel.cpp) or a file's own (../runtime).
//
// A parallel region of OpenMP waits for every thread before it ends, so the first one after a pause waits until they are
// awake: 50 to 100 µs in a virtual machine, as long as several steps of a network take together. In a team the leading
// thread begins at once, and does the part of whoever is not there yet.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace mvit {

class Team {
 public:
  explicit Team(int64_t members) : members_(members) {}  // the leading thread included
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t members() const { return members_; }

  // The calling thread leads the team while this lives, and the team ends with it; another may begin then.
  class Lead {
   public:
    explicit Lead(Team& team);
    ~Lead();
    Lead(const Lead&) = delete;
    Lead& operator=(const Lead&) = delete;

   private:
    Team& team_;
  };

  // The team that the calling thread leads, or null: also inside of a part, since work inside of it is not shared out.
  static Team* led_here();

  // Takes parts of what the leading thread runs, as member `index` (1 and up), until the team ends. May come before it
  // leads.
  void serve(int64_t index);

  // On the leading thread: calls body(begin, end, context) for parts of [0, items), of `share` items or more; returns when
  // all are done, and throws what a part threw. A part is always the same member's first choice, so that step after step
  // finds in a core's cache what the one before left there.
  void run(int64_t items, int64_t share, void (*body)(int64_t, int64_t, void*), void* context);

  // The same in at most one part a member, of `grain` items or more.
  void run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

 private:
  void take_parts(int64_t index, int64_t work);

  static constexpr int64_t kMostParts = 256;

  const int64_t members_;
  std::atomic<bool> ended_{false};

  // The current piece of work: `work_` is odd while there is one. A member takes part when it sees a new one.
  std::atomic<int64_t> work_{0};
  std::atomic<int64_t> busy_{0};  // members that are not done with it
  std::array<std::atomic<int64_t>, kMostParts> taken_{};  // the last piece of work of which this part was taken
  int64_t items_ = 0, share_ = 1, parts_ = 0;
  void (*body_)(int64_t, int64_t, void*) = nullptr;
  void* context_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace mvit
