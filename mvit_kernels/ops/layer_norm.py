# SPDX-License-Identifier: Apache-2.0
"""``layer_norm``: LayerNorm over the last axis, such as the final norm of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.transforms import again, gradients, zeros_like_bias
from ..backends import choose, reference
from ..backends.library import raw, register_fake
from . import _checks as checks

OP = "layer_norm"


def layer_norm(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """``LayerNorm(x)`` over the last axis, differentiable in every tensor.

    Example:
        >>> x = layer_norm(x, norm.weight, norm.bias)

    Args:
        x: (..., d) float32, bfloat16, float16 or float64; any strides.
        norm_weight, norm_bias: (d,), in x's dtype or float32.
        eps: added to the variance, positive.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (..., d), in x's dtype, or in autocast's dtype where it is enabled. (PyTorch's own, on a GPU under autocast,
        reads and writes float32.)

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call.

    LayerNorm: Ba et al. 2016, arXiv:1607.06450.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x)
    checks.like(OP, x, "x", dtype is not None, norm_weight=norm_weight, norm_bias=norm_bias)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x has no axes; (..., d) is wanted")
    checks.shape(OP, "norm_weight", norm_weight, x.shape[-1:], "the width of x")
    checks.shape(OP, "norm_bias", norm_bias, x.shape[-1:], "the width of x")
    checks.eps(OP, eps)

    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    call = checks.call(OP, x, (x, norm_weight, norm_bias), contiguous=x.is_contiguous())
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.layer_norm(x, norm_weight, norm_bias, eps).to(x.dtype)  # autocast on CUDA returns float32
    return apply(chosen, call.needs_grad, x, norm_weight, norm_bias, eps)


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _LayerNorm.apply(backend, *arguments)
    return raw(OP, backend)(*arguments)[0]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, norm_weight, norm_bias, eps):
        out, mean, rstd = raw(OP, backend)(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, mean, rstd, norm_weight)
        ctx.backend, ctx.eps = backend, eps
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, mean, rstd, norm_weight = ctx.saved_tensors
        if again():
            norm_bias = zeros_like_bias(norm_weight)
            return None, *gradients(reference.layer_norm, grad_out, x, norm_weight, norm_bias, ctx.eps)
        return None, *raw(f"{OP}_backward", ctx.backend)(grad_out, x, mean, rstd, norm_weight), None


@register_fake(OP)
def _fake(x, norm_weight, norm_bias, eps):
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, mean, rstd, norm_weight):
    return x.new_empty(x.shape), norm_weight.new_empty(norm_weight.shape), norm_weight.new_empty(norm_weight.shape)
