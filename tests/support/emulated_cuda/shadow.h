// SPDX-License-Identifier: Apache-2.0
// Shadow memory of the emulation: who wrote and read each cell of shared and global memory, and when, so that an access
// that is not ordered after another shows. machine.h has the threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <vector>

// Hidden: otherwise all drivers in a process would share one machine.
#define MVIT_OWN __attribute__((visibility("hidden")))

namespace mvit::emulation {

using Where = std::source_location;

inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline std::string text(const Where& where) {
  const char *path = where.file_name(), *slash = std::strrchr(path, '/');
  return std::string(slash ? slash + 1 : path) + ":" + std::to_string(where.line());
}

// ------------------------------------------------------------------------------------------------- shadows of memory

// Whether several threads may write a cell by one instruction, as compilers let all do that hold an element: they may if
// the value is the one that is there. Of different values of one warp one stays, and the hardware chooses which.
enum class Repeats { no, same_value, other_value };

// A point in a thread's execution. Of two moments in one block, the earlier is ordered before the later if a barrier of
// the block lies between them, or a barrier of their common warp, or if they belong to the same thread.
struct Moment {
  static constexpr int16_t kNobody = -1, kWholeWarp = -2;  // kWholeWarp: a collective access, such as ldmatrix

  Where where;
  int32_t block = 0;
  uint32_t block_epoch = 0, warp_epoch = 0;
  int16_t thread = kNobody, warp = 0;

  bool ordered_before(const Moment& later) const {
    if (thread == kNobody) return true;
    if (block != later.block) return false;
    if (block_epoch < later.block_epoch) return true;
    return warp == later.warp && (warp_epoch < later.warp_epoch || thread == later.thread);
  }
  bool same_instruction(const Moment& other, Repeats repeats) const {
    if (repeats == Repeats::no || block != other.block || block_epoch != other.block_epoch) return false;
    return (repeats == Repeats::same_value || warp == other.warp) && same(where, other.where);
  }
  std::string who() const {
    return (thread == kWholeWarp ? "warp " + std::to_string(warp) : "thread " + std::to_string(thread)) + " (" +
           text(where) + ")";
  }
};

// Bytes that a cell shadows, the smallest unit that is loaded or stored.
#ifndef MVIT_CELL_BYTES
#define MVIT_CELL_BYTES 2
#endif
constexpr uint32_t kCell = MVIT_CELL_BYTES;

struct Cell {
  Moment write, read;   // the latest of each
  Moment another_read;  // a read that is not ordered before `read`, if there is one
  bool initialised = false, in_flight = false;
};

enum class Access { read, write };

// Records an access at `now` in the cell and returns what is wrong with it, or "".
inline std::string touch(Cell& cell, Access access, const Moment& now, bool needs_initialised,
                         Repeats repeats = Repeats::no) {
  if (cell.in_flight) return "is touched by " + now.who() + " while a copy of " + cell.write.who() + " is in flight";
  if (access == Access::read && needs_initialised && !cell.initialised)
    return "is read by " + now.who() + " and nobody wrote it";
  const bool again = !cell.write.ordered_before(now);
  if (again && !cell.write.same_instruction(now, repeats))
    return std::string(access == Access::read ? "is read" : "is written") + " by " + now.who() +
           ", with no barrier after it was written by " + cell.write.who();
  if (access == Access::read) {
    // Two mutually unordered reads suffice, from different warps if possible: a write that is ordered after both is
    // ordered after all of them.
    const bool keeps_another = !cell.another_read.ordered_before(now) && cell.another_read.warp != now.warp;
    if (!cell.read.ordered_before(now) && !keeps_another) cell.another_read = cell.read;
    cell.read = now;
    return "";
  }
  for (const Moment* read : {&cell.read, &cell.another_read})
    if (!read->ordered_before(now))
      return "is written by " + now.who() + ", with no barrier after it was read by " + read->who();
  if (again && repeats == Repeats::other_value)
    return "is written by " + now.who() + " with another value than by " + cell.write.who() +
           ", in one instruction: which of the two stays is the hardware's choice";
  cell.write = now;
  cell.initialised = true;
  return "";
}

struct Buffer {  // global memory that the kernel may access
  Buffer(uintptr_t begin, uint64_t bytes, bool writable, uintptr_t host)
      : begin(begin),
        end(begin + bytes),
        host(host),
        writable(writable),
        cells(writable ? (bytes + kCell - 1) / kCell : 0) {}
  uintptr_t begin, end;     // as the kernel has it
  uintptr_t host;           // where it lies: at `begin`, unless the kernel's addresses are made up
  bool writable;
  std::vector<Cell> cells;  // only if writable
};

}  // namespace mvit::emulation
