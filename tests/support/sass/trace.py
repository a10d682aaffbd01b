# SPDX-License-Identifier: Apache-2.0
"""Which instructions each warp of a block executes, in its order, and what its accesses to memory cost.

Example:
    >>> traced = trace(code, threads=256, constants=bank, places=[(0, 0, 0), (5, 0, 0)])
    >>> traced.paths[0][:3]          # numbers of the first warp's first instructions

A block of `support.sass.block` is executed. Its integers are real; so are the conversions and reciprocals that a
division of integers takes. Every other floating-point result is 1.0, and every comparison of floating-point numbers is
false. So a branch that depends on data goes the way of ordinary numbers: no slow path of a division or a square root,
and softmax's running maximum does not grow after its first step.

What is counted of an access, for each warp: wavefronts of shared memory (128 bytes each, more with bank conflicts), and
sectors of 32 bytes that come from L1, from L2 and from DRAM. A sector that the block has loaded before comes from L1,
unless the load bypasses it; of a tensor of which another block reads the same, or that this one has read before, from
L2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gates.sass import Instruction
from support.sass.block import COMMA, FLOATING, Block
from support.sass.operands import APART, LOW, Unknown, signed

ONE = np.uint64(0x3F800000)  # 1.0, what floating-point results are taken for
_COMPARED = {"FSETP", "DSETP", "HSETP2", "FCHK"}
_MORE_FLOATING = {"I2FP", "HADD2", "FRND", "MUFU", "F2FP", "HFMA2"} | FLOATING
_VOTES = {"VOTE", "VOTEU"}
_COUNTED = ("shared", "l1", "l2", "dram", "lines")


@dataclass
class Trace:
    """Of each warp: the instructions, by number in the code, and for each of them what it moves."""

    paths: list[np.ndarray]
    shared: list[np.ndarray]  # wavefronts of shared memory
    l1: list[np.ndarray]  # sectors of 32 bytes from there
    l2: list[np.ndarray]
    dram: list[np.ndarray]
    lines: list[np.ndarray]  # of 128 bytes of global memory, in which the sectors are
    resident: set[int] = field(default_factory=set)  # tensors that other blocks read too

    @property
    def warps(self) -> int:
        return len(self.paths)

    @property
    def instructions(self) -> int:
        return sum(map(len, self.paths))


class Traced(Block):
    """A block that records; see the module."""

    def __init__(
        self, code: Sequence[Instruction], threads: int, constants: bytes, place: tuple[int, int, int]
    ) -> None:
        super().__init__(code, threads, constants, place)
        self.warps = threads // 32
        self.steps: list[int] = []
        self.active: list[np.ndarray] = []
        self.wavefronts: dict[int, np.ndarray] = {}  # step -> of each warp
        self.sectors: list[tuple[int, int, bool, bool, np.ndarray]] = []  # step, warp, stores, bypasses, sectors
        self.stack: dict[int, np.ndarray] = {}
        self.spilled: dict[int, np.ndarray] = {}  # step -> sectors of each warp
        self._ones = np.full(threads, ONE)
        self._no = np.zeros(threads, bool)

    def _step(self, number: int, active: np.ndarray) -> None:
        self.steps.append(number)
        self.active.append(active.reshape(self.warps, 32).any(1))
        super()._step(number, active)

    def _execute(self, code: Instruction, active: np.ndarray) -> None:
        kind, *parts = code.name.split(".")
        registers = self.registers
        if kind in ("I2F", "F2I") or (kind == "MUFU" and parts[0] == "RCP") or kind == "I2FP":
            operands = COMMA.split(code.operands)
            registers.write(operands[0], self._converted(kind, parts, operands[1]), active)
        elif kind in _VOTES:
            operands = COMMA.split(code.operands)
            voted = self._voted(parts[0], registers.read_predicate(operands[-1]), active)
            for operand in operands[:-1]:
                if re.fullmatch(r"U?P(\d+|T)", operand):
                    registers.write_predicate(operand, voted, active)
                else:
                    registers.write(operand, voted.astype(np.uint64), active)
        elif kind == "IABS":
            operands = COMMA.split(code.operands)
            registers.write(operands[0], np.abs(signed(registers.read(operands[1]) & LOW)), active)
        elif kind in _COMPARED:
            operands = COMMA.split(code.operands)
            for operand in operands[: 1 if kind == "FCHK" else 2]:
                registers.write_predicate(operand, self._no, active)
        elif kind in _MORE_FLOATING and not (kind == "HFMA2" and code.operands.count("RZ") >= 2):
            first = re.match(r"R(\d+)", COMMA.split(code.operands)[0])
            for k in range(4 if kind == "HMMA" and first else 1 if first else 0):
                registers.write(f"R{int(first[1]) + k}", self._ones, active)
        elif kind in ("STL", "LDL"):
            self._spill(kind, parts, *COMMA.split(code.operands), active)
        else:
            super()._execute(code, active)

    def _spill(self, kind: str, parts: list[str], first: str, second: str, active: np.ndarray) -> None:
        """To and from the stack, whose addresses are R1 and a constant; it is in L1."""
        at, register = (first, second) if kind == "STL" else (second, first)
        found = re.search(r"0x([0-9a-f]+)", at)
        offset = int(found[1], 16) if found else 0
        name = re.match(r"R(\d+)|RZ", register)
        count = next((int(part) // 32 for part in parts if part in ("64", "128")), 1)
        for k in range(count):
            one = f"R{int(name[1]) + k}" if name[1] else "RZ"
            if kind == "STL":
                old = self.stack.get(offset + 4 * k, self.registers.all(0))
                self.stack[offset + 4 * k] = np.where(active, self.registers.read(one), old)
            else:
                self.registers.write(one, self.stack.get(offset + 4 * k, self.registers.all(0)), active)
        self.spilled[len(self.steps) - 1] = 4 * count * active.reshape(self.warps, 32).any(1)

    def _converted(self, kind: str, parts: list[str], operand: str) -> np.ndarray:
        absolute = operand.startswith("|")
        bits = (self.registers.read(operand.strip("|")) & LOW).astype(np.uint32)
        if kind in ("I2F", "I2FP"):
            value = bits if "U32" in parts else np.abs(bits.view(np.int32)) if absolute else bits.view(np.int32)
            exact = value.astype(np.float64)
            found = exact.astype(np.float32)
            if "RP" in parts:
                found = np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found).astype(np.float32)
            return found.view(np.uint32).astype(np.uint64)
        number = bits.view(np.float32)
        if kind == "MUFU":
            return (np.float32(1) / number).astype(np.float32).view(np.uint32).astype(np.uint64)
        whole = np.nan_to_num(np.trunc(number.astype(np.float64)), nan=0.0, posinf=2.0**32 - 1, neginf=0.0)
        if "U32" in parts:
            return np.clip(whole, 0, 2.0**32 - 1).astype(np.uint64)
        return np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.uint64) & LOW

    def _voted(self, how: str, votes: np.ndarray, active: np.ndarray) -> np.ndarray:
        each = (votes | ~active if how == "ALL" else votes & active).reshape(self.warps, 32)
        return np.repeat(each.all(1) if how == "ALL" else each.any(1), 32)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _add(self, space: str, code: Instruction, operand: str, size: int | np.ndarray, active: np.ndarray) -> None:
        address = self.registers.address(operand)
        size = np.broadcast_to(size, address.shape)
        active = active & (size > 0)
        step = len(self.steps) - 1
        if space == "shared":
            found = wavefronts(address.reshape(self.warps, 32), int(size.max()), active.reshape(self.warps, 32))
            self.wavefronts[step] = self.wavefronts.get(step, 0) + found
            return
        stores, bypasses = code.name.startswith("ST"), "BYPASS" in code.name
        by_warp = (address >> np.uint64(5)).reshape(self.warps, 32)
        of = active.reshape(self.warps, 32)
        for warp in np.flatnonzero(of.any(1)):
            self.sectors.append((step, warp, stores, bypasses, np.unique(by_warp[warp][of[warp]])))

    def _product(self, code: Instruction, operands: list[str], active: np.ndarray) -> None:
        """A wgmma reads shared memory beside the threads' accesses; `support.sass.pipes` has its time."""

    def _r2ur(self, operands: list[str], parts: list[str], active: np.ndarray) -> None:
        super()._r2ur([operand for operand in operands if not re.fullmatch(r"U?PT", operand)], parts, active)


