# SPDX-License-Identifier: Apache-2.0
"""A list of launches that is made once and run many times, in other memory each time.

Example:
    >>> memory = Memory([image, arena, result])
    >>> steps = [prepare(convolution.launch(memory.view(...), …), memory), …]      # once for each input shape
    >>> run(steps, Memory([image, torch.empty_like(arena), torch.empty_like(result)]))

A network of forty launches has some hundred tensor arguments. Making views of them, choosing plans and asking each for
its address takes 5 to 10 µs a launch. Here all that is done once: a prepared launch holds the compiled kernel and, for
each tensor, the address of a weight or an offset into one of the few stretches of memory that a call has. Then a launch
is a list copied, some additions, and the compiled kernel's own ``run``, which takes addresses as well as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _launch
from ._launch import Launch

FEWEST_BYTES = 16  # to which the memory of every call is aligned, as that of the first one is


class Memory:
    """What the launches of one call read and write: some stretches of memory.

    Args:
        tensors: one for each stretch, on one device.
    """

    __slots__ = ("tensors", "addresses")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def find(self, tensor: Tensor) -> Source | None:
        """Where `tensor` lies in here; None if it does not, as a weight."""
        address = tensor.data_ptr()
        for index, (stretch, start) in enumerate(zip(self.tensors, self.addresses, strict=True)):
            if start <= address < start + _extent(stretch):
                form = tensor.dtype, tuple(tensor.shape), tensor.stride()
                return Source(index, address - start, *form)
        return None


def _extent(tensor: Tensor) -> int:
    """Bytes from the tensor's first element to behind its last one. What lies behind, in the same storage, may be a
    weight: an image need not be there at the next call."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


class Source(NamedTuple):
    """A tensor in a `Memory`: which stretch, how many bytes from its beginning, and the tensor's form."""

    stretch: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, memory: Memory) -> Tensor:
        """The tensor itself."""
        stretch = memory.tensors[self.stretch]
        first = stretch.storage_offset() * stretch.element_size() + self.offset
        view = torch.empty(0, dtype=self.dtype, device=stretch.device)
        return view.set_(stretch.untyped_storage(), first // view.element_size(), self.shape, self.stride)


class Step(Protocol):
    """One thing that a call does, in order."""

    def run(self, memory: Memory, stream: int) -> None:
        """Do it on `stream`, the current one, by the quick path."""

    def run_slowly(self, memory: Memory) -> None:
        """Do it with tensors, as the first call and the interpreter want it."""


class PreparedLaunch:
    """A launch of a Triton kernel. The first run, with `run_slowly`, finds the compiled kernel."""

    __slots__ = ("launch", "_arguments", "_places", "_sources", "_compiled", "_function")

    def __init__(self, launch: Launch, memory: Memory) -> None:
        plan, grid, tensors, scalars = launch
        found = [None if tensor is None else memory.find(tensor) for tensor in tensors]
        self._sources = [(at, source) for at, source in enumerate(found) if source is not None]
        # Tensors of the first call are let go; weights are kept, as they may be copies that the launch was given.
        kept = [None if source is not None else tensor for source, tensor in zip(found, tensors, strict=True)]
        self.launch = Launch(plan, (*grid, 1, 1)[:3], tuple(kept), scalars)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in kept]
        self._arguments = [*addresses, *scalars, *plan.constants]
        self._places = [(at, source.stretch, source.offset) for at, source in self._sources]
        self._compiled: Any = None
        self._function: Callable[..., None] | None = None

    def run(self, memory: Memory, stream: int) -> None:
        if self._function is None:
            return self.run_slowly(memory)
        arguments, addresses = self._arguments.copy(), memory.addresses
        for at, stretch, offset in self._places:
            arguments[at] = addresses[stretch] + offset
        compiled = self._compiled
        # Without launch metadata and hooks, which only profilers use: see `run`.
        metadata = compiled.packed_metadata
        self._function(*self.launch.grid, stream, compiled.function, metadata, None, None, None, *arguments)
        return None

    def run_slowly(self, memory: Memory) -> None:
        plan, grid, tensors, scalars = self.launch
        arguments = list(tensors)
        for at, source in self._sources:
            arguments[at] = source.view(memory)
        arguments += [*scalars, *plan.constants]
        if _launch.INTERPRETED:
            plan.kernel[grid](*arguments)
            return
        compiled = plan.by_triton(memory.tensors[0].get_device(), grid, arguments)
        self._compiled, self._function = compiled, compiled.run


class PreparedCall:
    """A call of an operator that writes into the memory.

    Args:
        function: of the tensors at `sources`.
        sources: what it takes.
    """

    __slots__ = ("function", "sources")

    def __init__(self, function: Callable[..., None], sources: Sequence[Source]) -> None:
        self.function, self.sources = function, tuple(sources)

    def run(self, memory: Memory, stream: int) -> None:
        self.run_slowly(memory)

    def run_slowly(self, memory: Memory) -> None:
        self.function(*(source.view(memory) for source in self.sources))


def run(steps: Sequence[Step], memory: Memory) -> None:
    """Run the steps in order on the current stream of the memory's device.

    Args:
        steps: prepared on this device, in memory of the same alignment (`FEWEST_BYTES`).
        memory: as many stretches as the steps were prepared in, of at least their sizes.
    """
    if _launch.INTERPRETED:
        for step in steps:
            step.run_slowly(memory)
        return
    device = memory.tensors[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(steps, memory)
        return
    if _launch._profiled():  # a profiler's hooks are called by Triton's own launch alone
        for step in steps:
            step.run_slowly(memory)
        return
    stream = _launch.driver.active.get_current_stream(device)
    for step in steps:
        step.run(memory, stream)
