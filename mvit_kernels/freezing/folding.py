# SPDX-License-Identifier: Apache-2.0
"""Folding of batch norm, and of SiLU or ReLU, into a convolution.

In evaluation mode batch norm is an affine map of each channel, so ``BN(conv(x)) = conv'(x)`` with ``w' = w·γ/σ`` and
``b' = β + (b − μ)·γ/σ`` (Jacob et al. 2018, arXiv:1712.05877, section 3.2). The fold is computed in float64.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._utils.plain import activation_kind, does_nothing, is_own, is_plain, tensor_reason
from ..adapters._block import has_hooks
from .modules import FrozenConv2d

_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")  # timm's
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def is_norm(module: nn.Module | None) -> bool:
    """Whether `module` is any kind of batch norm, including kinds that cannot be folded."""
    return isinstance(module, _BatchNorm) or type(module).__name__ in ("FrozenBatchNorm2d", *_WITH_ACTIVATION)


def norm_reason(norm: nn.Module) -> str | None:
    """Why `norm` is not known to be an affine map in evaluation mode, plus perhaps an activation; None if it is."""
    kind = type(norm).__name__
    if is_own(norm, "timm", *_WITH_ACTIVATION):
        if "drop" in norm._modules and not does_nothing(norm.drop):
            return f"its {kind} has a {type(norm.drop).__name__}"
        if set(norm._modules) - {"drop", "act"}:
            return f"its {kind} has further modules"
        if not (activation_kind(norm.act) or does_nothing(norm.act)):
            return f"activation {type(norm.act).__name__}; only SiLU and ReLU are fused"
    elif not is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and not is_own(norm, "torchvision", "FrozenBatchNorm2d"):
        if isinstance(norm, _BatchNorm):
            return f"{kind} is a subclassed or patched batch norm, and may compute something different"
        return f"{kind} is not a BatchNorm2d"
    if norm.running_mean is None or norm.running_var is None:
        return "its batch norm keeps no running statistics"
    return next(filter(None, (tensor_reason(name, getattr(norm, name)) for name in _STATISTICS)), None)


def activation_of(norm: nn.Module | None) -> nn.Module | None:
    """The activation built into a norm, as in timm's; None if there is none."""
    return norm._modules.get("act") if is_own(norm, "timm", *_WITH_ACTIVATION) else None


def fold(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> FrozenConv2d | str:
    """Fold `norm` and `activation` into `conv`; return the `FrozenConv2d`, or the reason why it cannot be done.

    Args:
        conv: the convolution.
        norm: the batch norm after it, or None.
        activation: the activation after the norm, or None; one that is built into the norm comes first.
    """
    if not is_plain(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not a plain Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    for name in ("weight", "bias"):
        reason = tensor_reason(name, getattr(conv, name))
        if reason is not None:
            return reason
    if norm is not None:
        reason = norm_reason(norm)
        if reason is not None:
            return reason
        if any(value.shape != conv.weight.shape[:1] for value in _statistics(norm) if value is not None):
            return f"its batch norm is not of {conv.weight.shape[0]} channels"
        if norm.running_mean.device != conv.weight.device:
            return f"its batch norm is on {norm.running_mean.device}, and the convolution is on {conv.weight.device}"
    activations = [act for act in (activation_of(norm), activation) if act is not None and not does_nothing(act)]
    for act in activations:
        if activation_kind(act) is None:
            return f"activation {type(act).__name__}; only SiLU and ReLU are fused"
    if len(activations) > 1:
        return "it has two activations"
    with torch.no_grad():
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            gamma, beta, mean, variance = (None if value is None else value.double() for value in _statistics(norm))
            scale = torch.rsqrt(variance + norm.eps)
            if gamma is not None:
                scale = scale * gamma
            weight = weight * scale.reshape(-1, 1, 1, 1)
            bias = (bias - mean) * scale
            if beta is not None:
                bias = bias + beta
        return FrozenConv2d(
            weight.to(conv.weight.dtype),
            bias.to(conv.weight.dtype),
            stride=tuple(conv.stride),
            padding=tuple(conv.padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            activation=activation_kind(activations[0]) if activations else None,
        )


def hooked(*modules: nn.Module | None) -> str | None:
    """Why `modules` cannot be replaced by one that does not call them; None if none of them has a hook."""
    if any(module is not None and has_hooks(module) for module in modules):
        return "an inner module carries a hook"
    return None


def _statistics(norm: nn.Module) -> tuple[torch.Tensor | None, ...]:
    return tuple(getattr(norm, name) for name in _STATISTICS)
