# SPDX-License-Identifier: Apache-2.0
"""``freeze``: an inference-only copy of a model; batch norms folded, SiLU fused, weights joined and cast once.

The MobileViT paper (arXiv:2110.02178, section 5) gives the missing fold as one of two reasons for slow inference:
convolution and batch norm fold together, transformers have nothing like it. Here both halves are fused.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import nn

from .._utils.plain import DTYPES, cast_floats, copy_of, is_identity, is_plain, settle, tensor_reason, weight_reasons
from .._utils.text import some_lines
from ..adapters import adapter_of, restore
from ..adapters._block import BlockParts, Refusal, layer_weights
from ..adapters._swap import backend_of
from ..ops import TransformerLayerWeights
from .block import FrozenMobileViTBlock
from .convolutions import freeze_convolutions, freeze_inverted_residuals, replace
from .folding import is_norm
from .modules import Frozen, FrozenSequential
from .network import Network

logger = logging.getLogger("mvit_kernels")


class FreezeReport(NamedTuple):
    """What `freeze` did; printable. It is the frozen model's attribute ``freeze_report``."""

    blocks: tuple[str, ...]  # MobileViT blocks
    inverted_residuals: tuple[str, ...]
    convolutions: tuple[str, ...]  # all folded ones, also those inside the former two
    left: tuple[tuple[str, str], ...]  # what stays as it was, and why
    composed: tuple[tuple[str, str], ...] = ()  # what is frozen but runs part by part on the CPU, and why
    unhooked: tuple[str, ...] = ()  # what has lost its state-dict hooks; others go on being called

    def __str__(self) -> str:
        lines = [
            f"{len(self.blocks)} MobileViT blocks, {len(self.inverted_residuals)} inverted residuals and "
            f"{len(self.convolutions)} convolutions frozen"
        ]
        left = (f"  {name} stays as it was: {reason}" for name, reason in self.left)
        composed = (f"  {name} runs part by part: {reason}" for name, reason in self.composed)
        unhooked = (f"  {name} lost its state-dict hooks: a frozen one has other keys" for name in self.unhooked)
        lines += some_lines(left, "freeze_report.left") + some_lines(composed, "freeze_report.composed")
        lines += some_lines(unhooked, "freeze_report.unhooked")
        return "\n".join(lines)


