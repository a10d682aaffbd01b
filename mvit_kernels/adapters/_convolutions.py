# SPDX-License-Identifier: Apache-2.0
"""The convolutional units of the libraries, and the folding of their batch norms, for `freeze`.

A unit is convolution, batch norm and activation, one after another. Batch norm in evaluation is an affine map for each
channel, so ``BN(conv(x)) = conv'(x)`` with ``w' = w·γ/σ`` and ``b' = β + (b − μ)·γ/σ`` (Jacob et al. 2018,
arXiv:1712.05877, section 3.2). The folding is done in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..nn.frozen import FrozenConv2d, FrozenInvertedResidual
from ._block import has_hooks

# class name -> where its convolution, its norm and its activation are (timm's batch norm carries the activation); norm
# and activation may be missing, as in the 1×1 convolution into the transformer
UNITS = (
    ("ConvNormAct", "conv", "bn", "bn.act"),  # timm
    ("ConvNormAct", "conv", "norm", "act"),  # ours
    ("MobileViTConvLayer", "convolution", "normalization", "activation"),  # Hugging Face
    ("ConvLayer", "block.conv", "block.norm", "block.act"),  # cvnets
)

# class name -> its three units, and how it says that it adds its input
INVERTED_RESIDUALS = (
    ("BottleneckBlock", "conv1_1x1", "conv2_kxk", "conv3_1x1", lambda block: block.shortcut is not None),  # timm
    ("MobileViTInvertedResidual", "expand_1x1", "conv_3x3", "reduce_1x1", lambda block: block.use_residual),
    (  # cvnets
        "InvertedResidual",
        *(f"block.{unit}" for unit in ("exp_1x1", "conv_3x3", "red_1x1")),
        lambda block: block.use_res_connect,
    ),
    ("InvertedResidual", "expand", "depthwise", "project", lambda block: block.residual),  # ours
    ("MV2Block", "conv.0", "conv.3", "conv.6", lambda block: block.use_res_connect),  # Kornia
)


def freeze_convolutions(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Put `FrozenConv2d` in place of every unit below `model`; yield (name, None) for it, or (name, why not).

    Bare convolutions become one too: the 1×1 into the transformer, and the one of a unit that cannot be folded."""
    refused: list[str] = []
    for name, owner, child_name, child in _children(model):
        paths = _unit(child)
        if paths is None:
            continue
        conv, norm, activation = (_submodule(child, path) for path in paths)
        frozen = _fold(conv, norm, activation, gone=[module for module in child.modules() if module is not child])
        if isinstance(frozen, str):
            refused.append(f"{name}.")
            yield name, frozen
        else:
            owner._modules[child_name] = with_hooks(frozen, child)
            yield name, None
    for owner_name, owner in list(model.named_modules()):
        if type(owner) is nn.Sequential:
            yield from _freeze_sequential(owner_name, owner)
    for name, owner, child_name, child in _children(model):
        if type(child) is not nn.Conv2d:
            continue
        frozen = _fold(child, None, None, gone=[])
        if not isinstance(frozen, str):
            owner._modules[child_name] = with_hooks(frozen, child)
            yield name, None
        elif not any(name.startswith(unit) for unit in refused):
            yield name, frozen


