# SPDX-License-Identifier: Apache-2.0
"""The convolution layers of all libraries: in training, batch norm and the SiLU behind it run as one operator.

A layer is one of a library's own classes, or a plain ``nn.Sequential`` that contains a batch norm, as Kornia's and
cvnets' layers are. Its convolutions remain modules that are called, so they may be anything, LoRA layers too; a batch
norm and its activation are bypassed, and must be exactly PyTorch's. What the operator would compute differently, or no
kernel serves, runs module by module: evaluation, a frozen batch norm, cumulative averages, a contiguous map on a GPU.

This is an adapter as `_swap` takes it: `parts`, `forward`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._utils.plain import is_identity, is_own, is_plain, is_silu
from .._utils.transforms import layout_of, obstacle
from ..backends import Call, Serving, explain, has_kernels, server
from ..ops.batch_norm_activation import unchecked
from . import _depthwise
from ._block import Refusal, Seen, has_hooks, original_class

OPERATOR = "batch_norm_activation"
TRAINING_ONLY = True
LOG_LEVEL = logging.INFO  # of a layer that runs its own forward: it is right, and nearly as fast

# Package, class, and its children in the order in which its forward calls them.
LAYERS = (
    ("timm", "ConvNormAct", ("conv", "bn", "aa")),
    ("transformers", "MobileViTConvLayer", ("convolution", "normalization", "activation")),
    ("mvit_kernels", "ConvNormAct", ("conv", "norm", "act")),
)


class Step(NamedTuple):
    """Part of a layer's forward: modules called one after another, or in their place one operator."""

    modules: tuple[nn.Module, ...]
    norm: nn.BatchNorm2d | None = None  # the batch norm among them, if they are one and its activation
    activation: str | None = None
    strided: bool = False  # a convolution that may be `_depthwise.is_slow`


class LayerParts(NamedTuple):
    steps: tuple[Step, ...]
    seen: Seen

    @property
    def norms(self) -> int:
        """How many batch norms the operator computes."""
        return sum(step.norm is not None for step in self.steps)


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a convolution layer with a batch norm, of whatever kind."""
    return norms(module) > 0


def norms(layer: nn.Module) -> int:
    """How many batch norms `layer` calls, of whatever kind."""
    return sum(isinstance(module, _BatchNorm) for module in _sequence(layer) or ())


def parts(layer: nn.Module) -> LayerParts:
    """The steps of a layer; raises `Refusal` with every reason against it."""
    steps: list[Step] = []
    reasons: list[str] = []
    modules = list(_sequence(layer) or ())
    while modules:
        step = _first_step(modules)
        del modules[: len(step.modules)]
        steps.append(step)
    bypassed = [module for step in steps if step.norm is not None for module in _bypassed(step)]
    others = [step.modules[0] for step in steps if step.norm is None and isinstance(step.modules[0], _BatchNorm)]
    seen = Seen((layer, *bypassed, *others), ())
    if not bypassed:  # else the others are called as modules
        reasons += [f"its {type(norm).__name__} is not a plain batch norm, alone or with SiLU" for norm in others]
    for module in bypassed:
        if has_hooks(module):
            reasons.append(f"its {type(module).__name__} carries a hook, which would no longer be called")
        if "forward" in module.__dict__:
            reasons.append(f"the forward of its {type(module).__name__} was replaced on the instance")
    if original_class(layer) is type(layer) and "forward" in layer.__dict__:
        reasons.append("its forward was replaced on the instance")
    if reasons:
        raise Refusal(reasons, seen)
    return LayerParts(tuple(steps), seen)


def wants(x: Tensor) -> bool:
    """Whether any backend has the operator for x's device: on others a layer loses 1 µs."""
    return has_kernels(OPERATOR, x.device.type)


def serving(parts: LayerParts, backend: str | None) -> Serving | None:
    """What serves the layer's batch norms in training, on their device and in their dtype; None if it has none."""
    weight = next((step.norm.weight for step in parts.steps if step.norm is not None), None)
    if weight is None:
        return None
    facts = (("layout", "channels_last"),)
    call = Call(OPERATOR, weight.device.type, weight.dtype, True, (2, *weight.shape, 8, 8), facts)
    return explain([call], backend)


