# SPDX-License-Identifier: Apache-2.0
"""``transformer`` in CUDA C++: weights packed once for all calls, and one launch.

Packed weights are kept as long as the tensors that they were made from. When one of these was changed, they are
repacked in place, so that a CUDA graph that was captured before reads the new ones too. Other streams wait for the
packing. Inside a capture nothing is packed for later calls: what is recorded there runs only when the graph does.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import gpu
from ..library import LIBRARY, TransformerLayerWeights, flatten
from .packing import VERSION, pack_transformer
from .plans import plan_transformer

# Planning takes 20 µs of Python for the first call of a shape, then none.
plan_of = functools.lru_cache(1024)(plan_transformer)
_FIELDS = len(TransformerLayerWeights._fields)


class _Packed:
    """Packed weights, what they were made from, and who may read them."""

    def __init__(self, sources: Sequence[Tensor], data: Tensor) -> None:
        self.tensors = tuple(map(weakref.ref, sources))
        self.data = data
        self.versions: list[int] = []
        self.event: torch.cuda.Event | None = None  # behind the packing; None once that is known to be over
        self.streams: set[int] = set()  # those that may read `data`

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether it was made from these tensors, in whatever state."""
        return len(self.tensors) == len(sources) and all(
            reference() is tensor for reference, tensor in zip(self.tensors, sources, strict=True)
        )

    def packed_on(self, stream: torch.cuda.Stream | None, versions: list[int]) -> None:
        """`data` has been written on `stream`, from weights of these versions."""
        if stream is not None:
            self.event, self.streams = stream.record_event(), self.streams | {stream.cuda_stream}
        self.versions = versions

    def join(self, stream: torch.cuda.Stream | None) -> None:
        """Let what follows on `stream` read and write `data`.

        A capture cannot wait for work outside of it, and `torch.cuda.graph` has waited for the whole device before it
        began; whoever begins one by hand joins the streams, as for the weights themselves.
        """
        if stream is None or _capturing():
            return
        if self.event is not None:
            if self.event.query():
                self.event = None
            else:
                stream.wait_event(self.event)  # on the stream that packed it costs nothing
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            _record_stream(self.data, stream)  # the allocator would give its memory away with the packing stream's work


_packed: dict[tuple[int, int, torch.dtype], _Packed] = {}  # by the first tensor, the number of heads and the dtype


def packed_weights(
    weights: Sequence[Tensor], final_norm: tuple[Tensor, Tensor] | None, num_heads: int, dtype: torch.dtype
) -> Tensor:
    """`pack_transformer` of the raw operator's weights, cached while these are the same tensors, unchanged.

    Tensors made in inference mode have no version counter, so nothing is cached for them. Inside a graph capture
    weights that are not packed, or were changed since, are packed by the graph, at every replay and for itself alone;
    a call before the capture spares it that.
    """
    sources = [tensor for tensor in (*weights, *(final_norm or ())) if tensor.numel()]
    key = (id(sources[0]), num_heads, dtype)
    stream = _current_stream(sources[0])
    counted = not any(tensor.is_inference() for tensor in sources)
    versions = [tensor._version for tensor in sources] if counted else []
    known = _packed.get(key)
    if known is not None and known.is_of(sources):
        if versions == known.versions:
            known.join(stream)
            return known.data
        if not _capturing():
            known.join(stream)
            known.data.copy_(_pack(weights, final_norm, num_heads, dtype))
            known.packed_on(stream, versions)
            return known.data
    data = _pack(weights, final_norm, num_heads, dtype)
    if counted and not _capturing():
        known = _packed[key] = _Packed(sources, data)
        known.packed_on(stream, versions)
        weakref.finalize(sources[0], _packed.pop, key, None)
    return data


def _pack(weights, final_norm, num_heads, dtype) -> Tensor:
    layers = [TransformerLayerWeights(*weights[i : i + _FIELDS]) for i in range(0, len(weights), _FIELDS)]
    # Outside inference mode, even in a call inside it: later calls may repack in place, which inference tensors forbid.
    with torch.inference_mode(False), torch.no_grad():
        return pack_transformer(layers, final_norm, num_heads=num_heads, dtype=dtype)


def _capturing() -> bool:
    """Whether the current stream is being captured: what is called then is recorded, and does not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _current_stream(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream that work on `tensor` goes to; None on the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _record_stream(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    tensor.record_stream(stream)


def forward(
    x: Tensor,
    weights: list[Tensor],
    final_norm_weight: Tensor | None,
    final_norm_bias: Tensor | None,
    num_heads: int,
    patch_size: Sequence[int],
    eps: float,
) -> Tensor:
    """The raw operator. Weights may be of any floating dtype; an absent qkv bias is a tensor without elements.

    Raises:
        RuntimeError: there is no plan for these shapes on this GPU.
    """
    final_norm = None if final_norm_weight is None or final_norm_bias is None else (final_norm_weight, final_norm_bias)
    return _prepared(x, weights, final_norm, num_heads, patch_size, eps)(x)


def prepared(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    patch_size: Sequence[int],
    eps: float,
) -> Callable[[Tensor], Tensor]:
    """The call of a stack for maps of x's shape and dtype, planned and with its weights packed: it goes on with the
    weights that there are now.

    Args:
        x: (B, H, W, d); its values are not looked at.
        layers, final_norm, num_heads, patch_size, eps: as in `mvit_kernels.transformer`.

    Raises:
        RuntimeError: there is no plan for these shapes on this GPU.
    """
    return _prepared(x, flatten(layers, zeros=False), final_norm, num_heads, patch_size, eps)


def _prepared(x, weights, final_norm, num_heads, patch_size, eps) -> Callable[[Tensor], Tensor]:
    images, height, width, d = x.shape
    ph, pw = patch_size
    head_dim, hidden = weights[4].shape[1] // num_heads, weights[8].shape[0]
    plan = plan_of(d, head_dim, height // ph * (width // pw), images * ph * pw, *gpu.limits())
    if isinstance(plan, str):
        raise RuntimeError(f"transformer.cuda: {plan}")
    packed = packed_weights(weights, final_norm, num_heads, x.dtype)
    settings = (VERSION, len(weights) // _FIELDS, head_dim, hidden, final_norm is not None, patch_size, eps, *plan)
    return lambda rows: torch.ops.mvit_kernels.transformer_packed.cuda(rows, packed, *settings)


LIBRARY.impl("transformer.cuda", forward, "CUDA")
