# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels run on the CPU: their PTX, translated to C++ and executed by the emulation of ``emulated_cuda``.

Example:
    >>> program = Program(ptx, "_product")
    >>> program.launch((4, 2), 128, shared=16384, arguments=[x, weight, out, 64, 0.5])
    >>> program.counts()["mma"]
    96.0

What the kernel may touch are the tensors among the arguments, each of them alone: it sees them 2⁴⁰ bytes apart, so that
an access past one is outside of all. That, a race, lanes of one instruction that write different values to one place, a
deadlock, a barrier that not all reach, and shared memory read before it was written raise `EmulationFault`, which names
the instruction and the thread. ptxas, wgmma, bank conflicts and time are not seen.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from support import ROOT, TESTS
from support.emulation import EMULATION, FLAGS, KERNELS, Buffer, EmulationFault, compiler, may_access, precompiled

from .parse import Kernel, Statement, parse, size_of
from .translate import translate

BUILT = ROOT / "build" / "ptx"
OPTIONS = [*FLAGS.replace("-g1 ", "").replace("-Wall -Wextra", "-w").split(), "-fwrapv"]


class Program:
    """A kernel of a PTX text, compiled for this machine.

    Args:
        text: PTX.
        name: the entry; may be left out if there is one.
    """

    def __init__(self, text: str, name: str | None = None) -> None:
        kernels = parse(text)
        self.kernel = kernels[name] if name else next(iter(kernels.values()))
        code, self.stretches = translate(self.kernel)
        self.visits = (ctypes.c_int64 * len(self.stretches))()
        self._library = ctypes.CDLL(str(_build(code, _cell(self.kernel))))
        self._library.ptx_launch.restype = ctypes.c_char_p
        self._written = written(self.kernel)

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        *,
        shared: int = 0,
        arguments: Sequence[torch.Tensor | int | float],
        seed: int = 0,
    ) -> None:
        """Run the kernel; `arguments` are its parameters in order, those left out at the end being null.

        Raises:
            EmulationFault: the kernel does what it must not.
        """
        blocks = (*grid, 1, 1)[:3]
        assert blocks[2] == 1, f"a grid of {grid}: two dimensions are emulated"
        packed, buffers = bytearray(self.kernel.parameter_bytes), []
        for index, (parameter, value) in enumerate(zip(self.kernel.parameters, arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cpu", parameter.name
                # On 16 bytes and on no more, as PyTorch's allocator and the launches promise.
                address = ((index + 1) << 40) + 16
                buffers.append(Buffer.of(value, address, index in self._written))
                value = address
            kind = {"f32": "<f", "f64": "<d"}.get(parameter.type)
            if kind:
                struct.pack_into(kind, packed, parameter.offset, value)
            else:
                size = parameter.size
                packed[parameter.offset : parameter.offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        self.run(blocks[0], blocks[1], threads, shared, bytes(packed), buffers, seed)

    def run(
        self,
        blocks_x: int,
        blocks_y: int,
        threads: int,
        shared: int,
        parameters: bytes,
        buffers: Sequence[Buffer],
        seed: int,
    ) -> None:
        """The same with the parameters' bytes, by which the kernel knows the buffers."""
        may_access(self._library, buffers)
        numbers = map(ctypes.c_int64, (blocks_x, blocks_y, threads, shared + self.kernel.shared_size))
        ctypes.memset(self.visits, 0, ctypes.sizeof(self.visits))
        report = self._library.ptx_launch(
            ctypes.c_uint64(seed), *numbers, parameters, self.visits, ctypes.c_int64(len(self.stretches))
        )
        if report is not None:
            found = report.decode()
            lines = sorted({int(line) for line in re.findall(r"kernel\.ptx:(\d+)", found)})
            shown = "".join(f"\n  {line}: {self.kernel.source(line)}" for line in lines)
            raise EmulationFault(f"{self.kernel.name}, seed {seed}: {found}{shown}")

    def counts(self) -> Counter[str]:
        """How many instructions warps executed in the last launch, by `kind_of` and in all: those of all threads, by
        32. What a predicate switches off is among them, since it is issued."""
        found: Counter[str] = Counter()
        for visits, stretch in zip(self.visits, self.stretches, strict=True):
            for statement in stretch:
                for kind in ("all", kind_of(statement)):
                    found[kind] += visits
        return Counter({kind: round(count / 32) for kind, count in found.items()})


KINDS = {
    "mma": "mma",
    "ldmatrix": "ldmatrix",
    "bar": "barrier",
    "shfl": "shuffle",
    "vote": "shuffle",
    "rem": "div",
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"), "special"),
    **dict.fromkeys(("fma", "mul", "add", "sub"), "float"),
}


def kind_of(s: Statement) -> str:
    """The class that an instruction is counted in."""
    if s.base in ("ld", "st"):
        return f"{s.base}.{s.modifiers[0]}"
    if s.base == "cp":
        return "cp.async" if "shared" in s.modifiers else "other"
    if s.base == "div":
        return "div" if s.type != "f32" else "special"
    if s.base in ("fma", "mul", "add", "sub"):
        return "float" if s.type in ("f32", "f16x2") else "integer"
    if s.base == "cvt":
        return "convert" if {"f32", "bf16", "f16", "bf16x2", "f16x2"} & set(s.modifiers) else "integer"
    return KINDS.get(s.base, "other" if s.base in ("mov", "bra", "ret") else "integer")


def written(kernel: Kernel) -> set[int]:
    """The parameters through which the kernel stores: those from which the addresses of its stores are computed."""
    index = {p.name: i for i, p in enumerate(kernel.parameters)}
    origins: dict[str, set[int]] = {}
    before = -1
    while before != (before := sum(map(len, origins.values()))):
        for s in kernel.statements:
            if not s.opcode or s.base in ("st", "bra", "ret", "mma", "shfl", "setp"):
                continue
            if s.base == "ld" and s.modifiers[0] != "param" or s.base == "cp":
                continue
            to, *of = s.operands
            found = origins.setdefault(to, set()) if isinstance(to, str) else set()
            for operand in of:
                for name in operand if isinstance(operand, tuple) else (_base(operand),):
                    found |= origins.get(name, set())
                    if name in index and size_of(kernel.parameters[index[name]].type) == 8:
                        found.add(index[name])
    stored = [_base(s.operands[0]) for s in kernel.statements if s.opcode.startswith("st.global")]
    return set().union(*(origins.get(address, set()) for address in stored))


def _base(address: str) -> str:
    return re.match(r"[%\w$]*", address)[0]


def _cell(kernel: Kernel) -> int:
    """Bytes of the smallest access."""
    return min(size_of(s.type) for s in kernel.statements if s.base in ("ld", "st") and s.modifiers[0] != "param")


def _command(cell: int) -> list[str]:
    return [*compiler(), *OPTIONS, f"-DMVIT_CELL_BYTES={min(cell, 2)}", f"-I{KERNELS}", f"-I{TESTS / 'support'}"]


@functools.cache
def _operations(cell: int) -> Path:
    """The folder of ``operations.h``, which is ptx.h: compiled once (half of a small kernel's time)."""
    read = "".join(path.read_text() for path in (KERNELS / "simt.h", *sorted(EMULATION.glob("*.h"))))
    text = "#include <emulated_cuda/ptx.h>\n"
    return precompiled(BUILT, "operations.h", text, tuple(_command(cell)), read).parent


def _build(code: str, cell: int) -> Path:
    """The library of a translated kernel."""
    operations = _operations(cell)
    library = operations / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        own = library.with_suffix(f".{os.getpid()}.so")
        source = own.with_suffix(".cpp")
        source.write_text(f"#include <operations.h>\nusing namespace mvit;\n{code}")
        command = [*_command(cell), f"-I{operations}", str(source), "-o", str(own)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{source} does not compile:\n{result.stderr[:4000]}"
        source.unlink()
        os.replace(own, library)
    return library
