# SPDX-License-Identifier: Apache-2.0
"""``accelerate`` and ``restore``: run the MobileViT blocks of other libraries on our operators, in place.

Example:
    >>> model = mvit_kernels.accelerate(timm.create_model("mobilevit_xs"))
    >>> print(mvit_kernels.report(model))
    3 of 3 MobileViT blocks accelerated
      stages.2.1  timm  accelerated: cpu (avx512)
      ...

Each library has an adapter in a file of its own. `accelerate` sets the block's ``__class__`` to a subclass of the same
name whose ``forward`` calls `transformer_on_map`; modules, parameters, ``state_dict`` and hooks are untouched.
(Replacing ``forward`` on the instance would break Hugging Face's gradient checkpointing.) A block that the fast path
would compute incorrectly is declined, with the reasons. This is checked when `accelerate` is called and again at every
call of the block, because hooks, LoRA layers and parametrizations may be added later.

The same is done to the convolution layers of a model that has such blocks (`_convolution`). They are fast in training
only, and run their original forward silently wherever they are not.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple, TypeVar

from torch import nn

from .. import backends
from .._utils.arguments import check_model
from .._utils.text import some, some_lines
from .._utils.transforms import is_shard, why_not
from ..backends import Serving
from . import _convolution, cvnets, huggingface, kornia, own, timm
from ._block import FrozenBlock, Refusal, block_serving
from ._swap import backend_of, derived_from_accelerated, global_hooks, is_accelerated, swap, unswap

ADAPTERS: tuple[ModuleType, ...] = (timm, huggingface, kornia, cvnets, own)
BLOCK_OPERATORS = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")
# Block classes of MobileViTv2 and MobileViTv3: timm's MobileVitV2Block, Hugging Face's MobileViTV2Layer, cvnets'
# MobileViTBlockv2, and MobileViTBlockv3 of a cvnets fork.
_RELATIVE = re.compile(r"mobilevit_?v([23])_?(?:block|layer)|mobilevit_?block_?v([23])", re.IGNORECASE)
logger = logging.getLogger("mvit_kernels")
Model = TypeVar("Model", bound=nn.Module)


class BlockReport(NamedTuple):
    """One MobileViT block of a model: its path, its library, whether it is accelerated, and the reasons if not."""

    name: str  # path in the model; "" for the model itself
    library: str  # NAME of the adapter, or "frozen"
    accelerated: bool  # whether it runs on our operators, of which `serving` tells who computes them
    reasons: tuple[str, ...]
    serving: Serving | None = None  # of an accelerated block, with weights on its device and of its dtype


class LayerReport(NamedTuple):
    """One convolution layer, or a Sequential of several: whether it is fused in training, and the reasons if not."""

    name: str  # path in the model
    norms: int  # batch norms in it
    fused: int  # batch norms that run as one operator with what is behind them
    reasons: tuple[str, ...]
    serving: Serving | None = None  # of an accelerated layer, in training


class AccelerationReport(NamedTuple):
    """Every MobileViT block found in a model, and the convolution layers of a model that has some; printable.

    `relatives` counts the blocks of MobileViTv2 and MobileViTv3, which are different networks and not supported.
    """

    blocks: tuple[BlockReport, ...]
    relatives: tuple[tuple[str, int], ...] = ()  # (class name, number of blocks)
    convolutions: tuple[LayerReport, ...] = ()

    @property
    def accelerated(self) -> tuple[BlockReport, ...]:
        """The blocks that run on our operators."""
        return tuple(block for block in self.blocks if block.accelerated)

    @property
    def declined(self) -> tuple[BlockReport, ...]:
        """The blocks that cannot be accelerated, with the reasons."""
        return tuple(block for block in self.blocks if block.reasons)

    @property
    def on_kernels(self) -> tuple[BlockReport, ...]:
        """The accelerated blocks that a kernel serves; plain PyTorch computes the others, which gains little."""
        return tuple(block for block in self.accelerated if block.serving is None or block.serving.by_kernels)

    def __str__(self) -> str:
        others = [_about_relative(*each) for each in self.relatives]
        if not self.blocks:
            known = f"no MobileViT block found; known are those of {', '.join(a.NAME for a in ADAPTERS)}"
            return "; ".join([known, *others])
        lines = []
        width = max(len(block.name) for block in self.blocks)
        for block in self.blocks:
            lines.append(f"  {block.name or '(the model itself)':<{width}}  {block.library}  {_state(block)}")
        head = f"{len(self.accelerated)} of {len(self.blocks)} MobileViT blocks accelerated"
        if len(self.on_kernels) < len(self.accelerated):
            served = f"{len(self.on_kernels) or 'none'} of them served by a kernel"
            head = f"{len(self.accelerated)} of {len(self.blocks)} MobileViT blocks swapped, {served}"
        others += _without_kernels(self.accelerated)
        told = {reason for block in self.accelerated for reason in (block.serving.reasons if block.serving else ())}
        others += [_about_convolutions(self.convolutions, told)] if self.convolutions else []
        shown = [*some_lines(lines, "report(model).blocks"), *(f"  {line}" for line in others)]
        return "\n".join([head, *shown])


def accelerate(model: Model, *, backend: str | None = None, strict: bool = False, convolutions: bool = True) -> Model:
    """Run every MobileViT block of `model` on our operators, in place, for training and inference.

    Example:
        >>> model = mvit_kernels.accelerate(timm.create_model("mobilevit_s", pretrained=True))
        >>> model = mvit_kernels.accelerate(MobileViTForImageClassification.from_pretrained("apple/mobilevit-small"))

    Parameters, ``state_dict``, hooks on the blocks, ``deepcopy``, pickling, gradient checkpointing, ``features_only``,
    DDP, FSDP wrapping by class name, ``torch.compile`` and export keep working; `restore` undoes it. Convolutions
    remain the model's own modules: convert the model to ``torch.channels_last`` to avoid layout copies, or `freeze` it.

    In training, the model's convolution layers run batch norm and SiLU as one operator, with the running statistics
    updated as always (`mvit_kernels.ops.batch_norm_activation`). Where that would compute something else, a layer runs
    its original forward: in evaluation, a batch norm that is frozen, synchronised, without running statistics or with a
    cumulative average, a hook inside, on a GPU a map that is not channels-last. In bfloat16, depthwise convolutions of
    stride 2 compute their input's gradient in float32 where oneDNN's bfloat16 kernel is several times slower.

    While a block cannot be served (a hook on an inner module, a LoRA layer, quantized weights, a global module hook),
    it runs its original forward and logs one warning. It is fast again once the obstacle is removed. Call
    ``fully_shard`` after `accelerate`, not before.

    The kernels do not support PyTorch's transforms: inside a forward-mode AD level and under ``torch.func`` (``jvp``,
    ``vmap``, ``grad``, …) the same steps run as plain PyTorch operators. So do gradients with ``create_graph=True``,
    which can be differentiated again. ``make_fx`` and other dispatch modes see our operators by name, and
    ``torch.utils.flop_counter`` counts the FLOPs of their matrix products.

    Args:
        model: a model that contains blocks of timm, Hugging Face transformers, Kornia, cvnets or `mvit_kernels.nn`, or
            such a block itself. Accelerating it again only changes `backend`.
        backend: name of the backend that must serve these blocks, e.g. "triton"; None or "auto" leaves the choice to
            each call.
        strict: raise if a block would be declined, or if there is none, instead of leaving the block unchanged. It
            is about blocks alone.
        convolutions: whether convolution layers are accelerated as well, where a backend (`backend`, if one is named)
            has a kernel for the call; elsewhere they run as before, without an error.

    Returns:
        `model` itself. ``mvit_kernels.report(model)`` tells which blocks were swapped, what serves them, and why the
        others were not. The logger ``mvit_kernels`` receives the same, with a warning for each declined block. Where no
        kernel serves the blocks on the model's device and dtype, one ``UserWarning`` a process says why and what to do.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: an unknown backend; with `strict`, a declined block or no block. The model is then unchanged.
        BackendError: `backend` cannot run on the model's device, or lacks an operator that the blocks need. A later
            call of the model raises it as well if `backend` cannot serve that call, for example under a transform.
    """
    check_model("accelerate", model)
    backend = backends.checked_name(backend, "accelerate")
    if backend is not None:
        device_type = next((p.device.type for p in model.parameters()), "cpu")
        reasons = list(backends.unavailable(backend, device_type))
        if not reasons:
            missing = [name for name in BLOCK_OPERATORS if name not in backends.operators(backend)]
            reasons = [f"it has no {', '.join(missing)}"] if missing else []
        if reasons:
            raise backends.BackendError(
                f"accelerate: backend {backend!r} was requested but cannot run here: {'; '.join(reasons)}"
            )

    found = _find(model)
    declined = [(name, adapter, reasons) for name, _, adapter, reasons in found if reasons]
    if strict and (declined or not found):
        blocks = tuple(BlockReport(name, adapter.NAME, False, tuple(reasons)) for name, adapter, reasons in declined)
        found_instead = AccelerationReport(blocks, _relatives(model))
        raise ValueError(f"accelerate(strict=True): {found_instead}. The model is unchanged.")
    for name, adapter, reasons in declined:
        logger.warning("accelerate: %s (%s) is not accelerated: %s", name, adapter.NAME, some(reasons, joint="; "))
    if not found:
        logger.warning("accelerate: %s", AccelerationReport((), _relatives(model)))
    for _, block, adapter, reasons in found:
        if not reasons:
            swap(block, adapter, backend)
    logger.info("accelerate: %d of %d blocks accelerated", len(found) - len(declined), len(found))
    convolutions = convolutions and (backend is None or _convolution.OPERATOR in backends.operators(backend))
    for _, layer in _convolution_layers(model):
        if not convolutions and is_accelerated(layer) and not derived_from_accelerated(layer):
            unswap(layer)  # it is from an earlier call
        elif convolutions and not _reasons_against(layer):
            swap(layer, _convolution, backend)
    swapped = [(block, _serving(block, adapter)) for _, block, adapter, reasons in found if not reasons]
    if swapped:
        weight = next(swapped[0][0].parameters())
        backends.warn_without_kernels("accelerate", [s for _, s in swapped], weight.device.type, weight.dtype)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place: give every block its original class, and with it its original forward.

    Example:
        >>> mvit_kernels.restore(model)

    Args:
        model: an ``nn.Module``, accelerated or not.

    Returns:
        `model` itself; blocks that are not accelerated are left unchanged.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: a block was wrapped by ``fully_shard`` after `accelerate`; the model is then unchanged.
    """
    check_model("restore", model)
    blocks = [(name, module) for name, module in model.named_modules() if is_accelerated(module)]
    for name, block in blocks:
        if derived_from_accelerated(block):
            raise ValueError(
                f"restore: {name} has become a {type(block).__name__} since it was accelerated, and cannot be "
                "restored; call restore before fully_shard, or rebuild the model"
            )
    for _, block in blocks:
        unswap(block)
    return model


