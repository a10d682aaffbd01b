# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels run on the CPU, from their own source: compiled beside ``emulated_cuda/simt.h``, called by ctypes.

Example:
    >>> driver = Driver("patch_attention")                     # compiles emulated_cuda/patch_attention.cpp
    >>> driver.forward(seed, qkv, out, writes=[out])           # its extern "C" const char* forward(uint64_t, void*, …)

A driver's functions take int64_t, double and pointers, launch kernels by ``emulation::emulate`` and return what that
reports. A call raises `EmulationFault` for a race, a deadlock, memory read before it was written, and every access out
of a tensor that the call names or to a tensor that `writes` does not. `Driver.on_host` is for functions that launch
nothing. Nothing is seen of the hardware's rounding inside a product, of time, or of bank conflicts other than
`Driver.matrix_conflicts`.

`faults` plants errors: (file, text, other text), the text being there once; the file may be left out. Such drivers
are compiled for one test each, so there are macros that leave out what it does not need.

`load_operators` does the same for the bindings: ``mvit_kernels::<operator>.cuda`` then takes CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from . import ROOT, TESTS
from .cuda_sources import Source, cuda_sources

KERNELS = ROOT / "csrc" / "cuda"
EMULATION = TESTS / "support" / "emulated_cuda"
BUILT = ROOT / "build" / "emulation"
# Contracted, products would be more exact than the hardware's sums. Fortified, longjmp refuses to change stacks.
FLAGS = "-std=c++20 -O1 -g1 -fPIC -shared -ffp-contract=off -U_FORTIFY_SOURCE -DMVIT_EMULATED -Wall -Wextra"


class EmulationFault(AssertionError):
    """What a kernel did that it must not, by the emulation's report."""


class Buffer(NamedTuple):
    """Memory at `host` that kernels know as `begin`."""

    begin: int
    size: int
    writable: bool
    host: int

    @classmethod
    def of(cls, tensor: torch.Tensor, begin: int, writable: bool) -> Buffer:
        # From the first element to the last, whatever lies between them.
        elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(begin, elements * tensor.element_size() if tensor.numel() else 0, writable, tensor.data_ptr())


def may_access(library: ctypes.CDLL, buffers: Sequence[Buffer]) -> None:
    """What the kernels of a library may access from now on, and nothing else."""
    library.emulation_forget_buffers()
    for buffer in buffers:
        library.emulation_add_buffer(*map(ctypes.c_uint64, buffer))


class Driver:
    """``emulated_cuda/<name>.cpp``, compiled; see the module. One launch at a time: it is no use to threads."""

    def __init__(self, name: str, faults: Sequence[tuple[str, ...]] = (), macros: Sequence[str] = ()) -> None:
        self.name = name
        self.buffers: Sequence[Buffer] = ()  # what the call may access
        self._library = ctypes.CDLL(str(_build(name, tuple(faults), tuple(macros))))

    def matrix_conflicts(self) -> int:
        """How often two rows of a matrix that was loaded at once lay in the same banks, over all launches so far."""
        self._library.emulation_matrix_conflicts.restype = ctypes.c_int64
        return self._library.emulation_matrix_conflicts()

    def __getattr__(self, function: str) -> Any:
        return functools.partial(self._call, function)

    def on_host(self, function: str, *arguments: Any) -> None:
        """Call a function that launches nothing: its tensors are memory of the host's, with nothing checked."""
        given = (_as_c(value, torch.Tensor.data_ptr) for value in arguments)
        getattr(self._library, function)(ctypes.c_uint64(0), *given)

    def _call(self, function: str, seed: int, *arguments: Any, writes: Sequence[torch.Tensor] = ()) -> None:
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        storages = sorted({tensor.untyped_storage().data_ptr() for tensor in tensors})

        def address(tensor: torch.Tensor) -> int:
            """Every storage is 2⁴⁰ bytes from the others, so that what leaves one is in no other."""
            host = tensor.untyped_storage().data_ptr()
            return (storages.index(host) + 1 << 40) + host % 4096 + tensor.data_ptr() - host

        self.buffers = [Buffer.of(t, address(t), any(t is other for other in writes)) for t in tensors]
        may_access(self._library, self.buffers)
        call = getattr(self._library, function)
        call.restype = ctypes.c_char_p
        report = call(ctypes.c_uint64(seed), *(_as_c(value, address) for value in arguments))
        if report is not None:
            raise EmulationFault(f"{self.name}.{function}, seed {seed}: {report.decode()}")


