# SPDX-License-Identifier: Apache-2.0
"""``python user_mode.py PROGRAM``: run a static aarch64 Linux program in the Unicorn emulator, as ``qemu-aarch64`` would.

For machines that have no qemu of the system's: ``unicorn`` is a package, and emulates a processor without an operating
system. The dozen system calls are those of support/machine/main.cpp and of the C library beneath it; another one ends
the run with its number.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc, arm64_const

PAGE = 4096
PROGRAM, MAPPED, STACK = 0x1000_0000, 0x10_0000_0000, 0x20_0000_0000  # of position-independent programs; mmap; the end
STACK_BYTES, HEAP_BYTES = 8 << 20, 1 << 30
CALL = 2  # the exception of `svc`
X = [getattr(arm64_const, f"UC_ARM64_REG_X{i}") for i in range(9)]
NO_SUCH_CALL, ERROR_ARGUMENT = 38, 22


def _down(n: int) -> int:
    return n // PAGE * PAGE


def _up(n: int) -> int:
    return _down(n + PAGE - 1)


class UserMode:
    """A program in memory; `run` runs it to its end and returns its exit status."""

    def __init__(self, program: Path) -> None:
        self.uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.status = 0
        image = program.read_bytes()
        kind, machine, _, entry, table = struct.unpack_from("<HHIQQ", image, 16)
        assert machine == 183, f"{program} is not for aarch64"
        size, count = struct.unpack_from("<HH", image, 54)
        base = PROGRAM if kind == 3 else 0  # 3: position-independent
        headers = [struct.unpack_from("<IIQQQQQQ", image, table + i * size) for i in range(count)]
        loaded = [(base + at, image[offset : offset + in_file], memory)
                  for what, _, offset, at, _, in_file, memory, _ in headers if what == 1]  # fmt: skip
        low, self.heap = _down(min(at for at, _, _ in loaded)), _up(max(at + memory for at, _, memory in loaded))
        self.heap_end, self.mapped = self.heap, MAPPED
        self.uc.mem_map(low, self.heap - low + HEAP_BYTES)
        for at, data, _ in loaded:
            self.uc.mem_write(at, data)
        self.uc.mem_map(STACK - STACK_BYTES, STACK_BYTES)
        # argc, argv, environment, and what the kernel tells: program headers, page size, entry, random bytes, no features
        name = STACK - 64
        self.uc.mem_write(name, b"machine\0" + bytes(24))
        told = {3: low + table, 4: size, 5: count, 6: PAGE, 7: 0, 9: base + entry, 16: 0, 25: name + 8, 0: 0}
        words = [1, name, 0, 0, *(word for pair in told.items() for word in pair)]
        self.sp = STACK - 4096
        self.uc.mem_write(self.sp, struct.pack(f"<{len(words)}Q", *words))
        self.uc.reg_write(arm64_const.UC_ARM64_REG_SP, self.sp)
        self.uc.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point
        self.uc.hook_add(UC_HOOK_INTR, self._interrupt)
        self.entry = base + entry

    def run(self) -> int:
        self.uc.emu_start(self.entry, 0)
        return self.status

    def _interrupt(self, uc: Uc, number: int, _) -> None:
        if number != CALL:
            at = uc.reg_read(arm64_const.UC_ARM64_REG_PC)
            self._stop(128 + 4, f"exception {number} before {at:#x}")
            return
        *arguments, call = (uc.reg_read(register) for register in X)
        uc.reg_write(X[0], self._call(call, *arguments[:4]) & (1 << 64) - 1)

    def _stop(self, status: int, why: str = "") -> int:
        if why:
            print(f"user_mode: {why}", file=sys.stderr)
        self.status = status
        self.uc.emu_stop()
        return 0

    def _call(self, call: int, a: int, b: int, c: int, d: int) -> int:
        if call == 63:  # read
            data = os.read(a, c)
            self.uc.mem_write(b, data)
            return len(data)
        if call == 64:  # write
            return os.write(a, self.uc.mem_read(b, c))
        if call == 66:  # writev
            parts = [struct.unpack("<QQ", self.uc.mem_read(b + 16 * i, 16)) for i in range(c)]
            return sum(os.write(a, self.uc.mem_read(at, size)) for at, size in parts if size)
        if call in (93, 94):  # exit, exit_group
            return self._stop(a)
        if call == 214:  # brk
            if self.heap <= a <= self.heap + HEAP_BYTES:
                self.heap_end = a
            return self.heap_end
        if call == 222:  # mmap
            at, size = self.mapped, _up(b)
            if a and d & 0x10:  # at a fixed place: only to change what is there
                return -ERROR_ARGUMENT
            self.uc.mem_map(at, size)
            self.mapped += size + PAGE  # a page between, that nothing may touch
            return at
        if call == 215:  # munmap
            self.uc.mem_unmap(_down(a), _up(b))
            return 0
        if call in (226, 233, 99, 96, 135, 134, 98, 123, 293):
            return 1 if call == 96 else 0  # mprotect, madvise, set_robust_list, set_tid_address, signals, futex, rseq …
        if call == 278:  # getrandom: the same every time
            self.uc.mem_write(a, bytes(b))
            return b
        if call in (29, 78, 216, 261, 48, 56, 57, 79, 80, 113, 160, 167, 172, 178, 131, 130):
            return -NO_SUCH_CALL  # ioctl, readlinkat, mremap, prlimit, files, time, names, signals: all may fail
        return self._stop(128 + 31, f"system call {call} is not emulated")


if __name__ == "__main__":
    sys.exit(UserMode(Path(sys.argv[1])).run())
