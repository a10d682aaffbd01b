# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_linear``: a LayerNorm fused with the linear layer behind it; normalised rows never reach memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.transforms import again, gradients
from ..backends import choose, reference, run
from ..backends.library import register_fake
from . import _checks as checks

OP = "layer_norm_linear"


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``act(LayerNorm(x) Wᵀ + b)``, differentiable in every tensor.

    Example:
        >>> qkv = layer_norm_linear(x, norm.weight, norm.bias, qkv_linear.weight, qkv_linear.bias)

    Args:
        x: (..., d) float32, bfloat16, float16 or float64; any strides.
        norm_weight, norm_bias: (d,), in x's dtype or float32.
        weight: (n, d), as ``nn.Linear`` keeps it, in x's dtype.
        bias: (n,) or None.
        eps: added to the variance (of d values, not d − 1), positive.
        activation: None or "silu".
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (..., n), in x's dtype, or in autocast's dtype where it is enabled. Statistics and accumulation are in float32
        or better.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call.

    LayerNorm: Ba et al. 2016, arXiv:1607.06450, eq. 3. In MobileViT it precedes the qkv projection and the MLP.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x)
    checks.like(OP, x, "x", dtype is not None, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x has no axes; (..., d) is wanted")
    d = x.shape[-1]
    checks.shape(OP, "norm_weight", norm_weight, (d,), "the width of x")
    checks.shape(OP, "norm_bias", norm_bias, (d,), "the width of x")
    if weight.dim() != 2 or weight.shape[1] != d:
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}; (n, {d}) is wanted, for x of width {d}")
    if bias is not None:
        checks.shape(OP, "bias", bias, weight.shape[:1], "one value for each row of weight")
    if activation not in (None, "silu"):
        raise ValueError(f"{OP}: activation is {activation!r}; None or 'silu' is wanted")
    checks.eps(OP, eps)

    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    call = checks.call(
        OP,
        x,
        (x, norm_weight, norm_bias, weight, bias),
        out_features=weight.shape[0],
        activation=activation,
        contiguous=x.is_contiguous(),
    )
    chosen = choose(call, backend)
    if chosen == "reference":  # under autocast PyTorch casts the weights itself, and caches the casts of a step
        return reference.layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation)
    weight, bias = checks.cast(x.dtype, weight, bias)
    return apply(chosen, call.needs_grad, x, norm_weight, norm_bias, weight, bias, eps, activation or "")


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _LayerNormLinear.apply(backend, *arguments)
    return run(OP, backend, *arguments)[0]


class _LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, norm_weight, norm_bias, weight, bias, eps, activation):
        out, mean, rstd = run(OP, backend, x, norm_weight, norm_bias, weight, bias, eps, activation)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight, bias)
        ctx.backend, ctx.eps, ctx.activation = backend, eps, activation
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors  # read once: gradient checkpointing returns each tensor a single time
        if again():
            inputs = (saved[0], *saved[3:], ctx.eps, ctx.activation)
            return None, *gradients(reference.layer_norm_linear, grad_out, *inputs)
        grads = run(f"{OP}_backward", ctx.backend, grad_out, *saved, ctx.activation)
        return None, *grads[:4], None if saved[-1] is None else grads[4], None, None


@register_fake(OP)
def _fake(x, norm_weight, norm_bias, weight, bias, eps, activation):
    rows = x.shape[:-1]
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((*rows, weight.shape[0])),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation):
    return (
        x.new_empty(x.shape),
        norm_weight.new_empty(norm_weight.shape),
        norm_bias.new_empty(norm_bias.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:1]),
    )
