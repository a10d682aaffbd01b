// SPDX-License-Identifier: Apache-2.0
// Emulates thread blocks on the CPU: one fibre per thread, a thread schedule drawn from a seed, and shadow memory for
// shared and global memory (shadow.h) that records for each access whether it is ordered after the other threads'.
//
// A fault (race, deadlock, out-of-range access, …) ends the launch immediately and is described by its result; nothing
// hangs.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "shadow.h"

namespace mvit::emulation {

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>((next() >> 32) * limit >> 32); }
};

// ------------------------------------------------------------------------------------------------------- the machine

enum class Kind { none, sync_threads, sync_warp, shuffle, any_lane, load_matrices, mma, warp_index };

inline const char* name(Kind kind) {
  const char* names[] = {"nothing",  "sync_threads",  "sync_warp", "shuffle",
                         "any_lane", "load_matrices", "mma",       "warp_index"};
  return names[static_cast<int>(kind)];
}

struct Copy {
  uint32_t to, bytes;
  const void* from;  // null: zeros
  Where where;
};

struct Thread {
  ucontext_t context;  // to start the fibre
  jmp_buf state;       // to resume it; swapcontext would cost two system calls
  bool entered = false, finished = false;
  Kind waits_for = Kind::none;
  Where waits_at;
  std::vector<Copy> copies;  // not committed yet
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t ready = 0, arrived = 0;  // masks of lanes
  Kind kind = Kind::none;           // the collective that the `arrived` lanes are at
  Where where;
  int parameter = 0;  // of the collective; the same in all lanes
  uint32_t operands[32][10], results[32][4];
  uint32_t epoch = 0;
};

class Machine {
 public:
  static constexpr int kWarp = 32, kMostThreads = 1024;
  static constexpr std::size_t kStack = 256 << 10;

  Machine() : stacks_(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}

  // ---- a launch

  std::string launch(uint64_t seed, int64_t blocks_x, int blocks_y, int threads, uint32_t shared_bytes,
                     std::function<void()> kernel) {
    if (threads <= 0 || threads % kWarp || threads > kMostThreads)
      return "a block of " + std::to_string(threads) + " threads is not one of whole warps, or too large";
    random_.state = seed;
    kernel_ = std::move(kernel);
    fault_.clear();
    // Schedules range from thoroughly interleaved warps to one warp running ahead as far as it can.
    const uint32_t patience[] = {0, 50, 90, 100};
    patience_ = patience[random_.below(4)];
    std::vector<int64_t> order(static_cast<std::size_t>(blocks_x * blocks_y));
    for (std::size_t i = 0; i < order.size(); ++i) {  // shuffle the order of blocks
      const std::size_t other = random_.below(static_cast<uint32_t>(i + 1));
      order[i] = order[other];
      order[other] = static_cast<int64_t>(i);
    }
    for (const int64_t block : order) {
      block_x = block % blocks_x;
      block_y = static_cast<int>(block / blocks_x);
      block_ = block;
      run_block(threads, shared_bytes);
      if (!fault_.empty()) {
        fault_ = "block (" + std::to_string(block_x) + ", " + std::to_string(block_y) + "): " + fault_;
        break;
      }
    }
    for (Buffer& buffer : buffers) buffer.cells.assign(buffer.cells.size(), Cell{});
    return fault_;
  }

  int64_t block_x = 0;
  int block_y = 0;
  int64_t matrix_conflicts = 0;
  int thread() const { return current_; }
  int lane() const { return current_ % kWarp; }

  // ---- what threads do

  [[noreturn]] void fault(const std::string& message) {
    fault_ = message;
    _longjmp(scheduler_, 1);
  }

  void sync_threads(const Where& where) {
    if (at_barrier_ && !same(barrier_, where))
      fault("divergence: threads wait at sync_threads both of " + text(barrier_) + " and of " + text(where));
    barrier_ = where;
    if (++at_barrier_ < threads_.size()) return wait(Kind::sync_threads, where);
    at_barrier_ = 0;
    ++block_epoch_;
    for (Warp& warp : warps_) warp.ready = ~0u;
    warps_[static_cast<std::size_t>(current_ / kWarp)].ready &= ~(1u << lane());  // the current lane keeps running
  }