def _as_c(value: Any, address: Callable[[torch.Tensor], int]) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(address(value) if value is not None and value.numel() else None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def compiler() -> list[str]:
    """The C++ compiler; the test is skipped where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    return found or pytest.skip("no C++ compiler")


@functools.cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def precompiled(folder: Path, name: str, text: str, command: tuple[str, ...], read: str = "") -> Path:
    """A header of that name and text in a folder below `folder`, compiled once for `command` by gcc, which takes what
    it has compiled where the header comes first; clang would not. Another `read`, what it includes, makes another."""
    release = version(command[0])
    header = folder / hashlib.sha256("\0".join([release, *command, text, read]).encode()).hexdigest()[:16] / name
    if not header.exists():
        header.parent.mkdir(parents=True, exist_ok=True)
        own = header.parent / f"{os.getpid()}.h"
        own.write_text(text)
        if "clang" not in release:
            result = subprocess.run([*command, "-xc++-header", str(own), "-o", f"{own}.gch"], stderr=subprocess.PIPE)
            assert result.returncode == 0, f"{name} does not compile:\n{result.stderr.decode()[:4000]}"
            os.replace(f"{own}.gch", f"{header}.gch")
        os.replace(own, header)
    return header


def _standard(command: list[str]) -> list[str]:
    """The arguments that put ``emulated_cuda/standard.h`` before a source, compiled for `command`."""
    return ["-include", str(precompiled(BUILT, "standard.h", (EMULATION / "standard.h").read_text(), tuple(command)))]


@functools.cache
def _build(name: str, faults: tuple[tuple[str, ...], ...], macros: tuple[str, ...]) -> Path:
    """The driver's library; compiled anew when a source, the compiler or a fault is another."""
    # What is compiled for one test runs once: the compiler is most of its time, and quicker without optimisation.
    command = [*compiler(), *FLAGS.split()]
    if macros:
        command += ["-O0"]
        command += [*_standard(command), *(f"-D{macro}" for macro in macros)]
    files = {path.name: path.read_text() for kind in ("*.h", "*.cu") for path in sorted(KERNELS.glob(kind))}
    for *file, text, other in faults:
        places = [name for name in file or files for _ in range(files[name].count(text))]
        assert len(places) == 1, f"{text!r} is at {len(places)} places, of {places}; a fault is planted at one"
        files[places[0]] = files[places[0]].replace(text, other)
    own = [path.read_text() for path in (*sorted(EMULATION.glob("*.h")), EMULATION / f"{name}.cpp")]
    digest = hashlib.sha256("\0".join([version(command[0]), *command, *own, *files.values()]).encode()).hexdigest()[:16]
    library = BUILT / f"{name}-{digest}.so"
    if not library.exists():
        changed = BUILT / f"{name}-{digest}.{os.getpid()}"  # the files as they are compiled, faults and all
        changed.mkdir(parents=True)
        for file_name, text in files.items():
            (changed / file_name).write_text(text)
        source = EMULATION / f"{name}.cpp"
        paths = [f"-I{changed}", f"-I{TESTS / 'support'}"]
        result = subprocess.run(
            [*command, *paths, str(source), "-o", str(changed / "built.so")], capture_output=True, text=True
        )
        assert result.returncode == 0, f"{source.name} does not compile:\n{result.stderr}"
        os.replace(changed / "built.so", library)
        shutil.rmtree(changed)
    return library


ROWS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
KERNELS_OF = {  # the kernels that an operator's bindings launch
    "layer_norm_linear": ("row_product_kernel",),
    "linear_residual": ("row_product_kernel",),
    "layer_norm_mlp": ("layer_norm_mlp_kernel", "few_rows_mlp_kernel"),
    "patch_attention": (
        "patch_attention_kernel",
        "patch_attention_backward_kernel",
        "patch_attention_backward_whole_kernel",
    ),
    "transformer": ("transformer_kernel",),
    "inverted_residual": ("inverted_residual_kernel",),
}


@functools.cache
def load_operators(*operators: str) -> None:
    """Register ``mvit_kernels::<operator>.cuda`` for CPU tensors: the bindings of csrc/cuda and its launches, compiled
    for the emulation; the row-wise ones and patch_attention if none is named. A launch's fault is the error that the
    operator raises."""
    operators = operators or ("patch_attention", *ROWS)
    headers = Path(torch.__file__).parent / "include"
    command = [*compiler(), *FLAGS.split(), "-O0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [*_standard(command), f"-I{KERNELS}", f"-I{TESTS / 'support'}"]
    command += [f"-isystem{path}" for path in (headers, headers / "torch" / "csrc" / "api" / "include")]
    wanted = {kernel for name in operators for kernel in KERNELS_OF[name]}
    kernels = [source for source in cuda_sources() if source.path.stem in wanted]
    bindings = [KERNELS / f"{name}.cpp" for name in operators]
    headers_of_ours = (*sorted(KERNELS.glob("*.h")), *sorted(EMULATION.glob("*.h")))
    read = (*bindings, *(kernel.path for kernel in kernels), *headers_of_ours)
    defines = [kernel.define for kernel in kernels]
    text = "\0".join([torch.__version__, *command, *defines, *(path.read_text() for path in read)])
    library = BUILT / f"operators-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

            def build(source: Source | Path) -> str:
                built = f"{folder}/{source.name}.o"
                what = [source.define, source.path] if isinstance(source, Source) else [source]
                result = subprocess.run([*command, "-c", "-xc++", *what, "-o", built], capture_output=True, text=True)
                assert result.returncode == 0, f"{source.name} does not compile for the emulation:\n{result.stderr}"
                return built

            linked = f"{folder}/operators.so"
            torch_library = [f"-L{headers.parent / 'lib'}", "-ltorch_cpu"]
            objects = pool.map(build, [*bindings, *kernels])
            subprocess.run([*compiler(), "-shared", *objects, *torch_library, "-o", linked], check=True)
            os.replace(linked, library)
    torch.ops.load_library(str(library))
