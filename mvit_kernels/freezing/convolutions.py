# SPDX-License-Identifier: Apache-2.0
"""Freezes the libraries' convolutional units and inverted residuals in place, for `freeze`.

A unit is a convolution, a batch norm and an activation in sequence. It is recognized by its exact library class, whose
forward is known, and may not contain anything else that computes. cvnets' code is often copied to other packages; such
a copy is tested numerically. A module that is not recognized is kept, with the reason.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

from .._utils.plain import activation_kind, alike, cast_floats, copy_of, does_nothing, is_global_mean, is_own, is_plain
from .folding import activation_of, fold, hooked, is_norm, norm_reason
from .modules import FrozenConv2d, FrozenInvertedResidual, FrozenMean

# Package, class names, and paths of the convolution, the norm and the activation (timm's batch norm includes its own).
# Norm and activation may be missing, as in the 1×1 convolution into the transformer.
UNITS = (
    ("timm", ("ConvNormAct",), "conv", "bn", ""),
    ("mvit_kernels", ("ConvNormAct",), "conv", "norm", "act"),
    ("transformers", ("MobileViTConvLayer",), "convolution", "normalization", "activation"),
    ("cvnets", ("ConvLayer", "ConvLayer2d"), "block.conv", "block.norm", "block.act"),  # the latter since 0.3
)

# Package, class name, paths of the three units, and a function that tells whether the block adds its input.
INVERTED_RESIDUALS = (
    ("timm", "BottleneckBlock", "conv1_1x1", "conv2_kxk", "conv3_1x1", lambda block: block.shortcut is not None),
    (
        "transformers",
        "MobileViTInvertedResidual",
        *("expand_1x1", "conv_3x3", "reduce_1x1"),
        lambda block: block.use_residual,
    ),
    (
        "cvnets",
        "InvertedResidual",
        *("block.exp_1x1", "block.conv_3x3", "block.red_1x1"),
        lambda block: getattr(block, "use_res_connect", False),
    ),
    ("mvit_kernels", "InvertedResidual", "expand", "depthwise", "project", lambda block: block.residual),
    ("kornia", "MV2Block", "conv.0", "conv.3", "conv.6", lambda block: block.use_res_connect),
)

FURTHER = "it has further modules"
UNFOLDED = "one of its convolutions could not be folded"
TRIED = ((7, 6), (4, 9))  # sizes of the maps on which a copy of cvnets' classes is tested


def freeze_convolutions(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Replace every unit below `model` by a `FrozenConv2d`; yield (name, None), or (name, reason) if it cannot be.

    Bare convolutions are replaced too: the 1×1 into the transformer, and that of a unit that cannot be folded."""
    refused: list[str] = []
    for name, module in list(model.named_modules()):
        frozen = _folded_unit(module)
        if frozen is None:
            continue
        if isinstance(frozen, str):
            refused.append(f"{name}.")
            yield name, frozen
        else:
            replace(model, module, frozen)
            yield name, None
    for name, module in list(model.named_modules()):
        if is_plain(module, nn.Sequential):
            yield from _freeze_sequential(name, module)
    for name, module in list(model.named_modules()):
        if not is_plain(module, nn.Conv2d):
            continue
        frozen = fold(module, None, None)
        if not isinstance(frozen, str):
            replace(model, module, frozen)
            yield name, None
        elif not any(name.startswith(unit) for unit in refused):
            yield name, frozen