  // Deposits the lane's operands and waits. The last lane to arrive calls `perform(warp)`, which computes the results
  // of all lanes.
  template <int OPERANDS, int RESULTS, typename Perform>
  void collective(Kind kind, int parameter, const Where& where, const uint32_t (&operands)[OPERANDS],
                  uint32_t (&results)[RESULTS], const Perform& perform) {
    Warp& warp = warps_[static_cast<std::size_t>(current_ / kWarp)];
    if (warp.arrived && (warp.kind != kind || warp.parameter != parameter || !same(warp.where, where)))
      fault("divergence: lanes of warp " + std::to_string(current_ / kWarp) + " are at " + name(warp.kind) + " of " +
            text(warp.where) + ", and lane " + std::to_string(lane()) + " at " + name(kind) + " of " + text(where));
    warp.kind = kind;
    warp.parameter = parameter;
    warp.where = where;
    std::memcpy(warp.operands[lane()], operands, sizeof operands);
    warp.arrived |= 1u << lane();
    if (warp.arrived != ~0u) {
      wait(kind, where);
    } else {
      warp.arrived = 0;
      perform(warp);
      warp.ready = ~(1u << lane());
    }
    std::memcpy(results, warp.results[lane()], sizeof results);
  }

  // ---- shared memory

  // `value`: what is about to be written, if several threads may write it by one instruction.
  unsigned char* shared(Access access, uint32_t at, uint32_t bytes, const Where& where, bool whole_warp = false,
                        const void* value = nullptr) {
    check_shared(at, bytes, where);
    Moment now = moment(where);
    if (whole_warp) now.thread = Moment::kWholeWarp;
    const Repeats repeats = repeating(&shared_[at], value, bytes);
    for (uint32_t cell = at / kCell; cell < (at + bytes) / kCell; ++cell) {
      const std::string wrong = touch(cells_[cell], access, now, true, repeats);
      if (!wrong.empty()) fault("shared byte " + std::to_string(kCell * cell) + " " + wrong);
    }
    return shared_.data() + at;
  }

  void copy(uint32_t to, const void* from, uint32_t bytes, bool valid, const Where& where) {
    if (valid) from = global(Access::read, from, bytes, where);
    std::memset(shared(Access::write, to, bytes, where), 0xff, bytes);  // NaN in every format
    for (uint32_t cell = to / kCell; cell < (to + bytes) / kCell; ++cell) cells_[cell].in_flight = true;
    me().copies.push_back({to, bytes, valid ? from : nullptr, where});
  }
  void commit_copies() {
    me().groups.push_back(std::move(me().copies));
    me().copies.clear();
  }
  void wait_copies(std::size_t later) {
    for (; me().groups.size() > later; me().groups.pop_front())
      for (const Copy& copy : me().groups.front()) {
        const Moment now = moment(copy.where);
        for (uint32_t cell = copy.to / kCell; cell < (copy.to + copy.bytes) / kCell; ++cell) {
          cells_[cell].in_flight = false;
          cells_[cell].write = now;
        }
        if (copy.from)
          std::memcpy(&shared_[copy.to], copy.from, copy.bytes);
        else
          std::memset(&shared_[copy.to], 0, copy.bytes);
      }
  }

  // ---- global memory

  std::vector<Buffer> buffers;  // all that a kernel may access; if empty, it may access anything

  // Where the bytes lie. `value` as in `shared`.
  void* global(Access access, const void* at, uint32_t bytes, const Where& where, const void* value = nullptr) {
    const auto begin = reinterpret_cast<uintptr_t>(at), end = begin + bytes;
    const char* verb = access == Access::read ? "read" : "write";
    if (begin % bytes) fault(at_global(begin, verb, bytes, where) + " is not aligned");
    if (buffers.empty()) return const_cast<void*>(at);
    for (Buffer& buffer : buffers) {
      if (begin < buffer.begin || end > buffer.end) continue;
      if (access == Access::write && !buffer.writable)
        fault(at_global(begin, verb, bytes, where) + " is in a buffer that is only read");
      auto* host = reinterpret_cast<void*>(buffer.host + (begin - buffer.begin));
      const Repeats repeats = repeating(host, value, bytes);
      for (uintptr_t b = begin; buffer.writable && b < end; b += kCell) {
        Cell& cell = buffer.cells[(b - buffer.begin) / kCell];
        const std::string wrong = touch(cell, access, moment(where), false, repeats);
        if (!wrong.empty()) fault("byte " + std::to_string(b - buffer.begin) + " of an output " + wrong);
      }
      return host;
    }
    fault(at_global(begin, verb, bytes, where) + " is outside of every buffer");
  }

 private:
  static Repeats repeating(const void* there, const void* value, uint32_t bytes) {
    if (!value) return Repeats::no;
    return std::memcmp(there, value, bytes) == 0 ? Repeats::same_value : Repeats::other_value;
  }