def freeze_inverted_residuals(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Put `FrozenInvertedResidual` in place of blocks whose three units are frozen; yield as `freeze_convolutions`."""
    for name, owner, child_name, child in _children(model):
        for cls, *paths, adds_input in INVERTED_RESIDUALS:
            units = [_submodule(child, path) for path in paths] if type(child).__name__ == cls else [None]
            if any(unit is None for unit in units):
                continue
            reason = _inverted_residual_reason(child, units)
            if reason is None:
                frozen = FrozenInvertedResidual(*units, residual=bool(adds_input(child)))
                owner._modules[child_name] = with_hooks(frozen, child)
            yield name, reason
            break


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module below `model`, as (name, owner, the name there, itself); owners may be changed while this runs."""
    for owner_name, owner in list(model.named_modules()):
        for child_name, child in list(owner._modules.items()):
            if child is not None:
                yield f"{owner_name}.{child_name}".removeprefix("."), owner, child_name, child


def _unit(module: nn.Module) -> tuple[str, str, str] | None:
    for cls, conv, norm, activation in UNITS:
        if type(module).__name__ != cls or _submodule(module, conv) is None:
            continue
        known = {id(_submodule(module, path)) for path in (conv, activation)}
        if _submodule(module, norm) is not None or all(id(m) in known for m in module.modules() if not m._modules):
            return conv, norm, activation
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def _freeze_sequential(name: str, sequential: nn.Sequential) -> Iterator[tuple[str, str | None]]:
    """Kornia and cvnets: runs of Conv2d, BatchNorm2d and SiLU in a Sequential. What is folded away becomes Identity."""
    children = list(sequential._modules.items())
    for index, (conv_name, conv) in enumerate(children):
        if not isinstance(conv, nn.Conv2d) or index + 1 == len(children):
            continue
        norm_name, norm = children[index + 1]
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        act_name, act = children[index + 2] if index + 2 < len(children) else ("", None)
        if act is not None and not _is_silu(act):
            act = None
        frozen = _fold(conv, norm, act, gone=[module for module in (conv, norm, act) if module is not None])
        if isinstance(frozen, str):
            yield f"{name}.{conv_name}", frozen
            continue
        sequential._modules[conv_name] = frozen
        sequential._modules[norm_name] = nn.Identity()
        if act is not None:
            sequential._modules[act_name] = nn.Identity()
        yield f"{name}.{conv_name}", None


def _fold(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None, gone) -> FrozenConv2d | str:
    """The folded convolution, or why it cannot be folded; `gone` are the modules that nobody will call any more."""
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return f"{type(conv).__name__} is no plain Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    if norm is not None and not isinstance(norm, nn.BatchNorm2d):
        return f"{type(norm).__name__} is no BatchNorm2d"
    if norm is not None and norm.running_mean is None:
        return "its batch norm keeps no running statistics"
    if activation is not None and not (_is_silu(activation) or isinstance(activation, nn.Identity)):
        return f"activation {type(activation).__name__}; only SiLU is fused"
    if any(has_hooks(module) for module in gone):
        return "an inner module carries a hook"
    with torch.no_grad():
        weight = conv.weight.double()
        bias = torch.zeros(conv.out_channels).to(weight) if conv.bias is None else conv.bias.double()
        if norm is not None:
            scale = torch.rsqrt(norm.running_var.double() + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            weight = weight * scale.reshape(-1, 1, 1, 1)
            bias = (bias - norm.running_mean.double()) * scale
            if norm.bias is not None:
                bias = bias + norm.bias.double()
        return FrozenConv2d(
            weight.to(conv.weight.dtype),
            bias.to(conv.weight.dtype),
            stride=tuple(conv.stride),
            padding=tuple(conv.padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            activation="silu" if activation is not None and _is_silu(activation) else None,
        )


def _inverted_residual_reason(block: nn.Module, units: list[nn.Module]) -> str | None:
    """Why `block` is not expand, depthwise 3×3, project and nothing else; None if it is."""
    if not all(isinstance(unit, FrozenConv2d) for unit in units):
        return "one of its convolutions could not be folded"
    expand, depthwise, project = units
    hidden = expand.weight.shape[0]
    known = {id(module) for unit in units for module in unit.modules()}
    others = [m for m in block.modules() if m is not block and id(m) not in known and not m._modules]
    if any(not isinstance(module, nn.Identity) for module in others if type(module).__name__ != "DropPath"):
        return "it has further modules"
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


def with_hooks(frozen: nn.Module, original: nn.Module) -> nn.Module:
    """Hooks on what is replaced go on being called (timm's ``features_only`` may have put them there)."""
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        frozen.__dict__[name] = original.__dict__[name]
    return frozen


def _is_silu(module: nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation", "Swish")
