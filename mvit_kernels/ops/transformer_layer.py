# SPDX-License-Identifier: Apache-2.0
"""``transformer_layer``: one pre-norm layer with its dropout, for training.

It is `layer_norm_linear`, `patch_attention`, `linear_residual` and `layer_norm_mlp` in sequence. As one operator they
need one autograd function instead of four, their backward kernels share launches, no gradients are added up in between,
and dropout is fused into the kernels that write the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.transforms import again, gradients, zeros_like_bias
from ..backends import Call, choose, reference
from ..backends.library import TransformerLayerWeights, raw, register_fake
from ..dropout import LayerDropout, draw_seeds
from . import _checks as checks
from .transformer import check_layer

OP = "transformer_layer"


def transformer_layer(
    x: Tensor,
    layer: TransformerLayerWeights,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    eps: float = 1e-5,
    dropout: LayerDropout | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x = x + drop(Wo·attention(LN(x)·Wqkv))``, then ``x + drop(fc2(silu(fc1(LN(x)))))``; differentiable.

    Attention is within each patch-position sequence. Every tensor but `seed` may need a gradient.

    Example:
        >>> x = transformer_layer(x, TransformerLayerWeights(*weights), num_heads=4, patch_size=(2, 2),
        ...                       dropout=LayerDropout(projection=0.1, mlp=0.1))

    Args:
        x: (B, H, W, d) float32, bfloat16, float16 or float64; H and W are multiples of the patch.
        layer: the weights: the linear layers' in x's dtype, LayerNorm's in x's dtype or float32.
        num_heads, patch_size: as in `patch_attention`.
        eps: of both LayerNorms, positive.
        dropout: the probabilities, or None. Dropout is always live here: leave it out for evaluation.
        seed: (2,) int64 on x's device, from which kernels compute the masks of dropout and drop-path (see
            `mvit_kernels.dropout`); None draws one from PyTorch's generator. The reference ignores it, and PyTorch
            draws the masks.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (B, H, W, d), in x's dtype, or in autocast's dtype where it is enabled.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value (a probability outside
            [0, 1], for one).
        BackendError: `backend` cannot serve the call; kernels have no dropout on attention weights or after SiLU.

    MobileViT, arXiv:2110.02178, section 3.1.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x, 4, "(B, H, W, d)")
    checks.heads(OP, num_heads)
    patch_size = checks.patch(OP, patch_size)
    checks.whole_patches(OP, "x", x.shape[1], x.shape[2], patch_size)
    check_layer(f"{OP}: layer", x, layer, num_heads, dtype is not None)
    checks.eps(OP, eps)
    dropout = _checked(dropout, seed, x)

    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    call = layer_call(x, layer, num_heads, patch_size, dropout)
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.transformer_layer(x, layer, num_heads, patch_size, eps, dropout)
    weights = [
        value if "norm" in name else checks.cast(x.dtype, value)[0]
        for name, value in zip(layer._fields, layer, strict=True)
    ]
    probabilities = tuple(float(p) for p in (dropout.projection, dropout.path1, dropout.mlp, dropout.path2))
    if not any(probabilities):
        seed = None
    elif seed is None:
        (seed,) = draw_seeds(1, x.device)
    return apply(
        chosen, call.needs_grad, x, *weights, seed, num_heads, patch_size, eps, probabilities, dropout.path_scale
    )


def layer_call(
    x: Tensor,
    layer: TransformerLayerWeights,
    num_heads: int,
    patch_size: tuple[int, int],
    dropout: LayerDropout,
    dtype: torch.dtype | None = None,
) -> Call:
    """The `Call` that backends judge, for these arguments.

    Args:
        x, layer, num_heads: as in `transformer_layer`.
        patch_size: (ph, pw).
        dropout: the probabilities.
        dtype: of x when the operator runs, if it is cast first.
    """
    facts = {
        "num_heads": num_heads,
        "head_dim": layer.proj_weight.shape[1] // num_heads,
        "hidden_features": layer.fc1_weight.shape[0],
        "patch_size": patch_size,
        "contiguous": x.is_contiguous(),
        "inner_dropout": bool(dropout.attention or dropout.activation),
    }
    return checks.call(OP, x, (x, *layer), dtype, **facts)


def _checked(dropout: LayerDropout | None, seed: Tensor | None, x: Tensor) -> LayerDropout:
    if dropout is None:
        dropout = LayerDropout()
    if not isinstance(dropout, LayerDropout):
        raise TypeError(f"{OP}: dropout is a {type(dropout).__name__}; a LayerDropout, or None, is wanted")
    for name, p in zip(dropout._fields[:-1], dropout[:-1], strict=True):
        if not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ValueError(f"{OP}: dropout.{name} is {p!r}; a probability, from 0 to 1, is wanted")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (2,):
            what = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else f"{seed!r}"
            raise TypeError(
                f"{OP}: seed is {what}; two int64 numbers are wanted, as mvit_kernels.dropout.draw_seeds has"
            )
        if seed.device != x.device:
            raise ValueError(f"{OP}: seed is on {seed.device} and x on {x.device}; move both to one device")
    return dropout


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _TransformerLayer.apply(backend, *arguments)
    return raw(OP, backend)(*arguments)[0]


class _TransformerLayer(torch.autograd.Function):
    """It saves three rows of d per token and a few statistics: x, the attention's output, and the rows between the
    attention and the MLP. With q, k and v it would be six, and timm's MobileViT block under autocast saves less than
    twice that."""

    @staticmethod
    def forward(ctx, backend, x, *arguments):
        n1w, n1b, qkv_weight, qkv_bias, proj_weight, proj_bias, n2w, n2b, fc1_weight, fc1_bias, fc2_weight, _ = (
            arguments[:12]
        )
        out, *kept = raw(OP, backend)(x, *arguments)
        weights = (n1w, n1b, qkv_weight, qkv_bias, proj_weight, n2w, n2b, fc1_weight, fc1_bias, fc2_weight)
        ctx.save_for_backward(x, *kept, *weights, arguments[12], proj_bias)  # the last one only for `again`
        ctx.backend, ctx.has_qkv_bias, ctx.settings = backend, qkv_bias is not None, arguments[13:]
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *saved, proj_bias = ctx.saved_tensors
        if again():
            x, weights, seed = saved[0], saved[8:18], saved[18]
            layer = (*weights[:5], proj_bias, *weights[5:], zeros_like_bias(weights[-1]))
            formula = reference.transformer_layer_from_seed
            return None, *gradients(formula, grad_out, x, *layer, seed, *ctx.settings)
        grads = list(raw(f"{OP}_backward", ctx.backend)(grad_out, *saved, *ctx.settings))
        if not ctx.has_qkv_bias:
            grads[4] = None
        return None, *grads, *[None] * 6


@register_fake(OP)
def _fake(x, *arguments):
    layer, (_, num_heads, (ph, pw), *_) = arguments[:12], arguments[12:]
    (b, h, w, _), inner = x.shape, layer[4].shape[1]
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32

    def rows() -> Tensor:
        return x.new_empty((b, h, w), dtype=statistics)

    logsumexp = x.new_empty((b, ph * pw, num_heads, (h // ph) * (w // pw)), dtype=statistics)
    attended = x.new_empty((b, h, w, inner))
    return x.new_empty(x.shape), rows(), rows(), attended, logsumexp, x.new_empty(x.shape), rows(), rows()


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, *arguments):
    n1w, n1b, qkv_weight, _, proj_weight, n2w, n2b, fc1_weight, fc1_bias, fc2_weight = arguments[7:17]

    def bias_of(weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape[:1])

    first = (x, n1w, n1b, qkv_weight, bias_of(qkv_weight), proj_weight, bias_of(proj_weight))
    likes = (*first, n2w, n2b, fc1_weight, fc1_bias, fc2_weight, bias_of(fc2_weight))
    return tuple(t.new_empty(t.shape) for t in likes)
