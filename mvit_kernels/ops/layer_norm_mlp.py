# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_mlp``: the MLP half of a transformer layer as one operator; the hidden rows never reach memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.transforms import again, gradients, zeros_like_bias
from ..backends import choose, reference, run
from ..backends.library import register_fake
from . import _checks as checks

OP = "layer_norm_mlp"


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``x + fc2(silu(fc1(LayerNorm(x))))``, differentiable in every tensor.

    Example:
        >>> x = layer_norm_mlp(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    Args:
        x: (..., d) float32, bfloat16, float16 or float64; any strides.
        norm_weight, norm_bias: (d,), in x's dtype or float32.
        fc1_weight, fc1_bias: (hidden, d) and (hidden,), in x's dtype. MobileViT's hidden is 2·d, Kornia's 2·d or 4·d.
        fc2_weight, fc2_bias: (d, hidden) and (d,), in x's dtype.
        eps: added to the variance, positive.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (..., d), in x's dtype, or in autocast's dtype where it is enabled.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call.

    MobileViT, arXiv:2110.02178, section 3.1; SiLU: Elfwing et al. 2017, arXiv:1702.03118.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x)
    checks.like(
        OP,
        x,
        "x",
        dtype is not None,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    if x.dim() == 0:
        raise ValueError(f"{OP}: x has no axes; (..., d) is wanted")
    d = x.shape[-1]
    checks.shape(OP, "norm_weight", norm_weight, (d,), "the width of x")
    checks.shape(OP, "norm_bias", norm_bias, (d,), "the width of x")
    if fc1_weight.dim() != 2 or fc1_weight.shape[1] != d:
        raise ValueError(
            f"{OP}: fc1_weight has shape {tuple(fc1_weight.shape)}; (hidden, {d}) is wanted, for x of width {d}"
        )
    hidden = fc1_weight.shape[0]
    checks.shape(OP, "fc1_bias", fc1_bias, (hidden,), "one value for each row of fc1_weight")
    checks.shape(OP, "fc2_weight", fc2_weight, (d, hidden), "(width of x, rows of fc1_weight)")
    checks.shape(OP, "fc2_bias", fc2_bias, (d,), "the width of x")
    checks.eps(OP, eps)

    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    call = checks.call(
        OP,
        x,
        (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        hidden_features=hidden,
        contiguous=x.is_contiguous(),
    )
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps)
    weights = checks.cast(x.dtype, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return apply(chosen, call.needs_grad, x, norm_weight, norm_bias, *weights, eps)


def apply(backend: str, needs_grad: bool, *arguments) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed."""
    if needs_grad:
        return _LayerNormMLP.apply(backend, *arguments)
    return run(OP, backend, *arguments)[0]


class _LayerNormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
        out, mean, rstd = run(OP, backend, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
        ctx.backend, ctx.eps = backend, eps
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        if again():
            inputs = (saved[0], *saved[3:], zeros_like_bias(saved[-1]), ctx.eps)
            return None, *gradients(reference.layer_norm_mlp, grad_out, *inputs)
        return None, *run(f"{OP}_backward", ctx.backend, grad_out, *saved), None


@register_fake(OP)
def _fake(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=statistics),
        x.new_empty(x.shape[:-1], dtype=statistics),
    )


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight):
    inputs = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    return *(t.new_empty(t.shape) for t in inputs), fc2_weight.new_empty(fc2_weight.shape[:1])
