# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc compiles them, executed on the CPU: a `Driver` whose launches run PTX.

Example:
    >>> driver = CompiledDriver("rows")       # in place of Driver("rows"), whose launches run the source
    >>> driver.linear_residual(seed, x, weight, bias, residual, out, …, writes=[out])

The driver's host code plans the launch, and hands over the kernel's name and its parameters; nvcc's PTX of that kernel
for sm_80 is then what is executed, with the driver's buffers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gates.cuda_gate import FLAGS, tool
from support.cuda_sources import FOLDER, Source, cuda_sources
from support.emulation import Driver

from .program import BUILT, Program

ARCH = 80
_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *([ctypes.c_int64] * 4), ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def ptx(source: Source) -> str:
    """What nvcc makes of a source; compiled anew when it, a header or nvcc is another."""
    command = [tool("nvcc"), *FLAGS.split(), source.define, f"-arch=compute_{ARCH}", "-ptx", str(source.path)]
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    read = [path.read_text() for path in (*sorted(FOLDER.glob("*.h")), source.path)]
    digest = hashlib.sha256("\0".join([version, *command, *read]).encode()).hexdigest()[:16]
    file = BUILT / f"{source.name}-{digest}.ptx"
    if not file.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(own)], check=True)
        os.replace(own, file)
    return file.read_text()


def text_of(kernel: str) -> str:
    """The PTX that has a kernel, by its mangled name.

    Raises:
        LookupError: no source of csrc/cuda has it.
    """
    for source in cuda_sources():
        if f"{len(source.path.stem)}{source.path.stem}I" not in kernel:
            continue
        value = f"Li{source.value}E" if source.value.isdigit() else f"{len(source.value)}{source.value}E"
        if value in kernel and f".entry {kernel}(" in ptx(source):
            return ptx(source)
    raise LookupError(f"no source of csrc/cuda has the kernel {kernel}")


class Launch(NamedTuple):
    """A launch that was executed: the kernel's mangled name, how it was launched, and what `Program.counts` gives."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    counts: Counter[str]


class CompiledDriver(Driver):
    """See the module. `change` is applied to the PTX: it plants faults. `launched` are the launches so far."""

    def __init__(self, name: str, change: Callable[[str], str] = lambda text: text) -> None:
        super().__init__(name)
        self.change = change
        self.programs: dict[str, Program] = {}
        self.launched: list[Launch] = []

    def _call(self, function: str, seed: int, *arguments: Any, writes: Sequence[torch.Tensor] = ()) -> None:
        raised: list[BaseException] = []
        before = len(self.launched)

        def launch(kernel, blocks_x, blocks_y, threads, shared, parameters, count):
            try:
                name = kernel.decode()
                if name not in self.programs:
                    self.programs[name] = Program(self.change(text_of(name)), name)
                program = self.programs[name]
                given = ctypes.string_at(parameters, count)
                program.run(blocks_x, blocks_y, threads, shared, given, self.buffers, seed)
                self.launched.append(Launch(name, blocks_x * blocks_y, threads, shared, program.counts()))
            except BaseException as error:  # nothing passes through C++
                raised.append(error)

        watcher = _LAUNCH(launch)
        self._library.emulation_watch(watcher)
        try:
            super()._call(function, seed, *arguments, writes=writes)
        finally:
            self._library.emulation_watch(_LAUNCH())
        if raised:
            raise raised[0]
        # A driver that emulates a kernel itself would run its source, and every test of compiled code would pass.
        assert len(self.launched) > before or not writes, f"emulated_cuda/{self.name}.cpp: {function} executed no PTX"
