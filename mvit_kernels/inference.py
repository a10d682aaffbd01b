# SPDX-License-Identifier: Apache-2.0
"""``freeze``: an inference-only copy of a model; batch norms folded, SiLU fused, weights joined and cast once.

The MobileViT paper (arXiv:2110.02178, section 5) gives the missing fold as one of two reasons for slow inference:
convolution and batch norm fold together, transformers have nothing like it. Here both halves are fused.
"""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import torch
from torch import nn

from ._text import some_lines
from .adapters import adapter_of, restore
from .adapters._block import Refusal, layer_weights
from .adapters._convolutions import freeze_convolutions, freeze_inverted_residuals, with_hooks
from .adapters._swap import backend_of
from .nn.frozen import Frozen, FrozenMobileViTBlock, FrozenSequential
from .nn.network import Network
from .ops import TransformerLayerWeights

logger = logging.getLogger("mvit_kernels")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FreezeReport(NamedTuple):
    """What `freeze` did; printable. It is the frozen model's attribute ``freeze_report``."""

    blocks: tuple[str, ...]  # MobileViT blocks
    inverted_residuals: tuple[str, ...]
    convolutions: tuple[str, ...]  # all folded ones, also those inside the former two
    left: tuple[tuple[str, str], ...]  # what stays as it was, and why
    composed: tuple[tuple[str, str], ...] = ()  # what is frozen but runs part by part on the CPU, and why

    def __str__(self) -> str:
        lines = [
            f"{len(self.blocks)} MobileViT blocks, {len(self.inverted_residuals)} inverted residuals and "
            f"{len(self.convolutions)} convolutions frozen"
        ]
        left = (f"  {name} stays as it was: {reason}" for name, reason in self.left)
        composed = (f"  {name} runs part by part: {reason}" for name, reason in self.composed)
        lines += some_lines(left, "freeze_report.left") + some_lines(composed, "freeze_report.composed")
        return "\n".join(lines)


