# SPDX-License-Identifier: Apache-2.0
"""Which unit of a Hopper multiprocessor an instruction takes, for how long, and how long its result takes.

Example:
    >>> described(Instruction(0x40, "", "LDS.128", "R4, [R2]"), Machine())
    Described(act='shared', pipe='memory', interval=2, latency=29.0, …)

Latencies of fixed latency are not here: the assembler counted them (`support.sass.control`). What is here are the
throughputs of the pipes and the latencies of what scoreboards wait for. Throughputs are from the CUDA programming
guide's table for compute capability 9.0 (results a clock a multiprocessor, a quarter of them in each scheduler);
latencies from what was published for Ampere and Hopper (arXiv:2402.13499, arXiv:2503.20481), and `Machine` says which
were fitted to the rows of tests/data/timing.csv.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from gates.sass import Instruction
from support.sass.operands import Unknown

ACTS = (
    *("plain", "shared", "shuffle", "load", "copy", "store", "close", "wait", "barrier", "branch", "exit"),
    *("variable", "group", "group wait"),
)
PIPES = ("float", "multiply", "integer", "special", "tensor", "memory", "control", "shared memory")
KINDS = ("other", "shared load", "shuffle", "global load", "copy", "special", "constant", "store or operand", "product")


@dataclass(frozen=True)
class Machine:
    """An H200, in cycles of its 1.755 GHz and bytes a cycle. What is marked was fitted to tests/data/timing.csv, within
    what is published; everything else is a size of the GPU or published."""

    clock: float = 1.755  # GHz
    multiprocessors: int = 132
    registers: int = 65536
    shared: int = 233_472  # bytes of a multiprocessor, of which each block takes 1,024 more than it asks for
    warps: int = 64
    blocks: int = 32
    launch: float = 1.2  # µs, of an empty kernel in a graph; measured
    mma: float = 6.5  # cycles of a scheduler's tensor core for mma.sync of 16 × 8 × 16; half of it for 16 × 8 × 8
    wgmma: float = 512  # multiply-adds a cycle of a scheduler's tensor core
    wgmma_latency: float = 30  # after its products
    shared_request: float = 2  # cycles that the multiprocessor takes at least for an access to shared memory
    queue: float = 48  # cycles of such work that may wait before schedulers are held back
    line: float = 1.25  # fitted: cycles of the same pipe for each 128 bytes of global memory that a load touches
    store_line: float = 1.75  # fitted: that a store touches
    shared_latency: float = 30
    shuffle_latency: float = 25
    special_latency: float = 25
    constant_latency: float = 45  # fitted
    operand_latency: float = 14  # until a store or a copy has read its registers
    l1_latency: float = 36
    l2_latency: float = 300  # fitted; 200 to 350 are published, by where in L2
    dram_latency: float = 800  # fitted; 600 to 700 without load
    l2_rate: float = 64  # at most, of one multiprocessor
    l2_all: float = 3800  # fitted: of all multiprocessors together, 6.7 TB/s
    dram_all: float = 1900  # fitted: 3.3 TB/s
    barrier: float = 22  # from the last warp's arrival
    branch: float = 10  # cycles after which a warp goes on that jumped
    block_start: float = 500  # fitted: from a block's end to the next one's first instruction
    fetch_lines: float = 96  # lines of 128 bytes of code that a scheduler holds
    fetch_miss: float = 40  # fitted: cycles until code that was jumped to is there


class Described(NamedTuple):
    act: str
    pipe: str
    interval: float  # cycles that the pipe is taken
    latency: float = 0.0
    read_latency: float = 0.0
    kind: str = "other"  # what a wait for it is called
    count: int = 0  # of a wait: how many may still be under way
    board: int = -1  # of a wait: which scoreboard


_MULTIPLY = {"IMAD", "IDP", "IDP4A", "IMUL"}
_FLOAT = {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_CONTROL = {
    *("BRA", "BRX", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "WARPSYNC", "NOP", "YIELD", "NANOSLEEP", "VOTE"),
    *("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "VOTEU"),
}


def described(one: Instruction, machine: Machine) -> Described:
    """What an instruction takes.

    Raises:
        Unknown: a barrier of a part of the block.
    """
    base, *parts = one.name.split(".")
    if base in ("HMMA", "IMMA", "DMMA"):
        return Described("plain", "tensor", machine.mma / (2 if parts[0] == "1688" else 1))
    if base == "HGMMA":
        columns = int(re.search(r"64x(\d+)x", one.name)[1])
        interval = 16 * 16 * columns / machine.wgmma
        return Described("group", "tensor", interval, machine.wgmma_latency, count=int("gsb" in one.operands))
    if base in ("LDS", "LDSM", "STS", "STSM"):
        return Described("shared", "memory", 2, machine.shared_latency, machine.operand_latency, "shared load")
    if base == "SHFL":
        return Described("shuffle", "memory", 2, machine.shuffle_latency, machine.operand_latency, "shuffle")
    if base in ("LDG", "LD", "LDL"):
        return Described("load", "memory", 2, machine.l1_latency, machine.operand_latency, "global load")
    if base in ("STG", "ST", "STL", "RED", "ATOMG"):
        return Described("store", "memory", 2, machine.operand_latency, machine.operand_latency, "store or operand")
    if base == "LDGSTS":
        return Described("copy", "memory", 2, 0, machine.operand_latency, "store or operand")
    if base == "LDGDEPBAR":
        return Described("close", "control", 1, kind="copy")
    if base == "DEPBAR":
        found = re.search(r"SB(\d), 0x([0-9a-f]+)", one.operands)
        return Described("wait", "control", 1, kind="copy", count=int(found[2], 16), board=int(found[1]))
    if base == "WARPGROUP" and parts[0] == "DEPBAR":
        return Described("group wait", "control", 1, kind="product", count=int(one.operands.rsplit("0x", 1)[-1], 16))
    if base in ("LDC", "S2R", "S2UR", "CS2R", "R2UR") and base != "CS2R":
        return Described("variable", "control", 2, machine.constant_latency, machine.operand_latency, "constant")
    if base in _SPECIAL:
        return Described("variable", "special", 8, machine.special_latency, machine.operand_latency, "special")
    if base == "BAR":
        if one.operands != "0x0":
            raise Unknown(f"{one}: of barriers, only the one of the whole block is modelled")
        return Described("barrier", "control", 1)
    if base in _CONTROL:
        return Described("branch" if base in ("BRA", "BRX", "CALL", "RET") else "plain", "control", 1)
    if base in _MULTIPLY:
        return Described("plain", "multiply", 2)
    if base in _FLOAT:
        return Described("plain", "float", 1)
    return Described("plain", "integer", 1 if base.startswith("U") else 2)  # uniform ones have a path of their own
