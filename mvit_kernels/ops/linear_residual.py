# SPDX-License-Identifier: Apache-2.0
"""``linear_residual``: a linear layer fused with the residual addition behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.transforms import again, gradients, zeros_like_bias
from ..backends import choose, reference, run
from ..backends.library import register_fake
from . import _checks as checks

OP = "linear_residual"


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, backend: str | None = None
) -> Tensor:
    """``residual + x Wᵀ + b``, differentiable in every tensor.

    Example:
        >>> x = linear_residual(attended, proj.weight, proj.bias, x)

    Args:
        x: (..., k) float32, bfloat16, float16 or float64; any strides.
        weight: (n, k), as ``nn.Linear`` keeps it, in x's dtype.
        bias: (n,) in x's dtype, or None.
        residual: (..., n) in x's dtype, with the leading axes of x (no broadcasting).
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (..., n), in x's dtype. Where autocast is enabled, all arguments are cast to its dtype, which is the result's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call.

    In MobileViT (arXiv:2110.02178, section 3.1) this is the out-projection of attention.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x)
    checks.like(OP, x, "x", dtype is not None, weight=weight, bias=bias, residual=residual)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; (..., k) and (n, k) are wanted"
        )
    if bias is not None:
        checks.shape(OP, "bias", bias, weight.shape[:1], "one value for each row of weight")
    checks.shape(OP, "residual", residual, (*x.shape[:-1], weight.shape[0]), "the shape of the result")

    if dtype is not None:
        x, residual = checks.cast(dtype, x, residual)
    call = checks.call(
        OP,
        x,
        (x, weight, bias, residual),
        out_features=weight.shape[0],
        contiguous=x.is_contiguous() and residual.is_contiguous(),
    )
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.linear_residual(x, weight, bias, residual)
    weight, bias = checks.cast(x.dtype, weight, bias)
    return apply(chosen, call.needs_grad, x, weight, bias, residual)


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _LinearResidual.apply(backend, *arguments)
    return run(OP, backend, *arguments)


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.has_bias = backend, bias is not None
        return run(OP, backend, x, weight, bias, residual)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        if again():
            bias = zeros_like_bias(weight) if ctx.has_bias else None
            return None, *gradients(F.linear, grad_out, x, weight, bias), grad_out
        grad_x, grad_weight, grad_bias = run(f"{OP}_backward", ctx.backend, grad_out, x, weight)
        return None, grad_x, grad_weight, grad_bias if ctx.has_bias else None, grad_out


@register_fake(OP)
def _fake(x, weight, bias, residual):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])
