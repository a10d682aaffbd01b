# SPDX-License-Identifier: Apache-2.0
"""The transformer of a MobileViT block on a feature map, for training and inference: what every adapter calls.

Example:
    >>> y = transformer_on_map(x, layers, (norm.weight, norm.bias), num_heads=4, patch_size=(2, 2))

Sequences never mix and everything but attention is row-wise, so rows may be in any order. Where a kernel serves the
attention they stay in the map's own order and nothing is copied. Where PyTorch does (the reference backend), they are
put into sequence order once before the first layer and back once after the last, instead of the gather and scatter that
each layer's attention would need: two copies of the map a block, against four to six in the usual implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, cuda, reference
from ..ops import (
    TransformerLayerWeights,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_attention,
    transformer,
)
from ..ops import _checks as checks
from ..ops.patch_attention import attention_call
from ..ops.transformer import stack_call

OP = "transformer_on_map"


class LayerDropout(NamedTuple):
    """The live dropout of one layer, as probabilities; all 0 is none. Published recipes use `projection` and `mlp`."""

    attention: float = 0.0  # on the attention weights
    projection: float = 0.0  # after the out-projection
    activation: float = 0.0  # after SiLU
    mlp: float = 0.0  # after fc2
    path1: float = 0.0  # timm's drop-path on the attention branch: one draw an (image, patch position) sequence
    path2: float = 0.0  # and on the MLP branch
    path_scale: bool = True  # drop-path divides what it keeps by the probability of keeping


def transformer_on_map(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    patch_size: tuple[int, int],
    eps: float = 1e-5,
    dropout: Sequence[LayerDropout] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Unfold, L transformer layers, final LayerNorm and fold, of MobileViT's block, on a (B, d, H, W) map;
    differentiable.

    Args:
        x: (B, d, H, W), of any memory format; channels-last is copied least. A map that does not split into whole
            patches is resized (bilinear, ``align_corners=False``) before and back after, as in timm, Hugging Face and
            cvnets.
        layers, final_norm, num_heads, patch_size, eps, backend: as in `mvit_kernels.transformer`.
        dropout: the live dropout of each layer while training, or None. On the reference backend the draws are made in
            sequence order, as the usual implementations make them: with the same seed, they are the same.

    Returns:
        (B, d, H, W), in x's memory format and dtype (autocast's dtype where that is on).

    Raises:
        TypeError, ValueError, BackendError: as the operators do.

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
    whole = (-(-size[0] // ph) * ph, -(-size[1] // pw) * pw)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if size != whole:
        x = F.interpolate(x, size=whole, mode="bilinear", align_corners=False)
    if dropout is not None and not any(any(layer[:-1]) for layer in dropout):
        dropout = None

    dtype = checks.autocast_dtype(x) or x.dtype
    rows = x.to(dtype).permute(0, 2, 3, 1)
    stack = stack_call(rows, layers, final_norm, num_heads, patch_size, dtype)

    def attention_by() -> str:
        qkv_shape = (*rows.shape[:3], layers[0].qkv_weight.shape[0])
        return backends.choose(
            attention_call(x.device, dtype, qkv_shape, num_heads, patch_size, stack.needs_grad), backend
        )

    at_once = dropout is None and backends.serves("transformer", stack, backend)
    if at_once and stack.device_type == cuda.DEVICE_TYPE and not cuda.in_one_launch(stack):
        at_once = attention_by() == "reference"  # no operator's own kernel is there to be faster
    if at_once:
        rows = transformer(
            rows.contiguous(), layers, final_norm, num_heads=num_heads, patch_size=patch_size, eps=eps, backend=backend
        )
    else:
        in_sequences = attention_by() == "reference" or any(d.attention for d in dropout or ())
        rows = _composed(rows, layers, final_norm, num_heads, patch_size, eps, dropout, in_sequences, backend)

    x = rows.permute(0, 3, 1, 2)
    if size != whole:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _composed(rows, layers, final_norm, num_heads, patch_size, eps, dropout, in_sequences, backend) -> Tensor:
    """The stack from the differentiable operators, with live dropout."""
    size = (rows.shape[1], rows.shape[2])
    inner_patch = patch_size
    if in_sequences:  # a map of N × 1 tokens with 1 × 1 patches is one sequence
        rows, inner_patch = reference.to_sequences(rows, patch_size).unsqueeze(2), (1, 1)
    else:
        rows = rows.contiguous()  # copies an NCHW map: kernels read token-major rows
    for index, layer in enumerate(layers):
        drop = dropout[index] if dropout is not None else LayerDropout()
        rows = _attention_half(rows, layer, num_heads, inner_patch, eps, drop, backend)
        rows = _mlp_half(rows, layer, inner_patch, eps, drop, backend)
    if final_norm is not None:
        rows = reference.layer_norm(rows, *final_norm, eps).to(rows.dtype)  # CUDA's autocast makes it float32
    return reference.to_map(rows.squeeze(2), size, patch_size) if in_sequences else rows


def _attention_half(rows, layer, num_heads, patch_size, eps, drop, backend) -> Tensor:
    qkv = layer_norm_linear(
        rows, layer.norm1_weight, layer.norm1_bias, layer.qkv_weight, layer.qkv_bias, eps=eps, backend=backend
    )
    if drop.attention:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
        attended = reference.patch_attention(qkv, num_heads, patch_size, scale, drop.attention)
    else:
        attended = patch_attention(qkv, num_heads=num_heads, patch_size=patch_size, backend=backend)
    if not (drop.projection or drop.path1):
        return linear_residual(attended, layer.proj_weight, layer.proj_bias, rows, backend=backend)
    branch = F.dropout(F.linear(attended, layer.proj_weight, layer.proj_bias), drop.projection)
    return rows + drop_path(branch, drop.path1, patch_size, drop.path_scale)


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
    branch = F.dropout(F.linear(F.dropout(hidden, drop.activation), layer.fc2_weight, layer.fc2_bias), drop.mlp)
    return rows + drop_path(branch, drop.path2, patch_size, drop.path_scale)


def drop_path(x: Tensor, probability: float, patch_size: tuple[int, int], scale_by_keep: bool = True) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382) of a residual branch on a token-major map, always live.

    Example:
        >>> rows = rows + drop_path(branch, 0.1, (2, 2))

    One draw an (image, patch position) sequence, as timm's has it, whose blocks see one row a sequence.

    Args:
        x: (B, H, W, d).
        probability: of dropping a sequence's branch.
        patch_size: (ph, pw), which H and W are multiples of.
        scale_by_keep: divide what is kept by the probability of keeping.
    """
    if not probability:
        return x
    (b, h, w, d), (ph, pw), keep = x.shape, patch_size, 1.0 - probability
    mask = x.new_empty((b, 1, ph, 1, pw, 1))
    mask.bernoulli_(keep)
    if scale_by_keep and keep > 0.0:
        mask.div_(keep)
    return (x.reshape(b, h // ph, ph, w // pw, pw, d) * mask).reshape(b, h, w, d)