def report(model: nn.Module) -> AccelerationReport:
    """Report which blocks of `model` are accelerated now, by which backend, and why the others are not.

    Example:
        >>> print(mvit_kernels.report(model))

    Hooks and LoRA layers that were added after `accelerate` are taken into account, and so are the device and the dtype
    that the model has now. Where only plain PyTorch serves a block (the backend "reference"), the report says why.

    Args:
        model: an ``nn.Module``, accelerated, frozen or neither.

    Returns:
        An `AccelerationReport`; printable. Frozen blocks are listed first and count as accelerated.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: an environment variable of ours has a value that nothing can follow.
    """
    check_model("report", model)
    blocks = [
        BlockReport(name, "frozen", True, (), block.serving())
        for name, block, adapter in named_blocks(model)
        if adapter is None
    ]
    for name, block, adapter, reasons in _find(model):
        reasons = (*reasons, *global_hooks())
        accelerated = is_accelerated(block) and not reasons
        serving = _serving(block, adapter) if accelerated else None
        blocks.append(BlockReport(name, adapter.NAME, accelerated, reasons, serving))
    layers = []
    for name, layer in _convolution_layers(model):
        reasons, fused, serving = (*_reasons_against(layer), *global_hooks()), 0, None
        if is_accelerated(layer) and not reasons:
            parts = _convolution.parts(layer)
            serving = _convolution.serving(parts, backend_of(layer))
            fused, reasons = (parts.norms, ()) if serving is None or serving.by_kernels else (0, serving.reasons)
        layers.append(LayerReport(name, _convolution.norms(layer), fused, reasons, serving))
    return AccelerationReport(tuple(blocks), _relatives(model), tuple(layers))


