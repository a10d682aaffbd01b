# SPDX-License-Identifier: Apache-2.0
"""One multiprocessor of a Hopper GPU, simulated: the cycles that a kernel's blocks take, and where its warps wait.

Example:
    >>> result = simulate(code, controls, traced, resident=1, blocks=2, machine=Machine())
    >>> result.cycles, result.waits.sum(0)

Four schedulers issue one instruction a cycle each, from the warp that issued last if it may go on, else from the one
that has been ready longest. A warp may go on when the last instruction's stall is over, the scoreboards that the next
one waits for are free and the pipe that it takes is. Shared memory, L2 and DRAM are queues of the multiprocessor, with
a latency and a rate each. Blocks that end make room for the next ones.

The loop itself is in multiprocessor.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gates.sass import Instruction
from support import ROOT
from support.emulation import compiler
from support.sass.control import Control
from support.sass.pipes import ACTS, KINDS, PIPES, Machine, described
from support.sass.trace import Trace

BUILT = ROOT / "build" / "timing"
REASONS = (
    *("issued", "stall", "not selected", "branch", "barrier", "instruction fetch", "", ""),
    *(f"{name} pipe" for name in PIPES),
    *KINDS,
    *[""] * (16 - len(KINDS)),
)
_STATIC = np.dtype(
    [(name, np.int32) for name in ("act", "pipe", "stall", "written", "read", "wait", "count", "kind")]
    + [(name, np.float64) for name in ("interval", "latency", "read_latency")],
    align=True,
)
_DYNAMIC = np.dtype([(name, np.int32) for name in ("number", "shared", "l1", "l2", "dram", "lines")])
_MACHINE = (
    *("shared_request", "queue", "l1_latency", "l2_latency", "dram_latency", "l2_rate", "dram_rate", "barrier"),
    *("branch", "block_start", "fetch_lines", "fetch_miss", "line", "store_line"),
)


@dataclass
class Result:
    """What a stretch of blocks on one multiprocessor took."""

    cycles: float
    ends: np.ndarray  # cycle in which each block ended
    issued: int
    waits: np.ndarray  # cycles × warps, by instruction of the code and reason (`REASONS`)
    busy: dict[str, float]  # cycles of each pipe, all schedulers together; of shared memory, wavefronts


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    command = [*compiler(), "-std=c++20", "-O2", "-shared", "-fPIC"]
    digest = hashlib.sha256("\0".join([*command, source.read_text()]).encode()).hexdigest()[:16]
    library = BUILT / f"multiprocessor-{digest}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(source), "-o", str(own)], check=True)
        os.replace(own, library)
    loaded = ctypes.CDLL(str(library))
    loaded.simulate.restype = ctypes.c_double
    return loaded


def simulate(
    code: Sequence[Instruction],
    controls: Sequence[Control],
    traced: Trace,
    resident: int,
    blocks: int,
    machine: Machine,
    sharing: int | None = None,
) -> Result:
    """Run `blocks` blocks, `resident` at a time, all as `traced`.

    Args:
        sharing: how many multiprocessors share L2 and DRAM; all if None.

    Raises:
        RuntimeError: warps wait for each other for ever.
    """
    static = np.zeros(len(code), _STATIC)
    for number, (one, control) in enumerate(zip(code, controls, strict=True)):
        found = described(one, machine)
        static[number] = (
            *(ACTS.index(found.act), PIPES.index(found.pipe), control.stall, control.written),
            *(control.read if found.board < 0 else found.board, control.wait, found.count, KINDS.index(found.kind)),
            *(found.interval, found.latency, found.read_latency),
        )
    lengths = [len(path) for path in traced.paths]
    entries = np.zeros(sum(lengths), _DYNAMIC)
    for name, parts in (("number", traced.paths), *((name, getattr(traced, name)) for name in _DYNAMIC.names[1:])):
        entries[name] = np.concatenate(parts)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sharing = sharing or machine.multiprocessors
    rates = {
        "l2_rate": min(machine.l2_rate, machine.l2_all / sharing),
        "dram_rate": min(machine.l2_rate, machine.dram_all / sharing),
    }
    given = np.array([rates.get(name, getattr(machine, name, 0.0)) for name in _MACHINE], np.float64)
    waits, busy = np.zeros((len(code), len(REASONS))), np.zeros(8)
    ends, issued = np.zeros(blocks), ctypes.c_int64()
    counts = map(ctypes.c_int64, (traced.warps, resident, blocks))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (static, entries, starts)]
    results = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, waits, busy, ends)]
    cycles = _library().simulate(*pointers, *counts, *results, ctypes.byref(issued))
    if cycles < 0:
        raise RuntimeError("every warp waits for another: a barrier that not all warps reach")
    return Result(cycles, ends, issued.value, waits, dict(zip(PIPES, busy.tolist(), strict=True)))