  void run_block(int threads, uint32_t shared_bytes) {
    threads_.clear();
    threads_.resize(static_cast<std::size_t>(threads));
    warps_.assign(static_cast<std::size_t>(threads / kWarp), Warp{});
    for (Warp& warp : warps_) warp.ready = ~0u;
    shared_.assign(shared_bytes, 0xff);
    cells_.assign(shared_bytes / kCell, Cell{});
    at_barrier_ = block_epoch_ = 0;
    std::size_t warp = 0;
    while (fault_.empty()) {
      const std::size_t count = warps_.size();
      if (!warps_[warp].ready || random_.below(100) >= patience_) warp = random_.below(static_cast<uint32_t>(count));
      for (std::size_t tried = 0; !warps_[warp].ready && tried < count; ++tried) warp = (warp + 1) % count;
      if (!warps_[warp].ready) break;
      const uint32_t ready = warps_[warp].ready, turn = random_.below(kWarp);
      const uint32_t turned = ready >> turn | (turn ? ready << (kWarp - turn) : 0);
      const int lane = (__builtin_ctz(turned) + static_cast<int>(turn)) % kWarp;
      warps_[warp].ready &= ~(1u << lane);
      enter(static_cast<int>(warp) * kWarp + lane);
    }
    if (fault_.empty()) check_end();
  }

  __attribute__((noinline)) void enter(int thread) {
    current_ = thread;
    if (_setjmp(scheduler_)) return;
    if (me().entered) _longjmp(me().state, 1);
    me().entered = true;
    getcontext(&me().context);
    me().context.uc_stack = {static_cast<char*>(stacks_) + static_cast<std::size_t>(thread) * kStack, 0, kStack};
    me().context.uc_link = nullptr;
    makecontext(&me().context, reinterpret_cast<void (*)()>(&body), 2, static_cast<unsigned>(self() >> 32),
                static_cast<unsigned>(self()));
    setcontext(&me().context);
  }
  uintptr_t self() const { return reinterpret_cast<uintptr_t>(this); }
  static void body(unsigned high, unsigned low) {  // makecontext passes only ints
    auto* machine = reinterpret_cast<Machine*>(static_cast<uintptr_t>(high) << 32 | low);
    machine->kernel_();
    if (!machine->me().copies.empty() || !machine->me().groups.empty())
      machine->fault("thread " + std::to_string(machine->current_) + " ends with copies in flight");
    machine->me().finished = true;
    _longjmp(machine->scheduler_, 1);
  }

  __attribute__((noinline)) void wait(Kind kind, const Where& where) {
    me().waits_for = kind;
    me().waits_at = where;
    if (_setjmp(me().state) == 0) _longjmp(scheduler_, 1);
  }

  void check_end() {  // no lane is ready
    std::map<std::string, int> waiting;
    for (const Thread& thread : threads_)
      ++waiting[thread.finished ? "have ended" : std::string("wait at ") + name(thread.waits_for) + " of " +
                                                    text(thread.waits_at)];
    if (waiting.size() == 1 && waiting.count("have ended")) return;
    fault_ = "deadlock:";
    for (const auto& [what, count] : waiting) fault_ += " " + std::to_string(count) + " threads " + what + ";";
    fault_.pop_back();
  }

  void check_shared(uint32_t at, uint32_t bytes, const Where& where) {
    const bool aligned = at % bytes == 0, inside = at <= shared_.size() && bytes <= shared_.size() - at;
    if (aligned && inside) return;
    fault(std::to_string(bytes) + " bytes at shared byte " + std::to_string(at) + ", by thread " +
          std::to_string(current_) + " (" + text(where) + "), are " +
          (inside ? "not aligned" : "not inside the block's " + std::to_string(shared_.size())));
  }

  std::string at_global(uintptr_t at, const char* verb, uint32_t bytes, const Where& where) const {
    char address[32];
    std::snprintf(address, sizeof address, "%#zx", static_cast<std::size_t>(at));
    return std::string("a ") + verb + " of " + std::to_string(bytes) + " global bytes at " + address + ", by thread " +
           std::to_string(current_) + " (" + text(where) + "),";
  }

  Moment moment(const Where& where) const {
    const int warp = current_ / kWarp;
    return {where,
            static_cast<int32_t>(block_),
            block_epoch_,
            warps_[static_cast<std::size_t>(warp)].epoch,
            static_cast<int16_t>(current_),
            static_cast<int16_t>(warp)};
  }
  Thread& me() { return threads_[static_cast<std::size_t>(current_)]; }

  void* stacks_;
  std::function<void()> kernel_;
  jmp_buf scheduler_;
  std::string fault_;
  Random random_;
  uint32_t patience_ = 0;  // in per cent: how often the same warp continues

  int64_t block_ = 0;
  int current_ = 0;
  std::deque<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  std::vector<Cell> cells_;
  std::size_t at_barrier_ = 0;
  Where barrier_;
  uint32_t block_epoch_ = 0;
};

MVIT_OWN inline Machine machine;

}  // namespace mvit::emulation