def wavefronts(address: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
    """For each warp (a row of 32 addresses): how many times 128 bytes of shared memory are accessed.

    A wavefront serves as many lanes as 128 bytes have; units of the same bank that differ want one each.
    """
    size = max(size, 4)
    lanes, warps = 128 // size, len(address)
    unit = np.where(active, address // np.uint64(size), np.uint64(1 << 62)).reshape(warps, -1, lanes)
    unit = np.sort(unit, axis=-1)
    distinct = np.ones(unit.shape, bool)
    distinct[..., 1:] = unit[..., 1:] != unit[..., :-1]
    distinct &= unit < np.uint64(1 << 62)
    bank = (unit % np.uint64(lanes)).astype(np.int64)
    counts = ((bank[..., None] == np.arange(lanes)) & distinct[..., None]).sum(-2)
    return counts.max(-1).sum(-1)


def trace(code: Sequence[Instruction], threads: int, constants: bytes, places: Sequence[tuple[int, int, int]]) -> Trace:
    """The first place's block; of the others only which tensors they share with it.

    Raises:
        Unknown: an instruction that `support.sass.block` does not know, or a block without an end.
    """
    blocks = []
    for place in places:
        block = Traced(code, threads, constants, place)
        with np.errstate(all="ignore"):
            block.run()
        blocks.append(block)
    touched = [_by_tensor(block) for block in blocks]
    resident = {
        tensor
        for tensor, sectors in touched[0].items()
        for other in touched[1:]
        if tensor in other and len(np.intersect1d(sectors, other[tensor])) > len(sectors) // 2
    }
    return _assembled(blocks[0], resident)


def _by_tensor(block: Traced) -> dict[int, np.ndarray]:
    """Sectors that a block reads, by tensor."""
    found: dict[int, list[np.ndarray]] = {}
    for _, _, stores, _, sectors in block.sectors:
        if not stores:
            found.setdefault(int(sectors[0]) >> (APART - 5), []).append(sectors)
    return {tensor: np.unique(np.concatenate(parts)) for tensor, parts in found.items()}


def _assembled(block: Traced, resident: set[int]) -> Trace:
    steps, active = np.array(block.steps, np.int32), np.array(block.active)
    counts = {name: np.zeros(active.shape, np.int32) for name in _COUNTED}
    for step, found in block.wavefronts.items():
        counts["shared"][step] = found
    for step, found in block.spilled.items():
        counts["l1"][step] += found
    in_l1: set[int] = set()
    in_l2: set[int] = set()
    written: set[int] = set()
    coming: set[int] = set()  # into L1, for the instruction that warps execute at the same time: they all wait for it
    last = -1
    for step, warp, stores, bypasses, sectors in block.sectors:
        if step != last:
            in_l1 |= coming
            coming, last = set(), step
        counts["lines"][step, warp] += len(np.unique(sectors >> np.uint64(2)))
        of_l2 = int(sectors[0]) >> (APART - 5) in resident
        for sector in sectors.tolist():
            if stores:
                level = "l2" if sector in written else "dram"  # a sector's parts meet in L2
                written.add(sector)
            elif not bypasses and sector in in_l1:
                level = "l1"
            else:
                level = "l2" if of_l2 or (sector in in_l2 and sector not in coming) else "dram"
                if not bypasses:
                    coming.add(sector)
            in_l2.add(sector)
            counts[level][step, warp] += 1
    of = [active[:, warp] for warp in range(block.warps)]
    return Trace(
        [steps[each] for each in of],
        *([counts[name][each, warp] for warp, each in enumerate(of)] for name in _COUNTED),
        resident,
    )


__all__ = ["Trace", "Traced", "Unknown", "trace", "wavefronts"]
