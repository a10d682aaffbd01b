// SPDX-License-Identifier: Apache-2.0
// The schedule of one multiprocessor, cycle by cycle where something is issued: see multiprocessor.py, which compiles
// and calls this, for what is modelled and for the meaning of every number.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int kSchedulers = 4, kScoreboards = 6, kNone = 7;
constexpr double kNever = 1e18;

// In the order of multiprocessor.py's ACTS.
enum Act : int32_t { kPlain, kShared, kShuffle, kLoad, kCopy, kStore, kClose, kWaitFor, kBarrier, kBranch, kExit, kVariable, kGroup, kGroupWait };

struct Static {  // an instruction of the code
  int32_t act, pipe, stall, written, read, wait, count, kind;
  double interval, latency, read_latency;
};

struct Dynamic {  // an execution of it by a warp
  int32_t number, shared, l1, l2, dram, lines;
};

struct Machine {
  double shared_request, queue, l1_latency, l2_latency, dram_latency, l2_rate, dram_rate, barrier, branch, block_start,
      fetch_lines, fetch_miss, line, store_line;
};

struct Scoreboard {
  std::vector<double> ends;  // of operations that hold it, those that are over dropped now and then
  double last = 0;
  int32_t kind = 0;
};

struct Warp {
  const Dynamic* at = nullptr;
  const Dynamic* end = nullptr;
  double issued = 0, ready = 0;  // of the last instruction; when its stall is over
  double copies = 0;             // when all copies so far have landed
  std::vector<double> groups;    // ends of groups of asynchronous products
  double products = 0;
  Scoreboard boards[kScoreboards];
  int32_t block = -1, last_number = -64;  // no instruction
  double waits_for = 0;  // cache of when the next instruction may be issued, but for pipes
  int32_t cause = 0;     // of the wait, and
  double fixed = 0;      // the part of it that is a stall
  bool stopped = false;  // at a barrier
};

struct Block {
  int warps = 0, arrived = 0;
  std::vector<Warp*> waiting;
  double at = 0;
};

}  // namespace

// Reasons, in the order of multiprocessor.py's REASONS: issued, stall, not selected, branch, barrier, fetch, then pipes
// (8) and what holds scoreboards (8).
enum Reason { kIssued, kStall, kNotSelected, kBranchWait, kBarrierWait, kFetch, kPipes = 8, kKinds = 16, kReasons = 32 };

