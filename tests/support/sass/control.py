# SPDX-License-Identifier: Apache-2.0
"""What the assembler tells the scheduler in each instruction of sm_70 and later, from a listing by ``cuobjdump -sass``.

Example:
    >>> kernels = dict(scheduled(listing.splitlines()))
    >>> code, control = kernels["_Z6kernelPf"]
    >>> control[3].stall, control[3].wait
    (4, 0b000010)

An instruction has 128 bits, of which 21 (from bit 105 on) are no operation but its schedule. An instruction of fixed
latency is waited for by counting: `stall` cycles pass before the warp's next one. One of variable latency (memory,
special functions) names one of a warp's six scoreboards: `written` until its result is there, `read` until it has read
its operands; an instruction that depends on it has that bit in `wait`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gates.sass import Instruction, instruction

NONE = 7  # no scoreboard
_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/\s*$")


class Control(NamedTuple):
    """The schedule of one instruction."""

    stall: int  # cycles until the warp's next instruction may be issued
    written: int  # the scoreboard that is held until the result is there, or NONE
    read: int  # the scoreboard that is held until the operands were read, or NONE
    wait: int  # scoreboards, a bit each, that have to be free


def control(high: int) -> Control:
    """The schedule in the higher 64 of an instruction's 128 bits. (Bit 4 of it, yield, and the four of reuse, which
    operands stay in the collector, are left out: they cost no cycle by themselves.)"""
    bits = high >> 41
    return Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


def scheduled(lines: Iterable[str]) -> Iterator[tuple[str, tuple[list[Instruction], list[Control]]]]:
    """(mangled name, (instructions, their schedules)) of each function in a listing.

    Raises:
        ValueError: an instruction without its encoding.
    """
    name, code, controls = "", [], []
    for line in lines:
        if "Function :" in line:
            if name:
                yield name, (code, controls)
            name, code, controls = line.split()[-1], [], []
        elif each := instruction(line):
            if len(code) != len(controls):
                raise ValueError(f"{code[-1]} at {code[-1].address:#x} has no encoding")
            code.append(each)
        elif (found := _WORD.search(line)) and len(code) == len(controls) + 1:
            controls.append(control(int(found[1], 16)))
    if name:
        yield name, (code, controls)