def _serving(block: nn.Module, adapter: ModuleType) -> Serving:
    return block_serving(adapter.parts(block), backend_of(block))


def _state(block: BlockReport) -> str:
    """What an accelerated block runs on; of another whether it could be accelerated."""
    if block.reasons:
        return f"declined: {some(block.reasons, joint='; ')}"
    if not block.accelerated:
        return "not accelerated"
    if block.serving is None or block.serving.by_kernels:
        return f"accelerated: {block.serving or 'frozen'}"
    return f"swapped: {block.serving}"


def _without_kernels(blocks: tuple[BlockReport, ...]) -> list[str]:
    """A line for each set of reasons why no kernel serves all of some blocks."""
    counts = Counter(block.serving.reasons for block in blocks if block.serving is not None and block.serving.reasons)
    return [f"{count} × not on kernels alone: {some(reasons, joint='; ')}" for reasons, count in counts.items()]


def _about_convolutions(layers: tuple[LayerReport, ...], told: set[str]) -> str:
    """A line about all convolution layers; reasons that are `told` above it are not repeated."""
    reasons = dict.fromkeys(reason for layer in layers for reason in layer.reasons)
    fused, norms = (sum(counts) for counts in zip(*((layer.fused, layer.norms) for layer in layers), strict=True))
    by = next((f": {layer.serving}" for layer in layers if layer.fused and layer.serving is not None), "")
    text = f"{fused} of {norms} convolution layers: batch norm + SiLU fused in training{by}"
    if not reasons:
        return text
    why = "for that reason" if told.issuperset(reasons) else f"because {some(reasons, joint='; ')}"
    return f"{text}; {'not all' if fused else 'none'}, {why}"


