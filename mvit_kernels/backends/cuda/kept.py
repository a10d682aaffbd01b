# SPDX-License-Identifier: Apache-2.0
"""Packed weights, kept as long as the tensors that they were made from.

When one of these was changed, they are repacked in place, so that a CUDA graph that was captured before reads the new
ones too. Other streams wait for the packing. Inside a capture nothing is packed for later calls: what is recorded there
runs only when the graph does. A view, such as ``weight.flatten(1)`` of a 1 × 1 convolution, is known by the tensor it
is of and by its place there: it is another object at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .. import gpu


class _Packed:
    """Packed weights, what they were made from, and who may read them."""

    def __init__(self, sources: Sequence[Tensor], data: Tensor) -> None:
        self.owners = tuple(weakref.ref(_owner(tensor)) for tensor in sources)
        self.places = [_place(tensor) for tensor in sources]
        self.data = data
        self.versions: list[int] = []
        self.event: torch.cuda.Event | None = None  # behind the packing; None once that is known to be over
        self.streams: set[int] = set()  # those that may read `data`

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether it was made from these tensors, in whatever state."""
        return len(self.owners) == len(sources) and all(
            reference() is _owner(tensor) and place == _place(tensor)
            for reference, place, tensor in zip(self.owners, self.places, sources, strict=True)
        )

    def packed_on(self, stream: torch.cuda.Stream | None, versions: list[int]) -> None:
        """`data` has been written on `stream`, from weights of these versions."""
        if stream is not None:
            self.event, self.streams = stream.record_event(), self.streams | {stream.cuda_stream}
        self.versions = versions

    def join(self, stream: torch.cuda.Stream | None, capturing: bool) -> None:
        """Let what follows on `stream` read and write `data`.

        A capture cannot wait for work outside of it, and `torch.cuda.graph` has waited for the whole device before it
        began; whoever begins one by hand joins the streams, as for the weights themselves.
        """
        if stream is None or capturing:
            return
        event = self.event  # another thread may find at the same time that it is over
        if event is not None:
            if event.query():
                self.event = None
            else:
                stream.wait_event(event)  # on the stream that packed it costs nothing
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            _record_stream(self.data, stream)  # the allocator would give its memory away with the packing stream's work


packed: dict[Hashable, _Packed] = {}  # by the first tensor and its place, and the caller's key


def keep(sources: Sequence[Tensor], key: Hashable, pack: Callable[[], Tensor]) -> Tensor:
    """What `pack()` makes of `sources`, kept while these are the same tensors, unchanged.

    Example:
        >>> packed = keep([fc1.weight, fc2.weight], ("mlp", dtype), lambda: pack_mlp(fc1.weight, fc2.weight, dtype))

    Tensors made in inference mode have no version counter, so nothing is kept for them. Inside a graph capture weights
    that are not packed, or were changed since, are packed by the graph, at every replay and for itself alone; a call
    before the capture spares it that.

    Args:
        sources: all tensors that `pack` reads, at least one.
        key: what else its result depends on, and which function it is.
        pack: called without gradients, and outside of inference mode even for a call inside it: later calls may repack
            in place, which inference tensors forbid.
    """
    first = _owner(sources[0])
    key = (id(first), _place(sources[0]), key)
    stream, capturing = _current_stream(first), _capturing(first)
    counted = not any(tensor.is_inference() for tensor in sources)
    versions = [tensor._version for tensor in sources] if counted else []
    known = packed.get(key)
    if known is not None and known.is_of(sources):
        if versions == known.versions:
            known.join(stream, capturing)
            return known.data
        if not capturing:
            known.join(stream, capturing)
            known.data.copy_(_call(pack))
            known.packed_on(stream, versions)
            return known.data
    data = _call(pack)
    if counted and not capturing:
        known = packed[key] = _Packed(sources, data)
        known.packed_on(stream, versions)
        weakref.finalize(first, packed.pop, key, None)
    return data


def _owner(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _place(tensor: Tensor) -> Hashable:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _call(pack: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return pack()


def _capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is being captured."""
    return gpu.is_capturing(tensor.device)


def _current_stream(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream that work on `tensor` goes to; None on the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _record_stream(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    tensor.record_stream(stream)
