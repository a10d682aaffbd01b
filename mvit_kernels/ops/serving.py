# SPDX-License-Identifier: Apache-2.0
"""Which backends serve the transformer of a MobileViT block: what `transformer_on_map` would choose, without a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Call, Serving, StackPlan
from ..backends.library import TransformerLayerWeights
from ..dropout import LayerDropout
from . import _checks as checks
from .patch_attention import attention_call
from .transformer import stack_call
from .transformer_layer import layer_call

PATCHES = 8  # a side of the map that is asked about: a stage's usual 16 to 256 tokens a sequence are served alike
# Of such maps. On a GPU a few are served operator by operator, and many in one launch (`backends.preference.STACKS`).
IMAGES = {"cuda": (1, 256)}


def transformer_serving(
    width: int,
    widths: Sequence[tuple[int, int]],
    *,
    final_norm: bool,
    num_heads: int,
    patch_size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    backend: str | None = None,
) -> Serving:
    """The backends that serve a stack of layers on maps of 8 × 8 patches, in inference and then in training.

    Args:
        width: channels of a row.
        widths: of each layer, the width of its attention (num_heads × head_dim) and of its MLP.
        final_norm: whether a LayerNorm follows the layers.
        num_heads, patch_size, backend: as in `transformer_on_map`.
        device, dtype: of the weights. Under autocast its dtype is that of the calls.
        training: whether calls that need a gradient count as well.

    Raises:
        ValueError: `backend` is not a backend's name.
    """
    dtype = checks.autocast_dtype_on(device.type, dtype) or dtype
    (ph, pw), rows = patch_size, functools.partial(torch.empty, dtype=dtype, device="meta")
    maps = [rows(images, PATCHES * ph, PATCHES * pw, width) for images in IMAGES.get(device.type, (1,))]
    layers = [_layer(rows, width, *each) for each in widths]
    norm = (rows(width), rows(width)) if final_norm else None
    calls = [
        call
        for needs_grad in ((False, True) if training else (False,))
        for x in maps
        for call in _calls(x, layers, norm, num_heads, patch_size, device.type, needs_grad, backend)
    ]
    return backends.explain(calls, backend)


def _layer(empty: Callable[..., Tensor], width: int, inner: int, hidden: int) -> TransformerLayerWeights:
    """A layer's weights without values."""
    row, norm = empty(width), (empty(width), empty(width))
    qkv, mlp = (empty(3 * inner, width), empty(3 * inner)), (empty(hidden, width), empty(hidden))
    return TransformerLayerWeights(*norm, *qkv, empty(width, inner), row, *norm, *mlp, empty(width, hidden), row)


def _calls(x, layers, final_norm, num_heads, patch_size, device_type, needs_grad, backend) -> Iterator[Call]:
    """The calls of one pass over the stack; of one layer, where it goes layer by layer."""

    def asked(call: Call) -> Call:
        return call._replace(device_type=device_type, needs_grad=needs_grad, obstacle="")

    stack = asked(stack_call(x, layers, final_norm, num_heads, patch_size))
    layer = layers[0]
    attention = attention_call(stack, layer.qkv_weight.shape[0], num_heads, patch_size)
    whole_layer = asked(layer_call(x, layer, num_heads, patch_size, LayerDropout()))
    try:
        plan = backends.plan_stack(stack, attention, dropout=False, requested=backend)
    except backends.BackendError:
        plan = None  # `explain` tells why, for each of the operators
    if plan is StackPlan.WHOLE:
        yield stack
    elif plan is StackPlan.LAYERS and backends.serves("transformer_layer", whole_layer, backend):
        yield whole_layer
    else:
        inner, hidden = layer.proj_weight.shape[1], layer.fc1_weight.shape[0]
        yield stack._replace(operator="layer_norm_linear", facts=_product(layer.qkv_weight))
        yield attention
        yield stack._replace(operator="linear_residual", shape=(*x.shape[:3], inner), facts=_product(layer.proj_weight))
        yield stack._replace(operator="layer_norm_mlp", facts=(("hidden_features", hidden), ("contiguous", True)))


def _product(weight: Tensor) -> tuple[tuple[str, Any], ...]:
    return ("out_features", weight.shape[0]), ("activation", None), ("contiguous", True)