def _convolution_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolution layers of a model that has MobileViT blocks which are not frozen, with their paths."""
    if not any(adapter is not None for _, _, adapter in named_blocks(model)):
        return []
    return [(name, module) for name, module in model.named_modules() if _convolution.is_layer(module)]


def _reasons_against(layer: nn.Module) -> list[str]:
    try:
        _convolution.parts(layer)
    except Refusal as refusal:
        return refusal.reasons
    return []


def _relatives(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """(class name, number) of the MobileViTv2 and MobileViTv3 blocks in `model`."""
    names = (type(module).__name__ for module in model.modules())
    return tuple(Counter(name for name in names if _RELATIVE.match(name)).items())


def _about_relative(name: str, count: int) -> str:
    version = next(filter(None, _RELATIVE.match(name).groups()))
    why = {"2": "linear, separable attention", "3": "a different fusion of local and global features"}[version]
    return f"its {count} {name} belong to MobileViTv{version}, a different network ({why}), and are left unchanged"


def adapter_of(module: nn.Module) -> ModuleType | None:
    """The adapter for which `module` is a MobileViT block, or None.

    A block is recognized by the name and package of its class and by its children, so no library has to be imported.
    A copy of cvnets' block is recognized in any package.
    """
    for adapter in ADAPTERS:
        if all(child in module._modules for child in adapter.CHILDREN) and any(
            cls.__name__ == adapter.BLOCK and adapter.PACKAGE in cls.__module__.split(".")
            for cls in type(module).__mro__
        ):
            return adapter
    return cvnets if cvnets.may_be(module) else None


def named_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleType | None]]:
    """Every MobileViT block of `model` with its path and adapter; the adapter of a frozen block is None."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue  # a frozen block counts once, whatever it contains
        adapter = adapter_of(module)
        if isinstance(module, FrozenBlock):
            inside = f"{name}." if name else ""
            yield name, module, None
        elif adapter is not None:
            yield name, module, adapter


def _find(model: nn.Module) -> list[tuple[str, nn.Module, ModuleType, list[str]]]:
    """Every MobileViT block that is not frozen: its path, the module, its adapter, and the reasons against it."""
    found = []
    by_fsdp = any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)
    for name, module, adapter in named_blocks(model):
        if adapter is None:
            continue
        try:
            modules = adapter.parts(module).seen.modules[1:]
            kinds = {type(value) for inner in modules for value in inner._parameters.values()}
            reasons = [f"a parameter is {why_not(cls)}" for cls in kinds if is_shard(cls) and not by_fsdp]
            found.append((name, module, adapter, reasons))
        except Refusal as refusal:
            found.append((name, module, adapter, refusal.reasons))
    return found
