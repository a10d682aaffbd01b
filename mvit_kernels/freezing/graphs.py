# SPDX-License-Identifier: Apache-2.0
"""A native call on a GPU as a CUDA graph for each input shape: ``freeze(model, cuda_graph=True)``.

Forty launches take some 100 µs of Python, and as long on the GPU at batch 1: a graph launches them at once. It always
reads and writes the same memory, so `Graphs` owns an image, an arena and a result for each shape that it keeps: a call
copies its images in, replays, and copies the result out into a tensor of its own. Calls of one shape take turns:
those of other threads wait to enqueue theirs, and those of other streams wait, on the GPU, for the copy out.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._utils.text import some
from .._utils.transforms import is_channels_last

SHAPES = 8  # that `cuda_graph=True` keeps
MORE = ("replace", "run")


class CudaGraphs(NamedTuple):
    """How many CUDA graphs ``freeze(model, cuda_graph=…)`` keeps, and what becomes of further input shapes.

    Example:
        >>> graphs = mvit_kernels.CudaGraphs(shapes=4, more="run")      # for freeze(model.cuda(), cuda_graph=graphs)

    Each shape has buffers of its own on the GPU, which the model owns: the image, the result, and the arena of all maps
    between (for MobileViT-S in bfloat16 at 256 pixels, 6 MB an image).

    Args:
        shapes: at most so many input shapes, at least 1, have a graph. Each is captured at its first call.
        more: "replace" captures a further shape too, in place of the one that was used longest ago; "run" runs further
            shapes without a graph, which suits calls of many shapes: a capture takes milliseconds.

    Where a capture fails, calls of that shape run without a graph, with a RuntimeWarning the first time; whoever wants
    an error has ``warnings.filterwarnings("error", "freeze: no CUDA graph")``.
    """

    shapes: int = SHAPES
    more: str = "replace"


def checked(cuda_graph: bool | int | CudaGraphs) -> CudaGraphs | None:
    """What ``freeze`` was given, as `CudaGraphs`; None for no graphs.

    Raises:
        TypeError, ValueError: it is not what `freeze` takes.
    """
    if isinstance(cuda_graph, bool) or cuda_graph is None:
        return CudaGraphs() if cuda_graph else None
    graphs = CudaGraphs(cuda_graph) if isinstance(cuda_graph, int) else cuda_graph
    if not isinstance(graphs, CudaGraphs) or isinstance(graphs.shapes, bool) or not isinstance(graphs.shapes, int):
        raise TypeError(
            f"freeze: cuda_graph is {cuda_graph!r}; True, a number of input shapes or a CudaGraphs is wanted"
        )
    if graphs.shapes < 1:
        raise ValueError(f"freeze: cuda_graph keeps {graphs.shapes} input shapes; at least 1 is wanted")
    if graphs.more not in MORE:
        raise ValueError(f"freeze: cuda_graph has more={graphs.more!r}; 'replace' or 'run' is wanted")
    return graphs


def check_device(devices: set[torch.device]) -> None:
    """Raise ValueError unless a model's tensors, on `devices`, are on GPUs."""
    if {device.type for device in devices} != {runtime.device_type}:
        where = some(sorted(map(str, devices))) or "nowhere"
        raise ValueError(
            f"freeze: cuda_graph is for models on a GPU, and this one is {'on ' if devices else ''}{where}; move it "
            "with .to('cuda') first"
        )


class CaptureError(RuntimeError):
    """What ran as usual could not be captured."""


_capture = threading.Lock()


@contextlib.contextmanager
def one_capture() -> Iterator[None]:
    """One capture at a time, and no garbage collection in it: that may destroy another model's graph, which CUDA does
    not permit to a thread that captures (pytorch/pytorch#161037)."""
    with _capture:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


