# SPDX-License-Identifier: Apache-2.0
"""``transformer`` in CUDA C++: weights packed once for all calls, and one launch.

Packed weights are kept as long as the tensors that they were made from. When one of these was changed, they are
repacked in place, so that a captured CUDA graph reads the new ones too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..library import LIBRARY, TransformerLayerWeights
from .packing import VERSION, pack_transformer
from .plans import plan_transformer

# Planning takes 20 µs of Python for the first call of a shape, then none.
plan_of = functools.lru_cache(1024)(plan_transformer)
_FIELDS = len(TransformerLayerWeights._fields)


class _Packed(NamedTuple):
    tensors: tuple[weakref.ref, ...]  # its sources, without those that have no elements
    versions: list[int]
    data: Tensor


_packed: dict[tuple[int, int, torch.dtype], _Packed] = {}  # by the first tensor, the number of heads and the dtype


def packed_weights(
    weights: Sequence[Tensor], final_norm: tuple[Tensor, Tensor] | None, num_heads: int, dtype: torch.dtype
) -> Tensor:
    """`pack_transformer` of the raw operator's weights, cached while these are the same tensors, unchanged.

    Tensors made in inference mode have no version counter, so nothing is cached for them.
    """
    sources = [tensor for tensor in (*weights, *(final_norm or ())) if tensor.numel()]
    key = (id(sources[0]), num_heads, dtype)
    known = _packed.get(key)
    if known is not None and len(known.tensors) == len(sources):
        if all(reference() is tensor for reference, tensor in zip(known.tensors, sources, strict=True)):
            versions = [tensor._version for tensor in sources]
            if versions != known.versions:
                known.data.copy_(_pack(weights, final_norm, num_heads, dtype))
                known.versions[:] = versions
            return known.data
    data = _pack(weights, final_norm, num_heads, dtype)
    if not any(tensor.is_inference() for tensor in sources) and not _capturing():
        references = tuple(map(weakref.ref, sources))
        _packed[key] = _Packed(references, [tensor._version for tensor in sources], data)
        weakref.finalize(sources[0], _packed.pop, key, None)
    return data


def _pack(weights, final_norm, num_heads, dtype) -> Tensor:
    layers = [TransformerLayerWeights(*weights[i : i + _FIELDS]) for i in range(0, len(weights), _FIELDS)]
    # Outside inference mode, even in a call inside it: later calls may repack in place, which inference tensors forbid.
    with torch.inference_mode(False), torch.no_grad():
        return pack_transformer(layers, final_norm, num_heads=num_heads, dtype=dtype)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: memory allocated then belongs to the graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


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
    images, height, width, d = x.shape
    ph, pw = patch_size
    head_dim, hidden = weights[4].shape[1] // num_heads, weights[8].shape[0]
    plan = plan_of(d, head_dim, height // ph * (width // pw), images * ph * pw, *gpu.limits())
    if isinstance(plan, str):
        raise RuntimeError(f"transformer.cuda: {plan}")
    final_norm = None if final_norm_weight is None or final_norm_bias is None else (final_norm_weight, final_norm_bias)
    packed = packed_weights(weights, final_norm, num_heads, x.dtype)
    layers = len(weights) // _FIELDS
    return torch.ops.mvit_kernels.transformer_packed.cuda(
        x, packed, VERSION, layers, head_dim, hidden, final_norm is not None, patch_size, eps, *plan
    )


LIBRARY.impl("transformer.cuda", forward, "CUDA")
