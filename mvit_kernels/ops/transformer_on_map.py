# SPDX-License-Identifier: Apache-2.0
"""The transformer of a MobileViT block on a feature map, for training and inference: what every adapter calls.

Example:
    >>> y = transformer_on_map(x, layers, (norm.weight, norm.bias), num_heads=4, patch_size=(2, 2))

Sequences never mix and everything but attention is row-wise, so rows may be in any order. Where a kernel serves the
attention, they stay in the map's own order and nothing is copied. Where PyTorch does (the reference backend), they are
put into sequence order once before the first layer and back once after the last, which replaces the gather and scatter
around each layer's attention: two copies of the map per block, against four to six in the usual implementations.

A layer is one operator where a kernel serves it, and under autocast the weights of all layers are cast in one launch.
Otherwise it is composed of the differentiable operators, and of PyTorch's dropout where that is live.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._utils.transforms import again, is_channels_last
from ..backends import StackPlan, reference
from ..backends.library import TransformerLayerWeights
from ..dropout import LayerDropout, draw_seeds, dropped
from . import _checks as checks
from .layer_norm import layer_norm
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import layer_norm_mlp
from .linear_residual import linear_residual
from .patch_attention import attention_call, patch_attention
from .transformer import stack_call, transformer
from .transformer_layer import layer_call, transformer_layer

OP = "transformer_on_map"


def transformer_on_map(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    eps: float = 1e-5,
    dropout: Sequence[LayerDropout] | None = None,
    backend: str | None = None,
) -> Tensor:
    """MobileViT's unfold, L transformer layers, final LayerNorm and fold, on a (B, d, H, W) map; differentiable.

    Example:
        >>> y = transformer_on_map(x, layers, (norm.weight, norm.bias), num_heads=4, patch_size=(2, 2))

    Args:
        x: (B, d, H, W) float32, bfloat16, float16 or float64, in any memory format; channels-last is copied least. A
            map that does not split into whole patches is resized before and back after (bilinear,
            ``align_corners=False``), as in timm, Hugging Face and cvnets.
        layers, final_norm, num_heads, patch_size, eps, backend: as in `mvit_kernels.transformer`.
        dropout: the live dropout of each layer in training, or None. On the reference backend the masks are drawn in
            sequence order, as in the usual implementations: with the same seed they are the same. A kernel for the
            whole layer computes its masks from a seed that PyTorch's generator draws (`mvit_kernels.dropout`).

    Returns:
        (B, d, H, W), in x's memory format and dtype (autocast's dtype where it is enabled).

    Raises:
        TypeError, ValueError, BackendError: as in the operators.
        ValueError: `layers` is empty, `dropout` has not one entry per layer, or the map is empty.

    MobileViT, arXiv:2110.02178, section 3.1.
    """
    checks.tensor(OP, "x", x, 4, "(B, d, H, W)")
    checks.heads(OP, num_heads)
    ph, pw = patch_size = checks.patch(OP, patch_size)
    if not layers:
        raise ValueError(f"{OP}: layers is empty; at least one TransformerLayerWeights is wanted")
    if dropout is not None and len(dropout) != len(layers):
        raise ValueError(f"{OP}: dropout has {len(dropout)} entries for {len(layers)} layers; one a layer is wanted")
    if 0 in x.shape[2:]:
        raise ValueError(f"{OP}: x is an empty map of {x.shape[2]} × {x.shape[3]} pixels")
    size = (x.shape[2], x.shape[3])
    # Not -(-size // ph): a trace keeps the division, and ONNX's division of a negative number rounds towards 0.
    whole = ((size[0] + ph - 1) // ph * ph, (size[1] + pw - 1) // pw * pw)
    channels_last = is_channels_last(x)
    if size != whole:
        x = F.interpolate(x, size=whole, mode="bilinear", align_corners=False)
    if dropout is not None and not any(any(layer[:-1]) for layer in dropout):
        dropout = None

    dtype = checks.autocast_dtype(x) or x.dtype
    rows = x.to(dtype).permute(0, 2, 3, 1)
    stack = stack_call(rows, layers, final_norm, num_heads, patch_size, dtype)

    attention = attention_call(stack, layers[0].qkv_weight.shape[0], num_heads, patch_size)
    plan = backends.plan_stack(stack, attention, dropout=dropout is not None, requested=backend)
    if plan is StackPlan.WHOLE:
        rows = transformer(
            rows.contiguous(), layers, final_norm, num_heads=num_heads, patch_size=patch_size, eps=eps, backend=backend
        )
    else:
        in_sequences = plan is StackPlan.SEQUENCES or any(d.attention for d in dropout or ())
        by_layer = plan is not StackPlan.OPERATORS
        rows = _composed(rows, layers, final_norm, num_heads, patch_size, eps, dropout, in_sequences, by_layer, backend)

    x = rows.permute(0, 3, 1, 2)
    if size != whole:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _composed(rows, layers, final_norm, num_heads, patch_size, eps, dropout, in_sequences, by_layer, backend) -> Tensor:
    """The stack from the differentiable operators, with live dropout; from `transformer_layer` too if `by_layer`."""
    size = (rows.shape[1], rows.shape[2])
    inner_patch = patch_size
    if in_sequences:  # a map of N × 1 tokens with 1 × 1 patches is one sequence
        rows, inner_patch = reference.to_sequences(rows, patch_size).unsqueeze(2), (1, 1)
    else:
        rows = rows.contiguous()  # copies an NCHW map: kernels read token-major rows
        if checks.autocast_dtype(rows) is not None:
            layers = _cast_together(layers, rows.dtype)
    drops = dropout or [LayerDropout()] * len(layers)
    fused = [
        by_layer
        and backends.serves("transformer_layer", layer_call(rows, layer, num_heads, inner_patch, drop), backend)
        for layer, drop in zip(layers, drops, strict=True)
    ]
    seeds = draw_seeds(len(layers), rows.device) if dropout is not None and any(fused) else [None] * len(layers)
    for layer, drop, seed, is_fused in zip(layers, drops, seeds, fused, strict=True):
        if is_fused:
            rows = transformer_layer(
                rows,
                layer,
                num_heads=num_heads,
                patch_size=inner_patch,
                eps=eps,
                dropout=drop,
                seed=seed,
                backend=backend,
            )
        else:
            rows = _attention_half(rows, layer, num_heads, inner_patch, eps, drop, backend)
            rows = _mlp_half(rows, layer, inner_patch, eps, drop, backend)
    if final_norm is not None:
        call = checks.call("layer_norm", rows, (rows, *final_norm), contiguous=rows.is_contiguous())
        served = backends.serves("layer_norm", call, backend)
        rows = layer_norm(rows, *final_norm, eps=eps, backend=backend if served else "reference")
    return reference.to_map(rows.squeeze(2), size, patch_size) if in_sequences else rows


def _attention_half(rows, layer, num_heads, patch_size, eps, drop, backend) -> Tensor:
    qkv = layer_norm_linear(
        rows, layer.norm1_weight, layer.norm1_bias, layer.qkv_weight, layer.qkv_bias, eps=eps, backend=backend
    )
    if drop.attention:
        scale = float(qkv.shape[-1] // (3 * num_heads)) ** -0.5  # under torch.jit.trace sizes are tensors
        attended = reference.patch_attention(qkv, num_heads, patch_size, scale, drop.attention)
    else:
        attended = patch_attention(qkv, num_heads=num_heads, patch_size=patch_size, backend=backend)
    if not (drop.projection or drop.path1):
        return linear_residual(attended, layer.proj_weight, layer.proj_bias, rows, backend=backend)
    branch = F.linear(attended, layer.proj_weight, layer.proj_bias)
    return rows + dropped(branch, drop.projection, drop.path1, patch_size, drop.path_scale)


def _mlp_half(rows, layer, patch_size, eps, drop, backend) -> Tensor:
    if not (drop.activation or drop.mlp or drop.path2):
        return layer_norm_mlp(rows, *layer[6:], eps=eps, backend=backend)
    hidden = layer_norm_linear(
        rows,
        layer.norm2_weight,
        layer.norm2_bias,
        layer.fc1_weight,
        layer.fc1_bias,
        eps=eps,
        activation="silu",
        backend=backend,
    )
    branch = F.linear(F.dropout(hidden, drop.activation), layer.fc2_weight, layer.fc2_bias)
    return rows + dropped(branch, drop.mlp, drop.path2, patch_size, drop.path_scale)


def _cast_together(layers: Sequence[TransformerLayerWeights], dtype: torch.dtype) -> list[TransformerLayerWeights]:
    """The layers with their linear weights and biases in `dtype`. Autocast would cast eight tensors per layer, forward
    and backward, in a launch each: more launches than the layer's own kernels take."""
    places = [
        (index, name)
        for index, layer in enumerate(layers)
        for name, value in zip(layer._fields, layer, strict=True)
        if "norm" not in name and value is not None and value.dtype != dtype
    ]
    if not places:
        return list(layers)
    cast = _CastTogether.apply(dtype, *(getattr(layers[index], name) for index, name in places))
    changed: list[dict[str, Tensor]] = [{} for _ in layers]
    for (index, name), value in zip(places, cast, strict=True):
        changed[index][name] = value
    return [layer._replace(**values) for layer, values in zip(layers, changed, strict=True)]


class _CastTogether(torch.autograd.Function):
    """``tuple(t.to(dtype) for t in tensors)``, and its backward, each in one launch for all tensors."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return _cast_all(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx, *grads):
        if again():
            return None, *(g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        found = [(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True) if grad is not None]
        cast = iter(_cast_all(*zip(*found, strict=True)) if found else ())
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast_all(tensors, dtypes) -> tuple[Tensor, ...]:
    results = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(results, list(tensors))
    return tuple(results)