class Runtime:
    """The calls of ``torch.cuda`` that graphs take; tests put another in its place, which replays on the CPU."""

    device_type = "cuda"

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which `device` is the current one."""
        return torch.cuda.device(device)

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured, by someone else."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, call: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Run `call` once as usual, which loads its kernels, then capture it; return the replay, on the current
        stream.

        Raises:
            CaptureError: `call` could be run, and not captured.
        """
        with torch.cuda.device(device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(aside):
                    call()
                    try:
                        with one_capture():
                            self._record(graph, call)
                    except RuntimeError as error:
                        raise CaptureError(f"{error}") from error
            finally:
                current.wait_stream(aside)  # also after an error: memory is given back behind what still uses it
        return graph.replay

    @staticmethod
    def _record(graph: torch.cuda.CUDAGraph, call: Callable[[], None]) -> None:
        # Not torch.cuda.graph: it synchronises the device and empties the allocator's cache, which in another thread's
        # capture is an error. For the same reason only what this thread does can disturb the capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of the capture that has become invalid, in front of the cause
                graph.capture_end()
            raise
        graph.capture_end()

    def event(self) -> Any:
        """An event on the GPU, with ``record()``, ``wait()`` and ``synchronize()``."""
        return torch.cuda.Event()


runtime: Runtime = Runtime()


class Launches(Protocol):
    """What is captured: `mvit_kernels.freezing.launched.LaunchedNetwork`, which says what these do."""

    dtype: torch.dtype

    def image(self, x: Tensor, lowering: Any) -> Tensor: ...

    def run(self, lowering: Any, image: Tensor, result: Tensor, arena: Tensor) -> list[Any]: ...


class _Captured:
    """The graph of one shape and its memory."""

    def __init__(self, network: Launches, lowering: Any, x: Tensor) -> None:
        steps: list[Any] = []
        with torch.inference_mode(False), torch.no_grad():  # whose tensors later calls could not write
            # The launches read this memory itself: what is no stem reads channels-last maps alone.
            last = not lowering.any_image or is_channels_last(x)
            form = torch.channels_last if last else torch.contiguous_format
            self.image = torch.empty(x.shape, dtype=network.dtype, device=x.device, memory_format=form)
            self.result = result = torch.empty(lowering.result, dtype=network.dtype, device=x.device)
            arena = torch.empty(lowering.arena, dtype=torch.uint8, device=x.device)
            self.image.copy_(x)
            rows = network.image(self.image, lowering)
            assert rows.data_ptr() == self.image.data_ptr(), "a replay would read the first call's image"
            self.done, self.lock = runtime.event(), threading.Lock()
            self.replay = runtime.capture(lambda: steps.append(network.run(lowering, rows, result, arena)), x.device)
        self._memory = rows, arena, steps  # which the graph reads and writes; the launches own copies of weights
        self.done.record()
        # The memory must not be given to others while a replay still uses it.
        weakref.finalize(self, self.done.synchronize).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        with self.lock, torch.no_grad():
            result = torch.empty_like(self.result)  # before the replay: without memory for it nothing has begun
            self.done.wait()
            self.image.copy_(x)
            self.replay()
            result.copy_(self.result)
            self.done.record()
        return result


class Graphs:
    """The graphs of one native call, by the shape of its input.

    Args:
        network: the native call; it owns this, and is not owned.
        options: how many, and what else.
    """

    def __init__(self, network: Launches, options: CudaGraphs) -> None:
        self._network = weakref.ref(network)
        self.options = options
        # The one used longest ago first; None for a shape that could not be captured.
        self._captured: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._warned = False
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, lowering: Any) -> Tensor | None:
        """The native call's rows for `x`, from a graph; None if it is to run as usual: for a shape beyond those that
        are kept or that cannot be captured, or while a graph of someone else is being captured, which the launches then
        become part of.

        Args:
            x: (B, C, H, W), in the network's dtype.
            lowering: the network's for such an x.
        """
        with runtime.on(x.device):  # whose current stream is meant throughout
            if runtime.is_capturing():
                return None
            captured = self._graph_of(x, lowering)
            return None if captured is None else captured(x)

    def _graph_of(self, x: Tensor, lowering: Any) -> _Captured | None:
        key = tuple(x.shape), lowering.settings
        with self._lock:
            if key in self._captured:
                self._captured.move_to_end(key)
                return self._captured[key]
            if len(self._captured) >= self.options.shapes and self.options.more == "run":
                return None
            while len(self._captured) >= self.options.shapes:  # first, so that the new one may have its memory
                self._captured.popitem(last=False)
            network = self._network()
            assert network is not None, "its owner calls it"
            try:
                captured = _Captured(network, lowering, x)
            except CaptureError as error:
                captured = None
                self._warn(x, error)
            self._captured[key] = captured
        return captured

    def _warn(self, x: Tensor, error: CaptureError) -> None:
        if not self._warned:
            warnings.warn(
                f"freeze: no CUDA graph for images {tuple(x.shape)} on {x.device}; their launches run one by one. "
                f"It could not be captured: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True  # unless the warning is an error

    def shapes(self) -> list[tuple[int, ...]]:
        """The input shapes that have a graph, the one used longest ago first."""
        with self._lock:
            return [shape for (shape, _), captured in self._captured.items() if captured is not None]