def freeze_inverted_residuals(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Replace blocks whose three units are frozen by `FrozenInvertedResidual`; yields as `freeze_convolutions` does."""
    for name, module in list(model.named_modules()):
        for package, cls, *paths, adds_input in INVERTED_RESIDUALS:
            units = [_submodule(module, path) for path in paths] if _may_be(module, package, cls) else [None]
            if any(unit is None for unit in units):
                continue
            reason = _inverted_residual_reason(module, units)
            if reason is None:
                frozen = FrozenInvertedResidual(*units, residual=bool(adds_input(module)))
                if is_own(module, package, cls) or alike(frozen, module, frozen.in_channels, TRIED):
                    replace(model, module, frozen)
                else:
                    reason = f"it has the name of cvnets' {cls}, but computes something different"
            yield name, reason
            break


def freeze_means(model: nn.Module) -> None:
    """Make links of the means over whole maps that frozen convolutions in the same Sequential read."""
    for sequential in model.modules():
        if not is_plain(sequential, nn.Sequential):
            continue
        children = [item for item in sequential._modules.items() if not does_nothing(item[1])]
        for (name, mean), (_, reader) in zip(children, children[1:], strict=False):
            if is_global_mean(mean) and isinstance(reader, FrozenConv2d) and not hooked(mean):
                sequential._modules[name] = FrozenMean(reader.in_channels)


def replace(model: nn.Module, original: nn.Module, frozen: nn.Module) -> None:
    """Replace `original` by `frozen` under every name that it has below `model`, and move its hooks."""
    move_hooks(original, frozen)
    for owner in model.modules():
        for name, child in list(owner._modules.items()):
            if child is original:
                owner._modules[name] = frozen


def move_hooks(original: nn.Module, frozen: nn.Module) -> None:
    """Move the forward and backward hooks of `original` to `frozen`, so that they are still called.

    timm's ``features_only`` relies on forward hooks, inspection of gradients on backward hooks. `original` may still
    serve some calls, and must not call them a second time.
    """
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        frozen.__dict__[name] = original.__dict__[name]
        original.__dict__[name] = OrderedDict()
    frozen._is_full_backward_hook = original._is_full_backward_hook


def _submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        module = getattr(module, "_modules", {}).get(name)
    return module


def _may_be(module: nn.Module, package: str, *classes: str) -> bool:
    """Whether `module` is one of a library's `classes`, or a possible copy of cvnets' with the same class name."""
    return is_own(module, package, *classes) or (package == "cvnets" and type(module).__name__ in classes)


def _folded_unit(unit: nn.Module) -> FrozenConv2d | str | None:
    """`unit` folded, or the reason why it cannot be; None if it is not a library's unit."""
    for package, classes, *paths in UNITS:
        if not _may_be(unit, package, *classes) or _submodule(unit, paths[0]) is None:
            continue
        frozen = _fold_parts(unit, paths)
        if isinstance(frozen, str) or is_own(unit, package, *classes):
            return frozen
        exact = cast_floats(copy_of(unit), torch.float64)  # else the fold's rounding would show
        if alike(_fold_parts(exact, paths), exact, frozen.in_channels, TRIED):
            return frozen
        return f"it has the name of cvnets' {type(unit).__name__}, but computes something different"
    return None


def _fold_parts(unit: nn.Module, paths: list[str]) -> FrozenConv2d | str:
    conv, norm, activation = (_submodule(unit, path) if path else None for path in paths)
    norm = None if does_nothing(norm) else norm
    steps = [module for module in (conv, norm, activation) if module is not None]
    reason = hooked(*(module for module in unit.modules() if module is not unit)) or _others_reason(unit, steps)
    return reason or fold(conv, norm, activation)


def _others_reason(owner: nn.Module, steps: list[nn.Module]) -> str | None:
    """Why calling `owner` may differ from calling `steps` in order; None if nothing else in it computes."""
    known = {id(inner) for step in steps for inner in step.modules()}
    order = []
    for module in owner.modules():
        if module in steps:
            order.append(module)
        elif id(module) in known or module is owner or does_nothing(module):
            continue
        elif not (is_plain(module, nn.Sequential) and any(step in module.children() for step in steps)):
            return FURTHER
    return None if order == steps else "its modules are in another order"


def _freeze_sequential(name: str, sequential: nn.Sequential) -> Iterator[tuple[str, str | None]]:
    """Fold runs of Conv2d, BatchNorm2d and an activation in a Sequential, as Kornia and cvnets have them; norm or
    activation may be missing.

    A norm or activation that was folded becomes Identity in this Sequential only: elsewhere it may be called by itself.
    """
    children = list(sequential._modules.items())
    for index, (conv_name, conv) in enumerate(children[:-1]):
        norm_name, norm = children[index + 1]
        if not isinstance(conv, nn.Conv2d):
            continue
        if activation_kind(norm) is not None and not hooked(conv, norm):
            frozen = fold(conv, None, norm)
            if isinstance(frozen, FrozenConv2d):  # else the bare convolution is reported
                sequential._modules[conv_name] = frozen
                sequential._modules[norm_name] = nn.Identity()
                yield f"{name}.{conv_name}", None
            continue
        if not is_norm(norm):
            continue
        reason = norm_reason(norm)
        if reason is not None:
            yield f"{name}.{norm_name}", reason
            continue
        act_name, act = children[index + 2] if index + 2 < len(children) else ("", None)
        own_act = activation_of(norm)
        if activation_kind(act) is None or not (own_act is None or does_nothing(own_act)):
            act = None
        frozen = hooked(conv, *norm.modules(), act) or fold(conv, norm, act)
        if isinstance(frozen, str):
            yield f"{name}.{conv_name}", frozen
            continue
        sequential._modules[conv_name] = frozen
        sequential._modules[norm_name] = nn.Identity()
        if act is not None:
            sequential._modules[act_name] = nn.Identity()
        yield f"{name}.{conv_name}", None


def _inverted_residual_reason(block: nn.Module, units: list[nn.Module]) -> str | None:
    """Why `block` is not exactly expand, depthwise 3×3 and project; None if it is."""
    if not all(isinstance(unit, FrozenConv2d) for unit in units):
        return UNFOLDED
    reason = _others_reason(block, units) or hooked(*(m for m in block.modules() if m is not block and m not in units))
    if reason is not None:
        return reason
    expand, depthwise, project = units
    hidden = expand.weight.shape[0]
    fits = (
        expand.weight.shape[2:] == project.weight.shape[2:] == (1, 1)
        and depthwise.weight.shape == (hidden, 1, 3, 3)
        and depthwise.groups == hidden
        and depthwise.padding == depthwise.dilation
        and depthwise.stride[0] == depthwise.stride[1]
        and depthwise.dilation[0] == depthwise.dilation[1]
        and expand.stride == project.stride == (1, 1)
        and expand.groups == project.groups == 1
        and (expand.activation, depthwise.activation, project.activation) == ("silu", "silu", None)
    )
    return None if fits else "it is not a 1×1, a depthwise 3×3 and a 1×1 convolution with SiLU on the first two"
