# SPDX-License-Identifier: Apache-2.0
"""``transformer`` in CUDA C++: weights packed once for all calls (`kept`), and one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import gpu
from ..library import LIBRARY, TransformerLayerWeights, flatten
from .kept import keep
from .packing import VERSION, pack_transformer
from .plans import plan_transformer

# Planning takes 20 µs of Python for the first call of a shape, then none.
plan_of = functools.lru_cache(1024)(plan_transformer)
_FIELDS = len(TransformerLayerWeights._fields)


def packed_weights(
    weights: Sequence[Tensor], final_norm: tuple[Tensor, Tensor] | None, num_heads: int, dtype: torch.dtype
) -> Tensor:
    """`pack_transformer` of the raw operator's weights, kept while these are the same tensors, unchanged."""
    sources = [tensor for tensor in (*weights, *(final_norm or ())) if tensor.numel()]

    def pack() -> Tensor:
        layers = [TransformerLayerWeights(*weights[i : i + _FIELDS]) for i in range(0, len(weights), _FIELDS)]
        return pack_transformer(layers, final_norm, num_heads=num_heads, dtype=dtype)

    return keep(sources, ("transformer", num_heads, dtype), pack)


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
    out = x.new_empty(x.shape)
    _prepared(x, weights, final_norm, num_heads, patch_size, eps)(x, out)
    return out


def prepared(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    patch_size: Sequence[int],
    eps: float,
) -> Callable[[Tensor, Tensor], None]:
    """The call of a stack, ``call(x, out)``, for maps of x's shape and dtype, planned and with its weights packed: it
    goes on with the weights that there are now. It writes `out`, of x's shape, dtype and device: adjacent channels,
    pixels in the map's order that begin at multiples of 16 bytes, and none in x's memory.

    Args:
        x: (B, H, W, d); its values are not looked at.
        layers, final_norm, num_heads, patch_size, eps: as in `mvit_kernels.transformer`.

    Raises:
        RuntimeError: there is no plan for these shapes on this GPU.
    """
    return _prepared(x, flatten(layers, zeros=False), final_norm, num_heads, patch_size, eps)


def _prepared(x, weights, final_norm, num_heads, patch_size, eps) -> Callable[[Tensor, Tensor], None]:
    images, height, width, d = x.shape
    ph, pw = patch_size
    head_dim, hidden = weights[4].shape[1] // num_heads, weights[8].shape[0]
    plan = plan_of(d, head_dim, height // ph * (width // pw), images * ph * pw, *gpu.limits())
    if isinstance(plan, str):
        raise RuntimeError(f"transformer.cuda: {plan}")
    packed = packed_weights(weights, final_norm, num_heads, x.dtype)
    settings = (VERSION, len(weights) // _FIELDS, head_dim, hidden, final_norm is not None, patch_size, eps, *plan)
    launch = torch.ops.mvit_kernels.transformer_packed.cuda
    return lambda rows, out: launch(rows, packed, *settings, out)


LIBRARY.impl("transformer.cuda", forward, "CUDA")
