# SPDX-License-Identifier: Apache-2.0
"""The registers of a block's threads, and the operands of its instructions, all threads at once in NumPy.

A register has one number for each thread, in the low 32 bits of an unsigned 64-bit one, so that carries show. Uniform
registers are kept the same way. What was never written is `UNDEFINED`, which no address may come from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
UNDEFINED = np.uint64(0xDEADBEE0)
PARAMETERS = 0x210  # of a kernel for sm_90, in constant bank 0; below are the sizes of the block and the grid
APART = 40  # bits of an address below its tensor's number, so that no offset leads from one tensor into another


class Unknown(Exception):
    """An instruction or operand that is not interpreted."""


def signed(values: np.ndarray) -> np.ndarray:
    """32-bit numbers with their sign, as 64-bit ones."""
    return values.astype(np.uint32).view(np.int32).astype(np.int64)


def unsigned(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).astype(np.uint64)


def address(number: int) -> int:
    """Where a launch's tensor of that number lies."""
    return (number + 1) << APART


def constant_bank(threads: int, grid: Sequence[int], parameters: bytes) -> bytes:
    """Constant bank 0 of a launch."""
    bank = bytearray(0x1000)
    for place, value in enumerate((threads, 1, 1, *grid)):
        bank[4 * place : 4 * place + 4] = value.to_bytes(4, "little")
    bank[PARAMETERS : PARAMETERS + len(parameters)] = parameters
    return bytes(bank)


class Registers:
    """Registers, predicates and constants of `threads` threads."""

    def __init__(self, threads: int, constants: bytes) -> None:
        self.threads, self.constants = threads, constants
        self.numbers: dict[str, np.ndarray] = {}
        self.predicates: dict[str, np.ndarray] = {}

    def all(self, value: int) -> np.ndarray:
        return np.full(self.threads, value & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def constant(self, offset: int, size: int = 4) -> np.ndarray:
        return self.all(int.from_bytes(self.constants[offset : offset + size], "little"))

    def read(self, operand: str) -> np.ndarray:
        """A 32-bit operand; a negated one may have a carry."""
        text = operand.replace(".reuse", "").replace(".64", "")
        negated = text[0] == "-" and not re.match(r"-(0x|\d|INF)", text)
        text = text[1:] if negated else text
        inverted = text[0] == "~"
        text = text[1:] if inverted else text
        if text in ("RZ", "URZ", "SRZ"):
            value = self.all(0)
        elif re.fullmatch(r"U?R\d+", text):
            value = self.numbers.get(text, self.all(int(UNDEFINED)))
        elif re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            value = self.all(int(text, 0) & 0xFFFFFFFF)
        elif found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            value = self.constant(int(found[1], 16))
        elif re.match(r"[-+]?(\d|INF|QNAN)", text):
            value = self.all(int(np.float32(text.replace("QNAN", "nan").replace("INF", "inf")).view(np.uint32)))
        else:
            raise Unknown(operand)
        if inverted:
            value = value ^ LOW
        return (LOW - value) + np.uint64(1) if negated else value

    def read_wide(self, operand: str) -> np.ndarray:
        """A 64-bit operand: a register and the next one, or a constant."""
        text = operand.replace(".reuse", "").replace(".64", "")
        negated, text = text.startswith("-"), text.lstrip("-")
        if found := re.fullmatch(r"(U?R)(\d+)", text):
            high = self.read(f"{found[1]}{int(found[2]) + 1}") & LOW
            value = (self.read(text) & LOW) | (high << np.uint64(32))
        elif text.startswith("c["):
            value = self.constant(int(text[7:-1], 16), 8)
        else:
            value = self.all(0 if text in ("RZ", "URZ") else int(text, 0))
        return np.uint64(0) - value if negated else value

    def read_predicate(self, operand: str) -> np.ndarray:
        name = operand.lstrip("!")
        value = np.ones(self.threads, bool)
        if name not in ("PT", "UPT"):
            value = self.predicates.get(name, ~value)
        return ~value if operand.startswith("!") else value

    def write(self, operand: str, value: np.ndarray, active: np.ndarray, count: int = 1) -> None:
        """Write a register, or `count` of them: two from the halves of `value`, more all 0."""
        if operand in ("RZ", "URZ"):
            return
        found = re.match(r"(U?R)(\d+)", operand)
        if found is None:
            raise Unknown(operand)
        value = unsigned(value) if value.dtype.kind == "i" else value.astype(np.uint64)
        for k in range(count):
            name = f"{found[1]}{int(found[2]) + k}"
            part = (value >> np.uint64(32 * k)) & LOW if k < 2 else self.all(0)
            self.numbers[name] = np.where(active, part, self.numbers.get(name, self.all(int(UNDEFINED))))

    def write_predicate(self, operand: str, value: np.ndarray, active: np.ndarray) -> None:
        if operand not in ("PT", "UPT"):
            old = self.predicates.get(operand, np.zeros(self.threads, bool))
            self.predicates[operand] = np.where(active, value, old)

    def address(self, operand: str) -> np.ndarray:
        """What ``desc[UR16][R18.64+0x1e0]`` or ``[R3+UR4+0x10]`` stands for: 64 bits of global memory, 32 of shared."""
        inner = re.findall(r"\[([^\[\]]*)\]", operand)[-1]
        total = self.all(0)
        for sign, term in re.findall(r"([-+]?)([^-+]+)", inner):
            value = self.read_wide(term) if ".64" in term else self.read(term)
            total = total - value if sign == "-" else total + value
        return total if ".64" in inner or operand.startswith("desc") else total & LOW
