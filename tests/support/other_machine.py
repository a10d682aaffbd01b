# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu on another processor: compiled for it, and run by an emulator of it.

Example:
    >>> with machine("aarch64"):
    ...     check("patch_attention", dict(…), path="cpu")         # any code: C++ operators inside run over there

What runs is every source of csrc/cpu as its CMakeLists.txt compiles it, kernels and fronts, as a program without torch
(support/machine: a stand-in for torch's headers, and the program's end of the pipe). A call sends its arguments, bytes,
strides, alignment and all, and receives the results. It fails if an argument was written, or memory around a tensor;
memory that nothing wrote is NaN. Threads run one after another, each with its own share of the work.

The compiler is a cross compiler of the system's or the ``ziglang`` package, the emulator qemu's user mode. Where one is
missing the tests are skipped, and say what to install.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvit_kernels.backends import cpu

from . import ROOT, TESTS

BUILT = ROOT / "build" / "machine"
DTYPES = {torch.uint8: 0, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


class Machine(TorchDispatchMode):
    """A running program; inside ``with`` it serves every ``mvit_kernels::<operator>.cpu``.

    Attributes:
        facts: what `mvit_kernels.backends.cpu` asks of the library: "isa", "plain_isa", "vector_bytes",
            "bf16_products".
        calls: the operators that ran there, in order.
    """

    def __init__(self, command: list[str]) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.facts = {"isa": self._read_bytes(), "plain_isa": self._read_bytes()}
        self.facts |= {"vector_bytes": self._read_int(), "bf16_products": self._read_int()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mvit_kernels" and func._overloadname == "cpu":
            assert not kwargs, f"{func}: arguments by name are not sent"
            return self.call(func._schema.name.split("::")[1] + ".cpu", args)
        return func(*args, **(kwargs or {}))

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """One operator, as ``torch.ops`` would call it.

        Raises:
            RuntimeError: with the operator's own message; or the emulator died, with its exit status.
        """
        message = [struct.pack("<q", torch.get_num_threads()), _text(name.encode()), struct.pack("<q", len(args))]
        self.calls.append(name)
        self._process.stdin.write(b"".join([*message, *map(_value, args)]))
        self._process.stdin.flush()
        error = self._read_bytes()
        if error:
            raise RuntimeError(error.decode())
        results = tuple(self._read_tensor() for _ in range(self._read_int()))
        return results if len(results) > 1 else results[0]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _read(self, count: int) -> bytes:
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"{self._process.args} died with status {self._process.wait()}")
        return data

    def _read_int(self) -> int:
        return struct.unpack("<q", self._read(8))[0]

    def _read_bytes(self) -> bytes:
        return self._read(self._read_int())

    def _read_tensor(self) -> torch.Tensor:
        code, *sizes = (self._read_int() for _ in range(self._read_int()))
        tensor, data = torch.empty(sizes, dtype=DTYPE_OF[code]), self._read_bytes()
        ctypes.memmove(tensor.data_ptr(), data, len(data))
        return tensor


def _text(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def _ints(values: Any) -> bytes:
    return struct.pack(f"<{len(values) + 1}q", len(values), *values)


def _value(value: Any) -> bytes:
    """An argument: its kind, and what a value of the kind has."""
    if value is None:
        return struct.pack("<q", 0)
    if isinstance(value, int):  # bool too
        return struct.pack("<qq", 1, value)
    if isinstance(value, float):
        return struct.pack("<qd", 2, value)
    if isinstance(value, str):
        return struct.pack("<q", 3) + _text(value.encode())
    if isinstance(value, torch.Tensor):
        return struct.pack("<q", 5) + _tensor(value)
    if value and isinstance(value[0], torch.Tensor):
        return struct.pack("<qq", 6, len(value)) + b"".join(map(_tensor, value))
    return struct.pack("<q", 4) + _ints(value)


def _tensor(tensor: torch.Tensor) -> bytes:
    """dtype, sizes, strides, the address modulo 64, and the memory from the first element to the last."""
    elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    data = ctypes.string_at(tensor.data_ptr(), elements * tensor.element_size()) if tensor.numel() else b""
    head = struct.pack("<q", DTYPES[tensor.dtype]) + _ints(tensor.shape) + _ints(tensor.stride())
    return head + struct.pack("<q", tensor.data_ptr() % 64) + _text(data)


# ---------------------------------------------------------------------------------------------- compiler and emulator


def why_not(processor: str) -> str:
    """Why there is no machine of that processor here, and what to install; "" if there is one."""
    if _compiler(processor) is None:
        return f"no compiler for {processor}: apt install g++-{processor}-linux-gnu, or pip install ziglang"
    if _emulator(processor) is None:
        return f"no emulator of {processor}: apt install qemu-user"
    return ""


def _compiler(processor: str) -> list[str] | None:
    """The command that compiles for it; MVIT_KERNELS_CXX_AARCH64 names another."""
    named = os.environ.get(f"MVIT_KERNELS_CXX_{processor.upper()}", "").split()
    if named:
        return named
    system = shutil.which(f"{processor}-linux-gnu-g++")
    if system:
        return [system]
    zig = importlib.util.find_spec("ziglang")
    if zig is None:
        return None
    return [str(Path(zig.submodule_search_locations[0], "zig")), "c++", "-target", f"{processor}-linux-musl"]


def _emulator(processor: str) -> str | None:
    return shutil.which(f"qemu-{processor}") or shutil.which(f"qemu-{processor}-static")


@functools.cache
def build(processor: str) -> Path:
    """The program for `processor`; nothing is compiled anew that is there and not older than its sources."""
    compiler = _compiler(processor)
    folder = BUILT / f"{processor}-{Path(compiler[0]).name}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(BUILT / "zig"), "ZIG_LOCAL_CACHE_DIR": str(BUILT / "zig")}
    settings = {
        "CMAKE_PROJECT_INCLUDE": TESTS / "support" / "machine" / "machine.cmake",
        "CMAKE_CXX_COMPILER": ";".join(compiler),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_MAKE_PROGRAM": _tool("ninja", "BIN_DIR"),
        "Python_EXECUTABLE": sys.executable,
    }
    # The portable set alone: on this processor the others have tests of their own, on another they do not compile.
    listed = (ROOT / "csrc" / "cpu" / "CMakeLists.txt").read_text()
    settings |= {f"COMPILES_FOR_{isa}": "OFF" for isa in re.findall(r"^instruction_set\((\w+)", listed, re.M)}
    configure = [_tool("cmake", "CMAKE_BIN_DIR"), "-G", "Ninja", "-S", str(ROOT / "csrc" / "cpu"), "-B", str(folder)]
    with _locked(folder):
        for command in (
            [*configure, *(f"-D{name}={value}" for name, value in settings.items())],
            [settings["CMAKE_MAKE_PROGRAM"], "-C", str(folder), "machine"],
        ):
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{' '.join(map(str, command))}:\n{run.stdout[-4000:]}{run.stderr[-4000:]}"
    return folder / "machine"


def _tool(name: str, folder: str) -> str:
    package = importlib.util.find_spec(name) and importlib.import_module(name)
    own = Path(getattr(package, folder, ""), name)
    found = str(own) if own.is_file() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def machine(processor: str) -> Iterator[Machine]:
    """A machine of that processor that serves the C++ operators inside; skipped where there is none."""
    reason = why_not(processor)
    if reason:
        pytest.skip(reason)
    served = Machine([_emulator(processor), str(build(processor))])
    try:
        with mock.patch.object(cpu, "_ask", lambda what, kind=int: served.facts[what]), served:
            yield served
    finally:
        served.close()
