# SPDX-License-Identifier: Apache-2.0
"""A block of a kernel's machine code for sm_90, executed as far as it computes integers: which addresses it accesses.

Example:
    >>> block = Block(code, threads=128, constants=constants, place=(0, 0, 0))
    >>> block.run()
    >>> [access for access in block.accesses if access.space == "shared"]

Where our kernels read and write does not depend on what they read. So loads give 0, floating point gives 0, and what is
left are the integers, predicates and branches that addresses come from, for all threads of a block at once. A thread
that is behind runs first, so that branches that threads take differently come together again.

It knows the instructions that the assembler makes of our kernels; others raise `Unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gates.sass import Instruction
from support.sass.operands import LOW, Registers, Unknown, signed, unsigned

NOTHING = set(
    "BAR MEMBAR FENCE NOP BSSY BSYNC BREAK WARPSYNC WARPGROUP LDGDEPBAR DEPBAR CCTL CALL RET ERRBAR YIELD".split()
)  # CALL: of the slow paths of a division or a square root in floating point
FLOATING = set(
    "FADD FMUL FFMA FMNMX FSEL F2F F2FP F2I FRND MUFU I2F I2FP HADD2 HMUL2 HMNMX2 HMMA DADD DMUL DFMA".split()
)
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's two highest bits
COMMA = re.compile(r",\s*(?![^\[]*\])")
COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


class Access(NamedTuple):
    """What one instruction accesses: for each thread the first byte, the number of bytes (0: none), and whether it is
    active. Of an operand of ``wgmma`` in shared memory, for each warp group the bytes from its first to its last."""

    space: str  # "global", "shared"
    code: Instruction
    address: np.ndarray
    size: np.ndarray
    active: np.ndarray


class Block:
    """One block.

    Args:
        code: of the kernel.
        threads: of the block, a multiple of 32.
        constants: bank 0: sizes, and from `PARAMETERS` on the arguments.
        place: the block's, in the grid.
    """

    def __init__(
        self, code: Sequence[Instruction], threads: int, constants: bytes, place: tuple[int, int, int]
    ) -> None:
        self.code, self.place = code, place
        self.registers = Registers(threads, constants)
        self.accesses: list[Access] = []
        self._at = {each.address: number for number, each in enumerate(code)}
        self._next = np.zeros(threads, np.int64)  # the number of each thread's next instruction

    def run(self, most: int = 2_000_000) -> None:
        """Execute the block; raises `Unknown`, also where it takes more than `most` instructions."""
        with np.errstate(all="ignore"):
            for _ in range(most):
                running = self._next < len(self.code)
                if not running.any():
                    return
                number = int(self._next[running].min())
                self._step(number, self._next == number)
        raise Unknown(f"{most} instructions, and no end")

    def _step(self, number: int, active: np.ndarray) -> None:
        code, end = self.code[number], len(self.code)
        does = active & self.registers.read_predicate(code.guard) if code.guard else active
        kind = code.name.split(".")[0]
        following = np.where(active, number + 1, self._next)
        if kind == "BRA":
            *conditions, target = COMMA.split(code.operands)
            for condition in conditions:
                does = does & self.registers.read_predicate(condition)
            # A listing by nvdisasm has labels; the only ones in ours are of the endless loop behind the last EXIT.
            place = end if target.startswith("`") else self._at[int(target, 16)]
            following = np.where(does, end if place == number else place, following)
        elif kind == "EXIT":
            following = np.where(does, end, following)
        elif kind not in NOTHING and does.any():
            self._execute(code, does)
        self._next = following

    def _execute(self, code: Instruction, active: np.ndarray) -> None:
        kind, *parts = code.name.split(".")
        operands = COMMA.split(code.operands)
        memory = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "HGMMA"}
        integers = getattr(self, f"_{(kind[1:] if kind[0] == 'U' else kind).lower()}", None)
        if kind in memory:
            self._memory(code, kind, parts, operands, active)
        elif integers is not None:
            integers(operands, parts, active)
        elif kind in ("FSETP", "DSETP", "HSETP2", "FCHK"):
            for operand in operands[: 1 if kind == "FCHK" else 2]:
                self.registers.write_predicate(operand, np.zeros(self.registers.threads, bool), active)
        elif kind in FLOATING:
            self.registers.write(operands[0], self.registers.all(0), active, 4 if kind == "HMMA" else 1)
        else:
            raise Unknown(str(code))

    # -- memory ---------------------------------------------------------------------------------------------------

    def _memory(self, code: Instruction, kind: str, parts: list[str], operands: list[str], active: np.ndarray) -> None:
        registers, threads = self.registers, self.registers.threads
        if kind == "HGMMA":
            return self._product(code, operands, active)
        size = next((int(part) // 8 for part in parts if part in ("64", "128")), None)
        size = size or (2 if {"U16", "S16"} & set(parts) else 1 if {"U8", "S8"} & set(parts) else 4)
        if kind in ("LDSM", "STSM"):
            rows = {"4": 32, "2": 16}.get(parts[-1], 8)
            at = operands[kind == "LDSM"]
            self._add("shared", code, at, 16, active & (np.arange(threads) % 32 < rows))
            if kind == "LDSM":
                registers.write(operands[0], registers.all(0), active, rows // 8)
        elif kind == "LDGSTS":
            copies = registers.read_predicate(operands[2]) if len(operands) > 2 else np.ones(threads, bool)
            self._add("global", code, operands[1], np.where(copies, size, 0), active)
            self._add("shared", code, operands[0], size, active)
        else:
            self._add("shared" if kind[-1] == "S" else "global", code, operands[kind[0] == "L"], size, active)
            if kind[0] == "L":
                registers.write(operands[0], registers.all(0), active, max(size // 4, 1))
        return None

    def _add(self, space: str, code: Instruction, operand: str, size: int | np.ndarray, active: np.ndarray) -> None:
        address = self.registers.address(operand)
        self.accesses.append(Access(space, code, address, np.broadcast_to(size, address.shape), active))

    def _product(self, code: Instruction, operands: list[str], active: np.ndarray) -> None:
        """The operands that a wgmma has in shared memory: the second always, the first unless it is in registers.

        Layouts by the PTX manual, "Shared memory matrix layout": rows of 16 to 128 bytes, swizzled in groups of eight.
        """
        columns = int(re.search(r"64x(\d+)x", code.name)[1])
        both = operands[1].startswith("gdesc")
        first = int(re.search(r"gdesc\[UR(\d+)\]", code.operands)[1])
        found = [(first + 2, columns, "tnspB" in code.operands)] + (
            [(first, 64, "tnspA" in code.operands)] if both else []
        )
        for register, rows, transposed in found:
            descriptor = self.registers.read_wide(f"UR{register}")
            width = np.vectorize(SWIZZLES.__getitem__)((descriptor >> np.uint64(62)).astype(np.int64)).astype(np.uint64)
            start, leading, stride = (
                ((descriptor >> np.uint64(bit)) & np.uint64(0x3FFF)) << np.uint64(4) for bit in (0, 16, 32)
            )
            group = np.uint64(8) * width
            if transposed:
                across = -(-rows * 2 // width.astype(np.int64)) - 1
                last = unsigned(across) * leading + stride + group
            else:
                last = np.uint64(rows // 8 - 1) * stride + group
            self.accesses.append(Access("shared", code, start, start // group * group + last - start, active))

    # -- integers; uniform instructions are the same, of uniform registers ------------------------------------------

    def _s2r(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        threads = self.registers.threads
        values = {
            "SR_TID.X": np.arange(threads),
            "SR_LANEID": np.arange(threads) % 32,
            "SR_CgaCtaId": np.zeros(threads),
        }
        values |= {f"SR_CTAID.{axis}": np.full(threads, at) for axis, at in zip("XYZ", self.place, strict=True)}
        if operands[1] not in values:
            raise Unknown(operands[1])
        self.registers.write(operands[0], values[operands[1]].astype(np.int64), active)

    _s2ur = _s2r

    def _cs2r(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        self.registers.write(operands[0], self.registers.all(0), active, 1 if "32" in parts else 2)

    def _ldc(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operands[1])
        if found is None:
            raise Unknown(operands[1])
        count = 2 if "64" in parts else 1
        self.registers.write(operands[0], self.registers.constant(int(found[1], 16), 4 * count), active, count)

    def _mov(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        self.registers.write(operands[0], self.registers.read(operands[1]), active)

    def _r2ur(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        value = self.registers.read(operands[1])
        self.registers.write(operands[0], value[np.arange(len(value)) // 32 * 32], active)

    def _imad(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        registers = self.registers
        a, b = (registers.read(operand) & LOW for operand in operands[1:3])
        if {"WIDE", "HI"} & set(parts):
            product = a * b if "U32" in parts else unsigned(signed(a) * signed(b))
            product = product + registers.read_wide(operands[3])  # of HI too, 64 bits are added
            if "WIDE" in parts:
                return registers.write(operands[0], product, active, 2)
            return registers.write(operands[0], product >> np.uint64(32), active)
        total = a * b + registers.read(operands[3])
        if "X" in parts:
            total = total + registers.read_predicate(operands[4]).astype(np.uint64)
        return registers.write(operands[0], total, active)

    def _iadd3(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        registers = self.registers
        if "64" in parts:
            return registers.write(operands[0], sum(map(registers.read_wide, operands[1:4])), active, 2)
        carries, rest = _predicates(operands[1:])
        return self._with_carries(operands[0], carries, sum(map(registers.read, rest[:3])), rest[3:], parts, active)

    def _viadd(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        self.registers.write(operands[0], self.registers.read(operands[1]) + self.registers.read(operands[2]), active)

    def _lea(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        registers = self.registers
        carries, rest = _predicates(operands[1:])
        if "HI" not in parts:
            shifted, more = (registers.read(rest[0]) << np.uint64(int(rest[2], 16))) & LOW, rest[3:]
        elif "SX32" in parts:
            wide = unsigned(signed(registers.read(rest[0])) << np.int64(int(rest[2], 16)))
            shifted, more = (wide >> np.uint64(32)) & LOW, rest[3:]
        else:
            wide = (registers.read(rest[0]) & LOW) | ((registers.read(rest[2]) & LOW) << np.uint64(32))
            shifted, more = ((wide << np.uint64(int(rest[3], 16))) >> np.uint64(32)) & LOW, rest[4:]
        self._with_carries(operands[0], carries, shifted + (registers.read(rest[1]) & LOW), more, parts, active)

    def _with_carries(
        self,
        target: str,
        carries: Sequence[str],
        total: np.ndarray,
        added: Sequence[str],
        parts: list[str],
        active: np.ndarray,
    ) -> None:
        if "X" in parts:
            total = total + sum(self.registers.read_predicate(each).astype(np.uint64) for each in added)
        self.registers.write(target, total, active)
        for count, carry in enumerate(carries):
            self.registers.write_predicate(carry, (total >> np.uint64(32)) > count, active)

    def _lop3(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        found, (target, *rest) = _predicates(operands)
        value = _table(int(rest[3], 16), [self.registers.read(each) & LOW for each in rest[:3]], LOW)
        self.registers.write(target, value, active)
        for predicate in found:
            self.registers.write_predicate(predicate, value != 0, active)

    def _plop3(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        inputs = [self.registers.read_predicate(each) for each in operands[2:5]]
        self.registers.write_predicate(operands[0], _table(int(operands[5], 16), inputs, np.True_), active)

    def _shf(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        low, by, high = (self.registers.read(each) & LOW for each in operands[1:4])
        both = low | (high << np.uint64(32))
        by = np.minimum(by, np.uint64(63 if {"U64", "S64"} & set(parts) else 32))
        if "L" in parts:
            value = (both << by) >> np.uint64(32) if "HI" in parts else low << by
        elif "HI" not in parts:
            value = both >> by
        elif "S32" in parts:
            value = unsigned(signed(high) >> np.minimum(by, np.uint64(31)).astype(np.int64))
        else:
            value = high >> by
        self.registers.write(operands[0], value, active)

    def _sgxt(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        bits = int(operands[2], 16)
        value = self.registers.read(operands[1]) & np.uint64((1 << bits) - 1)
        if "U32" not in parts:
            value = unsigned((value.astype(np.int64) << np.int64(64 - bits)) >> np.int64(64 - bits))
        self.registers.write(operands[0], value, active)

    def _prmt(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        a, selector, b = (self.registers.read(each) & LOW for each in operands[1:4])
        both, value = a | (b << np.uint64(32)), self.registers.all(0)
        for k in range(4):
            chosen = (selector >> np.uint64(4 * k)) & np.uint64(15)
            byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            value |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * k)
        self.registers.write(operands[0], value, active)

    def _sel(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        a, b = map(self.registers.read, operands[1:3])
        self.registers.write(operands[0], np.where(self.registers.read_predicate(operands[3]), a, b), active)

    def _vimnmx3(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        """The smallest of three where the predicate is true, else the largest."""
        read = self.registers.read
        values = [unsigned(read(each)) if "U32" in parts else signed(read(each)) for each in operands[1:4]]
        smallest = self.registers.read_predicate(operands[4])
        chosen = np.where(smallest, np.minimum.reduce(values), np.maximum.reduce(values))
        self.registers.write(operands[0], chosen, active)

    def _isetp(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        registers = self.registers
        a, b = (registers.read(each) & LOW for each in operands[2:4])
        if "U32" not in parts:
            a, b = signed(a), signed(b)
        result = COMPARISONS[parts[0]](a, b)
        if "EX" in parts:  # of the high halves; the low ones were compared before
            low = registers.read_predicate(operands[5])
            result = {"EQ": (a == b) & low, "NE": (a != b) | low}.get(parts[0], np.where(a == b, low, result))
        other = registers.read_predicate(operands[4])
        join = np.logical_or if "OR" in parts else np.logical_and
        registers.write_predicate(operands[1], join(~result, other), active)
        registers.write_predicate(operands[0], join(result, other), active)

    def _shfl(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        value = self.registers.all(0)  # of floating-point numbers, but for a warp's number that one lane tells all
        if "IDX" in parts:
            lane = self.registers.read(operands[3]).astype(np.int64) % 32
            value = self.registers.read(operands[2])[np.arange(len(lane)) // 32 * 32 + lane]
        self.registers.write(operands[1], value, active)

    def _p2r(self, operands: list[str], parts: list[str], active: np.ndarray, kind: str = "P") -> None:
        mask = int(operands[3], 16)
        value = self.registers.read(operands[2]) & np.uint64(~mask & 0xFFFFFFFF)
        for k in (k for k in range(7) if mask >> k & 1):
            value = value | self.registers.read_predicate(f"{kind}{k}").astype(np.uint64) << np.uint64(k)
        self.registers.write(operands[0], value, active)

    def _p2ur(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        self._p2r(operands, parts, active, "UP")

    def _r2p(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        mask, value = int(operands[2], 16), self.registers.read(operands[1])
        for k in (k for k in range(7) if mask >> k & 1):
            self.registers.write_predicate(f"P{k}", (value >> np.uint64(k)) & np.uint64(1) != 0, active)

    def _vimnmx(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        self._smallest(operands[0], self.registers.read(operands[1]), *operands[2:4], parts, active)

    def _viaddmnmx(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        total = self.registers.read(operands[1]) + self.registers.read(operands[2])
        self._smallest(operands[0], total, *operands[3:5], parts, active)

    def _smallest(
        self, target: str, a: np.ndarray, other: str, least: str, parts: list[str], active: np.ndarray
    ) -> None:
        a, b = a & LOW, self.registers.read(other) & LOW
        if "U32" not in parts:
            a, b = signed(a), signed(b)
        found = np.where(self.registers.read_predicate(least), np.minimum(a, b), np.maximum(a, b))
        self.registers.write(target, found, active)

    def _hfma2(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        """How ptxas also loads a constant: two halves added to 0."""
        value = self.registers.all(0)
        if operands[1] in ("-RZ", "RZ") and operands[2] == "RZ" and len(operands) == 5:
            high, low = (int(np.float16(each).view(np.uint16)) for each in operands[3:])
            value = self.registers.all(high << 16 | low)
        self.registers.write(operands[0], value, active)


def _predicates(operands: list[str]) -> tuple[list[str], list[str]]:
    """The predicates at the beginning, and the rest."""
    count = next((k for k, each in enumerate(operands) if not re.fullmatch(r"U?P(\d+|T)", each)), len(operands))
    return operands[:count], operands[count:]


def _table(table: int, inputs: list[np.ndarray], ones: np.generic) -> np.ndarray:
    """What a truth table of three inputs gives, bit by bit."""
    value = np.zeros_like(inputs[0])
    for row in (row for row in range(8) if table >> row & 1):
        a, b, c = (each if row >> bit & 1 else each ^ ones for each, bit in zip(inputs, (2, 1, 0), strict=True))
        value = value | (a & b & c)
    return value