extern "C" double simulate(const Static* code, const Dynamic* entries, const int64_t* starts,
                           int64_t warps, int64_t resident, int64_t blocks, const Machine* machine_given,
                           double* waits /* instructions × kReasons */, double* pipe_busy /* 8 */,
                           double* block_ends /* blocks */, int64_t* issued_total) {
  const Machine& machine = *machine_given;
  constexpr int kMostPipes = 8;
  double pipe_free[kSchedulers][kMostPipes] = {};
  double shared_free = 0, l2_free = 0, dram_free = 0;
  std::vector<Warp> slots(resident * warps);
  std::vector<Block> running(resident);
  std::vector<std::vector<Warp*>> of(kSchedulers);
  std::vector<int64_t> fetched[kSchedulers];  // lines of code, least recently used first
  Warp* greedy[kSchedulers] = {};
  double next[kSchedulers] = {};
  int64_t started = 0, finished = 0, issued = 0;
  double now = 0, finish = 0;

  const auto prepare = [&](Warp& warp) {  // what the next instruction waits for
    const Static& one = code[warp.at->number];
    double until = warp.ready;
    int32_t cause = kStall;
    warp.fixed = warp.ready;
    for (int i = 0; i < kScoreboards; ++i)
      if (one.wait >> i & 1 && warp.boards[i].last > until) until = warp.boards[i].last, cause = kKinds + warp.boards[i].kind;
    if (one.act == kWaitFor) {  // at most `count` operations may still hold the scoreboard
      Scoreboard& board = warp.boards[one.read];
      const int64_t over = static_cast<int64_t>(board.ends.size()) - 1 - one.count;
      if (over >= 0 && board.ends[over] > until) until = board.ends[over], cause = kKinds + board.kind;
    }
    if (one.act == kGroupWait) {
      const int64_t over = static_cast<int64_t>(warp.groups.size()) - 1 - one.count;
      if (over >= 0 && warp.groups[over] > until) until = warp.groups[over], cause = kKinds + one.kind;
    }
    warp.waits_for = std::ceil(until);
    warp.cause = cause;
  };
  const auto start_block = [&](int64_t slot, double at) {
    Block& block = running[slot];
    block.warps = static_cast<int>(warps), block.arrived = 0, block.waiting.clear(), block.at = at;
    for (int64_t w = 0; w < warps; ++w) {
      Warp& warp = slots[slot * warps + w];
      warp = Warp{};
      warp.at = entries + starts[w], warp.end = entries + starts[w + 1];
      warp.block = static_cast<int32_t>(slot);
      warp.issued = warp.ready = at;
      int least = 0;
      for (int s = 1; s < kSchedulers; ++s)
        if (of[s].size() < of[least].size()) least = s;
      of[least].push_back(&warp);
      next[least] = std::min(next[least], at);
      prepare(warp);
    }
    ++started;
  };
  for (int s = 0; s < kSchedulers; ++s) next[s] = kNever;
  for (int64_t slot = 0; slot < resident && started < blocks; ++slot) start_block(slot, 0);

  const auto release = [&](Block& block, double at) {
    for (Warp* warp : block.waiting) {
      warp->stopped = false;
      warp->ready = std::max(warp->ready, at);
      prepare(*warp);
      if (warp->cause == kStall) warp->cause = kBarrierWait;
      for (int s = 0; s < kSchedulers; ++s)
        for (Warp* other : of[s])
          if (other == warp) next[s] = std::min(next[s], std::max(at, now));
    }
    block.waiting.clear(), block.arrived = 0;
  };

  while (finished < blocks) {
    int s = 0;
    for (int i = 1; i < kSchedulers; ++i)
      if (next[i] < next[s]) s = i;
    now = next[s];
    if (now >= kNever) return -1;  // warps wait for each other

    // The greedy warp if it can go on, else the one that has waited longest.
    Warp* chosen = nullptr;
    double soonest = kNever;
    for (Warp* warp : of[s]) {
      if (warp->stopped) continue;
      const Static& one = code[warp->at->number];
      double may = std::max(warp->waits_for, std::ceil(pipe_free[s][one.pipe]));
      if (one.act == kShared || one.act == kShuffle || one.act == kLoad || one.act == kCopy || one.act == kStore)
        may = std::max(may, std::ceil(shared_free - machine.queue));
      if (may > now) {
        soonest = std::min(soonest, may);
        continue;
      }
      if (chosen == nullptr || warp == greedy[s] || (chosen != greedy[s] && warp->waits_for < chosen->waits_for)) chosen = warp;
    }
    if (chosen == nullptr) {
      next[s] = soonest;
      continue;
    }
    Warp& warp = *chosen;
    const Dynamic& here = *warp.at;
    const Static& one = code[here.number];
    if (machine.fetch_lines > 0) {  // 128 bytes a line, eight instructions; the next line is prefetched
      auto& lines = fetched[s];
      const int64_t line = here.number / 8;
      auto found = std::find(lines.rbegin(), lines.rend(), line);
      const bool hit = found != lines.rend();
      const bool follows = warp.last_number >= 0 && warp.last_number / 8 + 1 == line;
      if (hit) lines.erase(std::next(found).base());
      lines.push_back(line);
      if (lines.size() > machine.fetch_lines) lines.erase(lines.begin());
      if (!hit && !follows && warp.last_number / 8 != line) {
        warp.ready = now + machine.fetch_miss;
        warp.last_number = here.number;
        prepare(warp);
        if (warp.cause == kStall) warp.cause = kFetch;
        next[s] = now;
        continue;
      }
    }
    const int32_t before = std::max(warp.last_number, 0);
    warp.last_number = here.number;

    // Where the cycles since its last instruction went.
    double* const account = waits + here.number * kReasons;
    const double stalled = std::max(0.0, warp.fixed - warp.issued - 1);
    const double waited = std::max(0.0, warp.waits_for - std::max(warp.fixed, warp.issued + 1));
    const double piped = std::max(0.0, std::min(now, std::ceil(pipe_free[s][one.pipe])) - std::max(warp.waits_for, warp.issued + 1));
    account[kIssued] += 1;
    // A wait at a barrier and behind a jump is the barrier's and the jump's, not that of what follows.
    const bool behind = warp.cause == kBarrierWait || warp.cause == kBranchWait;
    double* const waited_at = behind ? waits + before * kReasons : account;
    waited_at[behind || warp.cause == kFetch ? warp.cause : kStall] += stalled;
    waited_at[warp.cause] += waited;
    account[kPipes + one.pipe] += piped;
    account[kNotSelected] += std::max(0.0, now - std::max(warp.waits_for, warp.issued + 1) - piped);

    // What it does.
    double& pipe = pipe_free[s][one.pipe];  // parts of a cycle are kept, so that intervals of 6.5 are 6 and 7
    pipe = (pipe > now - 1 ? pipe : now) + one.interval;
    pipe_busy[one.pipe] += one.interval;
    double end = now + one.latency, read_end = now + one.read_latency;
    const auto through_shared = [&](double units) {
      const double begin = std::max(now, shared_free);
      shared_free = begin + std::max(machine.shared_request, units);
      
      return begin;
    };
    const auto from_memory = [&](double begin) {  // when all sectors are there
      double last = begin + machine.l1_latency;
      if (here.l2 + here.dram > 0) {
        l2_free = std::max(begin, l2_free) + 32.0 * (here.l2 + here.dram) / machine.l2_rate;
        last = std::max(last, l2_free + machine.l2_latency);
      }
      if (here.dram > 0) {
        dram_free = std::max(begin, dram_free) + 32.0 * here.dram / machine.dram_rate;
        last = std::max(last, dram_free + machine.dram_latency);
      }
      return last;
    };
    double stall = std::max<double>(one.stall, 1);
    switch (one.act) {
      case kShared: {
        pipe_busy[7] += here.shared;
        if (here.shared > 0) {
          const double begin = through_shared(here.shared);
          end = begin + one.latency + here.shared - 1, read_end = begin + one.read_latency;
        }
        break;
      }
      case kShuffle: {
        const double begin = through_shared(1);
        end = begin + one.latency, read_end = begin + one.read_latency;
        break;
      }
      case kLoad: {
        const int sectors = here.l1 + here.l2 + here.dram;
        if (sectors > 0) {
          const double begin = through_shared(std::max((sectors + 3) / 4.0, machine.line * here.lines));
          end = from_memory(begin), read_end = begin + one.read_latency;
        }
        break;
      }
      case kCopy: {
        pipe_busy[7] += here.shared;
        const int sectors = here.l1 + here.l2 + here.dram;
        const double begin = through_shared(std::max<double>({1.0, 1.0 * here.shared, machine.line * here.lines}));
        if (sectors > 0) warp.copies = std::max(warp.copies, from_memory(begin));
        read_end = begin + one.read_latency;
        break;
      }
      case kStore: {
        const int sectors = here.l1 + here.l2 + here.dram;
        if (sectors > 0) {
          const double begin = through_shared(std::max((sectors + 3) / 4.0, machine.store_line * here.lines));
          if (here.l2 + here.dram > 0) l2_free = std::max(begin, l2_free) + 32.0 * (here.l2 + here.dram) / machine.l2_rate;
          if (here.dram > 0) dram_free = std::max(begin, dram_free) + 32.0 * here.dram / machine.dram_rate;
          end = read_end = std::max(begin + one.read_latency, l2_free - 512);  // a store waits where many wait
        }
        break;
      }
      case kClose: end = std::max(now, warp.copies); break;
      case kGroup:
        warp.products = std::max(now + one.latency, pipe_free[s][one.pipe] + one.latency);
        if (one.count) warp.groups.push_back(warp.products);
        break;
      default: break;
    }
    const auto hold = [&](int board, double until) {
      if (board == kNone) return;
      Scoreboard& held = warp.boards[board];
      if (until >= held.last) held.last = until, held.kind = one.kind;
      if (one.act == kClose) held.ends.push_back(held.last);
    };
    if (one.act != kWaitFor) hold(one.written, end), hold(one.read, read_end);
    ++issued;
    warp.issued = now;
    greedy[s] = chosen;
    next[s] = now + 1;

    ++warp.at;
    const bool over = warp.at == warp.end;
    bool branched = false;
    if (!over && warp.at->number != here.number + 1) {
      branched = true;
      stall = std::max(stall, machine.branch);
    }
    warp.ready = now + stall;
    Block& block = running[warp.block];
    if (over) {
      of[s].erase(std::find(of[s].begin(), of[s].end(), chosen));
      greedy[s] = nullptr;
      if (of[s].empty()) next[s] = kNever;
      if (--block.warps == 0) {
        block_ends[finished++] = now;
        finish = std::max(finish, now);
        if (started < blocks) start_block(warp.block, now + machine.block_start);
      } else if (block.arrived == block.warps) {
        release(block, now + machine.barrier);
      }
      continue;
    }
    if (one.act == kBarrier) {
      warp.stopped = true;
      block.waiting.push_back(chosen);
      if (++block.arrived == block.warps) release(block, now + machine.barrier);
      continue;
    }
    prepare(warp);
    if (branched && warp.cause == kStall) warp.cause = kBranchWait;
  }
  *issued_total = issued;
  return finish;
}