def freeze(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """An inference-only copy of `model` that runs as fast as we can make it; `model` is left alone.

    Example:
        >>> fast = mvit_kernels.freeze(model)                        # any of the five kinds of MobileViT
        >>> fast = mvit_kernels.freeze(model, dtype=torch.bfloat16)  # half the bytes, twice the rate on bf16 units
        >>> with torch.inference_mode():
        ...     logits = fast(images)

    Batch norms are folded into their convolutions (in float64), SiLU and the residual additions of inverted
    residuals are fused, and everything runs channels-last inside, whatever the layout of the input. On the CPU, in
    float32 and bfloat16, whole chains of frozen layers are one native call with packed weights
    (`mvit_kernels.freezing.network`); on a GPU, in bfloat16 and float16, a block's transformer has its weights
    packed for the CUDA kernel that runs it in one launch. The model's own modules around that (pooling, heads,
    ``features_only``, Hugging Face's output classes) stay. What cannot be frozen stays as it was, layer by layer,
    and is listed in ``fast.freeze_report``; what only looks foldable, such as a batch norm with a forward of its
    own, does too. Weights that pruning, weight norm or spectral norm compute are frozen as evaluation computes
    them. Hooks on what is replaced go on being called, forward and backward ones; state-dict hooks do not, and are
    listed.

    A frozen model follows ``load_state_dict``, ``to`` and the replacement of modules inside; a change of a buffer in
    place it does not see. Two threads may run one frozen model at once. It takes floats of any width, and raises a
    TypeError on integers and complex numbers, which a cast would silently misread. Keep it with ``torch.save(fast,
    path)``, or its ``state_dict()`` (safetensors too) for a model frozen alike; ``save_pretrained`` raises, since
    ``from_pretrained`` could not read it.

    Args:
        model: a timm, Hugging Face, Kornia, cvnets or own MobileViT, accelerated or not. Its ``state_dict`` afterwards
            is the frozen one's own: load checkpoints before freezing.
        dtype: float32, bfloat16, float16 or float64 for all weights of these four dtypes; inputs are cast, outputs come
            in it. None keeps the model's.

    Returns:
        A new model in evaluation mode, without parameters that need a gradient. ``train()`` on it raises.

    Raises:
        TypeError: `model` is no ``nn.Module``, or `dtype` no floating dtype.
        ValueError: a convolution, a batch norm or a MobileViT block has values that are not finite, or variances below
            zero.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model is {type(model).__name__}; a torch.nn.Module is wanted")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"freeze: dtype is {dtype!r}; float32, bfloat16, float16 or float64 is wanted")

    # A holder, so that the model itself may be a block or a unit.
    holder = nn.Module()
    holder.model = copy_of(model).eval().requires_grad_(False)
    backends = {module: backend_of(module) for module in holder.modules()}
    restore(holder)
    names = {module: _name_in_model(name) for name, module in holder.named_modules()}
    _settle_and_check(holder)
    if dtype == torch.float64:
        cast_floats(holder, dtype)  # before folding: a fold that went through float32 would keep its rounding
    left: list[tuple[str, str]] = []
    convolutions = _collect(freeze_convolutions(holder), left)
    inverted_residuals = _collect(freeze_inverted_residuals(holder), left)
    blocks = _freeze_blocks(holder, backends, left)
    _join_sequentials(holder)
    if dtype is not None:
        cast_floats(holder, dtype)
    holder.eval()

    frozen = holder.model
    composed = [(_name_in_model(name), reason) for name, reason in _pack(holder, "", set())]
    for module in holder.modules():
        if isinstance(module, FrozenMobileViTBlock):
            module.pack()
        if hasattr(module, "save_pretrained") and any(isinstance(part, Frozen) for part in module.modules()):
            module.save_pretrained = _refuse_save_pretrained
    kept = set(holder.modules())
    unhooked = [name for module, name in names.items() if module not in kept and _has_state_dict_hooks(module)]
    report = FreezeReport(*map(tuple, (blocks, inverted_residuals, convolutions, left, composed, unhooked)))
    frozen.freeze_report = report
    logger.info("freeze: %s", report)
    return frozen


def _settle_and_check(holder: nn.Module) -> None:
    """Make the computed weights of what will be frozen plain, and refuse broken ones: a fold of values that are not
    finite would hide where they came from. Whatever else the model holds is its own business."""
    blocks = [module for module in holder.modules() if adapter_of(module) is not None]
    inside = {part for block in blocks for part in block.modules()}
    for name, module in holder.named_modules():
        if module not in inside and not isinstance(module, nn.Conv2d) and not is_norm(module):
            continue
        settle(module)
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for own_name, value in tensors:
            if value.device.type == "meta" or tensor_reason(own_name, value) is not None:
                continue
            full_name = _name_in_model(f"{name}.{own_name}")
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"freeze: {full_name} has values that are not finite; mend or reload the weights before freezing"
                )
            if own_name == "running_var" and (value < 0).any():
                raise ValueError(
                    f"freeze: {full_name} has negative variances; mend or reload the weights before freezing"
                )


def _has_state_dict_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks are called when `module` is saved or loaded; spectral norm's own are PyTorch's."""
    kinds = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    hooks = [hook for kind in kinds for hook in module.__dict__.get(kind, {}).values()]
    return any(not getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.") for hook in hooks)


def _refuse_save_pretrained(*args, **kwargs) -> None:
    raise RuntimeError(
        "save_pretrained: this model is frozen; from_pretrained would build an unfrozen one, find none of its weights "
        "here, and leave it with random ones. Save the model that freeze() was given and freeze it again after "
        "loading; or keep the frozen one with torch.save(model, path), or as state_dict() for a model frozen alike"
    )


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


def _freeze_blocks(holder: nn.Module, backends: dict[nn.Module, str | None], left: list[tuple[str, str]]) -> list[str]:
    """Put `FrozenMobileViTBlock` in place of every MobileViT block; declined ones run as they are."""
    done = []
    for full_name, block in list(holder.named_modules()):
        adapter, name = adapter_of(block), _name_in_model(full_name)
        if adapter is None:
            continue
        try:
            parts = adapter.parts(block)
            reasons = weight_reasons(block, set(parts.seen.modules))
            if reasons:
                raise Refusal(reasons, parts.seen)
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
            tied=() if takes is None else _tied(parts),
            backend=backends[block],
        )
        replace(holder, block, frozen)
        done.append(name)
    return done


def _tied(parts: BlockParts) -> list[tuple[nn.Module, str, str]]:
    """Where the library's block keeps what `FrozenMobileViTBlock` has as buffers."""
    tied = []
    for index, layer in enumerate(parts.layers):
        (qkv,) = layer.qkv  # as Kornia and cvnets have it, whose blocks serve some calls themselves
        modules = {
            "norm1": layer.norm1,
            "qkv": qkv,
            "proj": layer.proj,
            "norm2": layer.norm2,
            "fc1": layer.fc1,
            "fc2": layer.fc2,
        }
        for field in TransformerLayerWeights._fields:
            module, _, name = field.rpartition("_")
            tied.append((modules[module], name, f"layer{index}_{field}"))
    if parts.final_norm is not None:
        tied += [(parts.final_norm, name, f"final_norm_{name}") for name in ("weight", "bias")]
    return tied


def _join_sequentials(holder: nn.Module) -> None:
    """Put `FrozenSequential` in place of every Sequential of nothing but frozen modules, the innermost first."""
    for module in reversed(list(holder.modules())):
        if type(module) is not nn.Sequential or not is_plain(module, nn.Sequential):
            continue
        frozen = [isinstance(child, Frozen) for child in module]
        if any(frozen) and all(done or is_identity(child) for child, done in zip(module, frozen, strict=True)):
            joined = FrozenSequential()
            joined._modules.update(module._modules)
            replace(holder, module, joined)


def _pack(module: nn.Module, name: str, seen: set[nn.Module]) -> list[tuple[str, str]]:
    """Make the native calls of everything frozen on the CPU below `module`; (name, why not) where there can be none."""
    if module in seen:
        return []
    seen.add(module)
    if isinstance(module, Frozen):
        if any(value.device.type != "cpu" for value in module.buffers()):
            return []
        network = module.native()
        if isinstance(network, Network):
            return []
        if not isinstance(module, FrozenSequential):
            return [(name, str(network))]
    reasons = []
    for child_name, child in list(module._modules.items()):
        if child is not None:
            reasons += _pack(child, f"{name}.{child_name}".removeprefix("."), seen)
    return reasons


def _own(value: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter's value as a plain tensor, to be a buffer."""
    return None if value is None else value.detach().contiguous()
