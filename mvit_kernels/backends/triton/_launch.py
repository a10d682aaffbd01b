# SPDX-License-Identifier: Apache-2.0
"""Launching kernels at a few microseconds of host time, and registering them.

Example:
    >>> plan = Plan(_kernel, (K, N, BM), num_warps=4, num_stages=2)     # one for each kind of call, kept by the caller
    >>> plan((grid,), (x, out), (rows,))

``kernel[grid](…)`` inspects every argument to find the compiled variant: 9.8 µs a launch, measured with a driver that
does nothing. The compiled kernel's own ``run`` takes 1.8 µs. So a `Plan` holds what selects the variant (the constants,
and through its cache key the dtypes) and keeps the compiled kernel for the one thing left, the alignment of pointers:
all on 16 bytes, as PyTorch's allocator returns them. Other calls take the slow path, where Triton finds the variant.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..library import LIBRARY
from . import assembler
from .target import DEVICE_TYPE, DTYPES, INTERPRETED

# For every launch. Triton 3.9 warns if it is not given, and its default is about to change.
FP_FUSION = True


class Launch(NamedTuple):
    """A launch that is prepared, or that `watching` recorded."""

    plan: Plan
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    scalars: tuple[int | float, ...]

    def run(self) -> None:
        """Launch it, on the current stream of the tensors' device; nothing where there is nothing to compute."""
        if 0 not in self.grid:
            self.plan(self.grid, self.tensors, self.scalars)


_watcher: list[Launch] | None = None
_target: int | None = None  # the architecture to plan for, when nothing is launched


class Plan:
    """One kernel with its constants and options, and its compiled form for each device."""

    __slots__ = ("kernel", "constants", "num_warps", "num_stages", "registers", "_compiled")

    def __init__(
        self,
        kernel: Any,
        constants: tuple[Any, ...],
        *,
        num_warps: int,
        num_stages: int,
        registers: int | None = None,
    ) -> None:
        self.kernel, self.constants = kernel, constants
        self.num_warps, self.num_stages, self.registers = num_warps, num_stages, registers
        self._compiled: dict[int, Any] = {}  # device index -> compiled kernel, for 16-byte-aligned pointers

    def __call__(
        self, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], scalars: tuple[int | float, ...] = ()
    ) -> None:
        """Launch on the current stream of the tensors' device, which is that of the first tensor (never None).

        The kernel takes the tensors, the scalars and the constants, in this order. Scalars are not specialised on
        (``do_not_specialize``), and their types are annotated or always 32 bits wide.

        Args:
            grid: one to three numbers of programs.
            tensors: all on one device; None for absent ones.
            scalars: ints and floats.
        """
        if _watcher is not None:
            _watcher.append(Launch(self, grid, tensors, scalars))
            if _target is not None:
                return
        if INTERPRETED:
            self.kernel[grid](*tensors, *scalars, *self.constants)
            return
        device = tensors[0].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device, grid, tensors, scalars)
        else:
            self._launch(device, grid, tensors, scalars)

    def _launch(self, device, grid, tensors, scalars) -> None:
        addresses = 0
        for tensor in tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        aligned = not addresses & 15
        compiled = self._compiled.get(device) if aligned else None
        if compiled is None or _profiled():
            compiled = self.by_triton(device, grid, (*tensors, *scalars, *self.constants))
            if aligned:
                self._compiled[device] = compiled
            return
        x, y, z = (*grid, 1, 1)[:3]
        compiled.run(
            x,
            y,
            z,
            driver.active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,  # launch metadata, enter and exit hooks: only profilers use them, see _profiled
            None,
            None,
            *tensors,
            *scalars,
            *self.constants,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with. `registers` is the most that a thread may have, where that is limited."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def by_triton(self, device: int, grid: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        """Launch as Triton itself does, which compiles the kernel or finds it; return the compiled kernel.

        Args:
            device: the index of the current device.
            grid: as of a call.
            arguments: of the kernel, the constants included.
        """
        with assembler.sound(_architecture(device)) as options:
            return self.kernel[grid](*arguments, **self.options, **options)


def _profiled() -> bool:
    """Whether a profiler hooks into Triton's launches: the fast path would not call its hooks."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def architecture(x: Tensor) -> int:
    """80, 86, 89, 90, 100 or 120: that of x's device, or the one planned for. The interpreter uses the tiles of 90."""
    if _target is not None:
        return _target
    return 90 if INTERPRETED else _architecture(x.get_device())


@functools.cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_small(arch: int) -> bool:
    """Whether `arch` is compute capability 8.x or 12.x. There products are mma.sync's, with operands in registers, and
    a block of 8.6, 8.9 and 12.0 has 99 KB of shared memory. 9.0 and 10.0 have wgmma and tcgen05, and 227 KB."""
    return arch < 90 or arch >= 120


@contextlib.contextmanager
def watching(target: int | None = None) -> Iterator[list[Launch]]:
    """Record every launch inside. With `target`, an architecture, plan for it and launch nothing.

    Example:
        >>> with watching(target=90) as launches:
        ...     layer_norm_linear.forward(x.to("meta"), …)
    """
    global _watcher, _target
    before = _watcher, _target
    _watcher, _target = [], target
    try:
        yield _watcher
    finally:
        _watcher, _target = before


def kind_of(dtype: torch.dtype) -> str:
    """The kind of tiles for a dtype: "half"; for float32 "tf32" if PyTorch's precision setting allows it, else "ieee".

    PyTorch has two settings, `torch.set_float32_matmul_precision` and `torch.backends…fp32_precision`. The latter tells
    what either asks for; the former's getter raises once the latter was set.

    Raises:
        TypeError: there are no kernels for the dtype.
    """
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    if dtype not in DTYPES:
        raise TypeError(f"mvit_kernels: {dtype} has no Triton kernels; float32, bfloat16 and float16 have")
    return "half"


def register(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``mvit_kernels::<name>.triton``: on GPUs, or on the CPU if interpreted."""

    def decorate(function: Callable) -> Callable:
        LIBRARY.impl(f"{name}.triton", function, DEVICE_TYPE.upper())
        return function

    return decorate


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with those that are not contiguous copied. That concerns weights and gradients: calls whose
    activations are not contiguous are declined (see operators.py), so that no copy comes as a surprise."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def chunked(width: int, widest: int, most: int | None = None) -> tuple[int, int]:
    """(chunk, chunks) that cover `width`: the widest power of two, from 16 up to `widest`, with the least waste.

    16 is the smallest that tensor cores take. With `most`, as many chunks as that number of columns allows.

    Example:
        >>> chunked(144, 64), chunked(192, 64), chunked(240, 64), chunked(120, 64), chunked(20, 64)
        ((16, 9), (64, 3), (64, 4), (64, 2), (32, 1))
    """
    best = None
    chunk = 16
    while chunk <= widest:
        chunks = ceil_div(width, chunk)
        waste = chunks * chunk - width
        # up to 10 % of waste for fewer chunks: 240 is 4 · 64 and not 15 · 16, which needs more registers
        if best is None or waste <= best[2] or waste * 10 <= width:
            best = chunk, chunks, waste
        chunk *= 2
    chunk, chunks, _ = best
    return chunk, min(chunks, max(most // chunk, 1)) if most else chunks
