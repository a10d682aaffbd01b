# SPDX-License-Identifier: Apache-2.0
"""``transformer``: the whole stack of a MobileViT block; it reads the map once and writes it once. Inference only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Call, choose, packs_weights, reference
from ..backends.library import TransformerLayerWeights, flatten, raw, register_fake
from . import _checks as checks

OP = "transformer"


def transformer(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None = None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """L pre-norm layers and the final LayerNorm on a token-major map, with attention within patch-position sequences.

    A layer is ``x = x + Wo·attention(LN(x)·Wqkv)``, then ``x = x + fc2(silu(fc1(LN(x))))``.

    Example:
        >>> y = transformer(x, [TransformerLayerWeights(*w) for w in weights], (norm.weight, norm.bias),
        ...                 num_heads=4, patch_size=(2, 2))

    Args:
        x: (B, H, W, d) float32, bfloat16, float16 or float64; H and W are multiples of the patch.
        layers: one `TransformerLayerWeights` per layer, at least one. All kernels want the same widths in every layer.
        final_norm: (weight, bias) of the LayerNorm behind the last layer, each (d,); None for none (Kornia).
        num_heads, patch_size: as in `patch_attention`.
        eps: of every LayerNorm, positive.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (B, H, W, d), in x's dtype, or in autocast's dtype where it is enabled.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call; kernels are for inference and never serve one that needs a
            gradient (train with `mvit_kernels.ops.transformer_on_map`; the reference is differentiable).

    MobileViT, arXiv:2110.02178, section 3.1 and eq. 1.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x, 4, "(B, H, W, d)")
    checks.heads(OP, num_heads)
    patch_size = checks.patch(OP, patch_size)
    checks.whole_patches(OP, "x", x.shape[1], x.shape[2], patch_size)
    if not layers:
        raise ValueError(f"{OP}: layers is empty; at least one TransformerLayerWeights is wanted")
    for index, layer in enumerate(layers):
        check_layer(f"{OP}: layers[{index}]", x, layer, num_heads, dtype is not None)
    if final_norm is not None:
        if not isinstance(final_norm, tuple | list) or len(final_norm) != 2:
            raise TypeError(
                f"{OP}: final_norm is a {type(final_norm).__name__}; a pair (weight, bias), or None, is wanted"
            )
        weight, bias = final_norm
        checks.like(OP, x, "x", dtype is not None, final_norm_weight=weight, final_norm_bias=bias)
        checks.shape(OP, "final_norm weight", weight, x.shape[-1:], "the width of x")
        checks.shape(OP, "final_norm bias", bias, x.shape[-1:], "the width of x")
    checks.eps(OP, eps)

    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    call = stack_call(x, layers, final_norm, num_heads, patch_size)
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.transformer(x, layers, final_norm, num_heads, patch_size, eps)
    weights = flatten(layers, zeros=False) if packs_weights(chosen) else flatten(layers, x.dtype)
    return raw(OP, chosen)(x, weights, *(final_norm or (None, None)), num_heads, patch_size, eps)


def stack_call(
    x: Tensor,
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    patch_size: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> Call:
    """The `Call` that backends judge, for these arguments.

    Args:
        x, layers, final_norm, num_heads: as in `transformer`.
        patch_size: (ph, pw).
        dtype: of x when the operator runs, if it is cast first.
    """
    inner, hidden = layers[0].proj_weight.shape[1], layers[0].fc1_weight.shape[0]
    tensors = (x, *(tensor for layer in layers for tensor in layer), *(final_norm or ()))
    facts = {
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "hidden_features": hidden,
        "num_layers": len(layers),
        "final_norm": final_norm is not None,
        "patch_size": patch_size,
        "same_widths": all(
            layer.proj_weight.shape[1] == inner and layer.fc1_weight.shape[0] == hidden for layer in layers
        ),
    }
    return checks.call(OP, x, tensors, dtype, **facts)


def check_layer(name: str, x: Tensor, layer: TransformerLayerWeights, num_heads: int, autocast: bool) -> None:
    """Check that one layer's weights fit x.

    Args:
        name: the operator and the argument, which the messages begin with.
        x: (B, H, W, d).
        layer: the weights.
        num_heads: as in `transformer`.
        autocast: whether autocast applies to x.

    Raises:
        TypeError: not a `TransformerLayerWeights`, or a wrong dtype.
        ValueError: a wrong device or shape.
    """
    if not isinstance(layer, TransformerLayerWeights):
        raise TypeError(f"{name} is a {type(layer).__name__}; a TransformerLayerWeights is wanted")
    checks.like(name, x, "x", autocast, **layer._asdict())
    for field in ("qkv_weight", "fc1_weight"):
        checks.tensor(name, field, getattr(layer, field), 2, "(out, in)")
    d = x.shape[-1]
    for field in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "proj_bias", "fc2_bias"):
        checks.shape(name, field, getattr(layer, field), (d,), "the width of x")
    rows = layer.qkv_weight.shape[0]
    checks.shape(name, "qkv_weight", layer.qkv_weight, (rows, d), f"for x of width {d}")
    if rows == 0 or rows % (3 * num_heads):
        raise ValueError(
            f"{name}: qkv_weight has {rows} rows, not a positive multiple of 3 · num_heads = {3 * num_heads}"
        )
    if layer.qkv_bias is not None:
        checks.shape(name, "qkv_bias", layer.qkv_bias, (rows,), "one value for each row of qkv_weight")
    checks.shape(name, "proj_weight", layer.proj_weight, (d, rows // 3), "(width of x, num_heads × head_dim)")
    hidden = layer.fc1_weight.shape[0]
    checks.shape(name, "fc1_weight", layer.fc1_weight, (hidden, d), f"for x of width {d}")
    checks.shape(name, "fc1_bias", layer.fc1_bias, (hidden,), "one value for each row of fc1_weight")
    checks.shape(name, "fc2_weight", layer.fc2_weight, (d, hidden), "(width of x, rows of fc1_weight)")


@register_fake(OP)
def _fake(x, weights, final_norm_weight, final_norm_bias, num_heads, patch_size, eps):
    return x.new_empty(x.shape)