def forward(parts: LayerParts, x: Tensor, backend: str | None) -> Tensor:
    """Run the layer step by step, each on the operator if a kernel serves it now."""
    for step in parts.steps:
        y = None if step.norm is None else _normalised(step.norm, x, step.activation, backend)
        if y is not None:
            x = y
        elif step.strided and _depthwise.is_slow(step.modules[0], x):
            x = _depthwise.convolution(step.modules[0], x)
        else:
            for module in step.modules:
                x = module(x)
    return x


def _sequence(layer: nn.Module) -> tuple[nn.Module, ...] | None:
    """The modules that a layer calls, in order; None if it is none of the known kinds."""
    cls = original_class(layer)
    if cls is nn.Sequential:
        return tuple(layer._modules.values())
    for package, name, children in LAYERS:
        if cls.__name__ == name and package in cls.__module__.split("."):
            called = [layer._modules.get(child) for child in children]
            return tuple(module for module in called if module is not None)
    return None


def _is_batch_norm(module: nn.Module | None) -> bool:
    """Exact classes first, as in `mvit_kernels._utils.plain`: torch.compile cannot trace `is_plain` of a subclass."""
    return (
        type(module) is nn.BatchNorm2d
        or is_own(module, "cvnets", "BatchNorm2d")
        or (not torch.compiler.is_compiling() and is_plain(module, nn.BatchNorm2d))
    )


def _first_step(modules: Sequence[nn.Module]) -> Step:
    """What can run as one: of `modules` the first, or a batch norm and the SiLU behind it."""
    first = modules[0]
    if is_own(first, "timm", "BatchNormAct2d"):  # with a dropout and an activation of its own
        drop, act = first._modules.get("drop"), first._modules.get("act")
        if (drop is None or is_identity(drop)) and (act is None or is_identity(act) or is_silu(act)):
            return Step((first,), first, "silu" if is_silu(act) else None)
    elif _is_batch_norm(first):
        if len(modules) > 1 and is_silu(modules[1]):
            return Step((first, modules[1]), first, "silu")
        return Step((first,), first)
    return Step((first,), strided=isinstance(first, nn.Conv2d) and first.groups > 1 and first.stride != (1, 1))


def _bypassed(step: Step) -> list[nn.Module]:
    """The modules that are not called when the operator runs."""
    return [*step.modules, *(inner for inner in step.norm._modules.values() if inner is not None)]


def _normalised(norm: nn.BatchNorm2d, x: Tensor, activation: str | None, backend: str | None) -> Tensor | None:
    """Norm and activation as one operator; None where no kernel computes what they would."""
    if not (norm.training and norm.track_running_stats) or norm.momentum is None or not norm.eps > 0:
        return None
    # What is not in these dictionaries is computed, by a parametrization, or a copy, by DataParallel.
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    mean, variance = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if weight is None or bias is None or mean is None or variance is None:
        return None
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == weight.shape[0] < x.numel()):
        return None  # for PyTorch's own errors
    if not weight.dtype == bias.dtype == mean.dtype == variance.dtype:
        return None
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        return None
    if not x.device == weight.device == bias.device == mean.device == variance.device:
        return None
    if not weight.shape == bias.shape == mean.shape == variance.shape:
        return None
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    hindered = obstacle((x, weight, bias, mean, variance))
    call = Call(OPERATOR, x.device.type, x.dtype, needs_grad, tuple(x.shape), (("layout", layout_of(x)),), hindered)
    chosen = server(OPERATOR, call, backend)
    if chosen is None:
        return None
    tracked = norm._buffers.get("num_batches_tracked")
    if tracked is not None:
        tracked.add_(1)
    return unchecked(chosen, needs_grad, x, weight, bias, mean, variance, norm.momentum, norm.eps, activation)