def freeze(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """An inference-only copy of `model` that runs as fast as we can make it; `model` is left alone.

    Example:
        >>> fast = mvit_kernels.freeze(model)                        # any of the five kinds of MobileViT
        >>> fast = mvit_kernels.freeze(model, dtype=torch.bfloat16)  # half the bytes, twice the rate on bf16 units
        >>> with torch.inference_mode():
        ...     logits = fast(images)

    Batch norms are folded into their convolutions (in float64), SiLU and the residual additions of inverted residuals
    are fused, and everything runs channels-last inside, whatever the layout of the input. On the CPU, in float32 and
    bfloat16, whole chains of frozen layers are one native call with packed weights (`mvit_kernels.nn.network`); on a
    GPU, in bfloat16 and float16, a block's transformer has its weights packed for the CUDA kernel that runs it in one
    launch. The model's own modules around that (pooling, heads, ``features_only``, Hugging Face's output classes) stay.
    What cannot be frozen stays as it was, layer by layer, and is listed in ``fast.freeze_report``.

    A frozen model follows ``load_state_dict``, ``to`` and the replacement of modules inside; a change of a buffer in
    place it does not see. Two threads may run one frozen model at once.

    Args:
        model: a timm, Hugging Face, Kornia, cvnets or own MobileViT, accelerated or not. Its ``state_dict`` afterwards
            is the frozen one's own: load checkpoints before freezing.
        dtype: float32, bfloat16, float16 or float64 for all weights; inputs are cast, outputs come in it. None keeps
            the model's.

    Returns:
        A new model in evaluation mode, without parameters that need a gradient. ``train()`` on it raises.

    Raises:
        TypeError: `model` is no ``nn.Module``, or `dtype` no floating dtype.
        ValueError: the model has weights or batch norm statistics that are not finite, or variances below zero.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model is {type(model).__name__}; a torch.nn.Module is wanted")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"freeze: dtype is {dtype!r}; float32, bfloat16, float16 or float64 is wanted")
    _check_finite(model)

    # A holder, so that the model itself may be a block or a unit.
    holder = nn.Module()
    holder.model = copy.deepcopy(model).eval().requires_grad_(False)
    backends = {_name_in_model(name): backend_of(module) for name, module in holder.named_modules()}
    restore(holder)
    if dtype == torch.float64:
        holder.double()  # before folding: a fold that went through float32 would keep its rounding
    left: list[tuple[str, str]] = []
    convolutions = _collect(freeze_convolutions(holder), left)
    inverted_residuals = _collect(freeze_inverted_residuals(holder), left)
    blocks = _freeze_blocks(holder, backends, left)
    _join_sequentials(holder)
    if dtype is not None:
        holder.to(dtype)
    # Dense weights that stay the library's own follow the layout of the maps.
    holder.to(memory_format=torch.channels_last).eval()

    frozen = holder.model
    on_cpu = all(value.device.type == "cpu" for value in holder.buffers())
    composed = [(_name_in_model(name), reason) for name, reason in _pack(holder, "")] if on_cpu else []
    for block in holder.modules():
        if isinstance(block, FrozenMobileViTBlock):
            block.pack()
    report = FreezeReport(tuple(blocks), tuple(inverted_residuals), tuple(convolutions), tuple(left), tuple(composed))
    frozen.freeze_report = report
    logger.info("freeze: %s", report)
    return frozen


def _check_finite(model: nn.Module) -> None:
    """A fold of values that are not finite would hide where they came from."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if not torch.isfinite(value).all():
            raise ValueError(
                f"freeze: {name} has values that are not finite; mend or reload the weights before freezing"
            )
        if name.endswith("running_var") and (value < 0).any():
            raise ValueError(f"freeze: {name} has negative variances; mend or reload the weights before freezing")


def _name_in_model(name: str) -> str:
    """A module's name below the model, from its name below the holder."""
    return name.removeprefix("model").removeprefix(".")


def _collect(steps, left: list[tuple[str, str]]) -> list[str]:
    done = []
    for name, reason in steps:
        if reason is None:
            done.append(_name_in_model(name))
        else:
            left.append((_name_in_model(name), reason))
    return done


def _freeze_blocks(holder: nn.Module, backends: dict[str, str | None], left: list[tuple[str, str]]) -> list[str]:
    """Put `FrozenMobileViTBlock` in place of every MobileViT block; declined ones run as they are."""
    done = []
    for owner_name, owner in list(holder.named_modules()):
        for child_name, block in list(owner._modules.items()):
            adapter = adapter_of(block) if block is not None else None
            if adapter is None:
                continue
            name = _name_in_model(f"{owner_name}.{child_name}".removeprefix("."))
            try:
                parts = adapter.parts(block)
            except Refusal as refusal:
                left.append((name, str(refusal)))
                continue
            takes = getattr(adapter, "takes", None)
            with torch.no_grad():
                layers = [TransformerLayerWeights(*map(_own, layer_weights(layer))) for layer in parts.layers]
            norm = parts.final_norm
            frozen = FrozenMobileViTBlock(
                downsampling=parts.downsampling,
                before=parts.before,
                layers=layers,
                final_norm=None if norm is None else (_own(norm.weight), _own(norm.bias)),
                after=parts.after,
                fusion=parts.fusion,
                input_first=parts.input_first,
                num_heads=parts.num_heads,
                patch_size=parts.patch_size,
                eps=parts.eps,
                fallback=None if takes is None else block,
                takes=takes,
                backend=backends[name],
            )
            owner._modules[child_name] = with_hooks(frozen, block)
            done.append(name)
    return done


def _join_sequentials(holder: nn.Module) -> None:
    """Put `FrozenSequential` in place of every Sequential of nothing but frozen modules, the innermost first."""
    for owner in reversed(list(holder.modules())):
        for name, child in list(owner._modules.items()):
            if type(child) is nn.Sequential and all(isinstance(m, (Frozen, nn.Identity)) for m in child):
                joined = FrozenSequential()
                joined._modules.update(child._modules)
                owner._modules[name] = with_hooks(joined, child)


def _pack(module: nn.Module, name: str) -> list[tuple[str, str]]:
    """Make the native calls of everything frozen below `module`; (name, why not) where there can be none."""
    reasons = []
    if isinstance(module, Frozen):
        network = module.native()
        if isinstance(network, Network):
            return []
        if not isinstance(module, FrozenSequential):
            return [(name, str(network))]
    for child_name, child in module._modules.items():
        if child is not None:
            reasons += _pack(child, f"{name}.{child_name}".removeprefix("."))
    return reasons


def _own(value: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter's value as a plain tensor, to be a buffer."""
    return None if value is None else value.detach()
