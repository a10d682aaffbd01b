# SPDX-License-Identifier: Apache-2.0
"""``batch_norm_activation``: BatchNorm in training and the activation behind it, as in every convolution layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._utils.transforms import again, gradients, layout_of
from ..backends import choose, reference, run
from ..backends.library import register_fake
from . import _checks as checks

OP = "batch_norm_activation"


def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """``silu(batch_norm(x))`` with the statistics of the batch, differentiable in x, weight and bias.

    Example:
        >>> x = batch_norm_activation(x, norm.weight, norm.bias, norm.running_mean, norm.running_var)

    Kernels save x and the statistics for backward, and compute the normalised map again; PyTorch's two operators save
    that as well.

    Args:
        x: (N, C, H, W) float32, bfloat16, float16 or float64, channels-last or contiguous. Autocast does not cast it,
            as it does not for PyTorch's own.
        weight, bias: (C,), in x's dtype or float32.
        running_mean, running_var: (C,), in the dtype of weight, updated in place: r ← (1 − momentum) · r + momentum ·
            (the batch's mean, or its unbiased variance). None, both of them, if there are none.
        momentum: of the running statistics, a number.
        eps: added to the variance, positive.
        activation: "silu" or None.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (N, C, H, W), in x's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value; a channel has one value
            alone.
        BackendError: `backend` cannot serve the call.

    Batch normalisation: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    checks.tensor(OP, "x", x, 4, "(N, C, H, W)")
    statistics = {"running_mean": running_mean, "running_var": running_var}
    if (running_mean is None) != (running_var is None):
        absent = next(name for name, value in statistics.items() if value is None)
        raise ValueError(f"{OP}: {absent} is None and the other running statistic is not; give both or neither")
    vectors: dict[str, Any] = {"weight": weight, "bias": bias}
    if running_mean is not None:
        vectors |= statistics
    checks.norm_parameters(OP, x, **vectors)
    channels = x.shape[1]
    for name, value in vectors.items():
        checks.shape(OP, name, value, (channels,), "one value for each channel of x")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, one value a channel, which has no variance; more images or pixels "
            "are wanted in training"
        )
    if not isinstance(momentum, int | float) or not math.isfinite(momentum):
        raise ValueError(
            f"{OP}: momentum is {momentum!r}; a number is wanted (None of nn.BatchNorm2d stands for "
            "1 / num_batches_tracked)"
        )
    checks.eps(OP, eps)
    if activation not in (None, "silu"):
        raise ValueError(f"{OP}: activation is {activation!r}; 'silu' or None is wanted")

    call = checks.call(OP, x, (x, *vectors.values()), layout=layout_of(x))
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.batch_norm_activation(x, weight, bias, running_mean, running_var, momentum, eps, activation)
    return unchecked(chosen, call.needs_grad, x, weight, bias, running_mean, running_var, momentum, eps, activation)


def unchecked(
    backend: str,
    needs_grad: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """`batch_norm_activation` by the kernels of `backend`, for arguments that are known to be right and a call that it
    is known to serve, as in a convolution layer: the checks take longer than the launches."""

    def learn(mean: Tensor, variance: Tensor) -> None:
        # Like PyTorch, which learns nothing from no pixels.
        if running_mean is not None and running_var is not None and x.numel() > 0:
            _update((running_mean, running_var), (mean, variance), momentum)

    return apply(backend, needs_grad, x, weight, bias, float(eps), activation or "", learn=learn)


def apply(
    backend: str, needs_grad: bool, *arguments, learn: Callable[[Tensor, Tensor], None] = lambda mean, variance: None
) -> Tensor:
    """The raw operator of `backend`, wrapped in autograd if a gradient is needed; `learn` gets mean and unbiased
    variance of the batch."""
    if needs_grad and torch.compiler.is_compiling():
        out, mean, variance = _BatchNormActivation.apply(backend, None, *arguments)
        learn(mean, variance)
        return out
    if needs_grad:
        # Inside, before anything is saved: checkpointing ends its second forward with the last tensor that is.
        return _BatchNormActivation.apply(backend, learn, *arguments)[0]
    out, mean, _, variance = run(OP, backend, *arguments)
    learn(mean, variance)
    return out


def _update(running: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], momentum: float) -> None:
    if not torch.compiler.is_compiling():
        # As PyTorch's batch norm, which keeps its running statistics for a backward that does not read them: without
        # counting the change, or another call's backward would refuse.
        running = running[0].data, running[1].data
        if running[0].dtype == values[0].dtype:
            torch._foreach_lerp_(running, values, momentum)  # one launch on a GPU
            return
    for old, value in zip(running, values, strict=True):
        if old.dtype == value.dtype:
            old.lerp_(value, momentum)
        else:
            old.copy_(old.to(value.dtype).lerp_(value, momentum))


class _BatchNormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, learn, x, weight, bias, eps, activation):
        out, mean, rstd, variance = run(OP, backend, x, weight, bias, eps, activation)
        if learn is not None:
            learn(mean, variance)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.backend, ctx.eps, ctx.activation = backend, eps, activation
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad_out, *_):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        if again():
            settings = None, None, 0.0, ctx.eps, ctx.activation or None
            return (
                None,
                None,
                *gradients(reference.batch_norm_activation, grad_out, x, weight, bias, *settings)[:3],
                None,
                None,
            )
        grads = run(f"{OP}_backward", ctx.backend, grad_out, x, mean, rstd, weight, bias, ctx.activation)
        return None, None, *grads, None, None


@register_fake(OP)
def _fake(x, weight, bias, eps, activation):
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd, variance = (x.new_empty(x.shape[1:2], dtype=statistics) for _ in range(3))
    return torch.empty_like(x), mean, rstd, variance


@register_fake(f"{OP}_backward")
def _fake_backward(grad_out, x, mean, rstd, weight, bias, activation):
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
