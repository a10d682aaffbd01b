# SPDX-License-Identifier: Apache-2.0
"""``patch_attention``: attention among the pixels at the same position of every patch, without unfold and fold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._utils.transforms import again, gradients
from ..backends import Call, choose, reference
from ..backends.library import raw, register_fake
from . import _checks as checks

OP = "patch_attention"


def patch_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head softmax attention within each patch-position sequence of a token-major map; differentiable.

    Token (h, w) attends to (h', w') iff ``h % ph == h' % ph and w % pw == w' % pw``. The grouping is pure indexing: a
    channels-last feature map already has this layout, and a 1 × 1 patch is ordinary attention over all H·W tokens.

    Example:
        >>> qkv = torch.randn(1, 32, 32, 3 * 144)
        >>> patch_attention(qkv, num_heads=4, patch_size=(2, 2)).shape
        torch.Size([1, 32, 32, 144])

    Args:
        qkv: (B, H, W, 3·inner) float32, bfloat16, float16 or float64; any strides. The last axis is q, then k, then v,
            each ``num_heads × head_dim``. H and W are multiples of the patch.
        num_heads: the number of heads; it divides inner.
        patch_size: (ph, pw), or one int for both.
        scale: of the scores, finite; ``head_dim ** -0.5`` if None.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (B, H, W, inner), contiguous, in qkv's dtype, or in autocast's dtype where it is enabled. Softmax is in float32
        or better.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
        BackendError: `backend` cannot serve the call.

    Attention: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; the grouping: MobileViT, arXiv:2110.02178, section 3.1.
    """
    checks.tensor(OP, "qkv", qkv, 4, "(B, H, W, 3·inner)")
    checks.heads(OP, num_heads)
    patch_size = checks.patch(OP, patch_size)
    _, height, width, channels = qkv.shape
    if channels == 0 or channels % (3 * num_heads):
        raise ValueError(
            f"{OP}: qkv has {channels} channels, not a positive multiple of 3 · num_heads = {3 * num_heads}; its last "
            "axis is q, k and v, each num_heads × head_dim"
        )
    checks.whole_patches(OP, "qkv", height, width, patch_size)
    head_dim = channels // (3 * num_heads)
    scale = float(head_dim) ** -0.5 if scale is None else scale  # under torch.jit.trace sizes are tensors
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{OP}: scale is {scale!r}; a finite number is wanted")

    dtype = checks.autocast_dtype(qkv)
    if dtype is not None and qkv.dtype != dtype:
        qkv = qkv.to(dtype)
    call = checks.call(OP, qkv, (qkv,), **_facts(channels, num_heads, patch_size, qkv.stride(-1) == 1))
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.patch_attention(qkv, num_heads, patch_size, scale)
    return apply(chosen, call.needs_grad, qkv, num_heads, patch_size, scale)


def attention_call(stack: Call, channels: int, num_heads: int, patch_size: tuple[int, int]) -> Call:
    """The `Call` that backends judge, for the attention of a stack's layers on a qkv of `channels` channels."""
    facts = _facts(channels, num_heads, patch_size, dense_rows=True)
    return stack._replace(operator=OP, shape=(*stack.shape[:3], channels), facts=tuple(facts.items()))


def _facts(channels: int, num_heads: int, patch_size: tuple[int, int], dense_rows: bool) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "head_dim": channels // (3 * num_heads),
        "patch_size": patch_size,
        "dense_rows": dense_rows,
    }


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _PatchAttention.apply(backend, *arguments)
    return raw(OP, backend)(*arguments)[0]


class _PatchAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, qkv, num_heads, patch_size, scale):
        out, logsumexp = raw(OP, backend)(qkv, num_heads, patch_size, scale)
        ctx.save_for_backward(qkv, out, logsumexp)
        ctx.backend, ctx.constants = backend, (num_heads, patch_size, scale)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        if again():
            return None, *gradients(reference.patch_attention_written_out, grad_out, saved[0], *ctx.constants)
        grad_qkv = raw(f"{OP}_backward", ctx.backend)(grad_out, *saved, *ctx.constants)
        return None, grad_qkv, None, None, None


@register_fake(OP)
def _fake(qkv, num_heads, patch_size, scale):
    (b, h, w, channels), (ph, pw) = qkv.shape, patch_size
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (
        qkv.new_empty((b, h, w, channels // 3)),
        qkv.new_empty((b, ph * pw, num_heads, (h // ph) * (w // pw)), dtype=statistics),
    )


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, qkv, out, logsumexp, num_heads, patch_size, scale):
    return qkv.new_empty(qkv.shape)
