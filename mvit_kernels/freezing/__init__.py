# SPDX-License-Identifier: Apache-2.0
"""``freeze``: an inference-only copy of a model: batch norms folded, activations fused, weights joined and cast once.

The MobileViT paper (arXiv:2110.02178, section 5) gives two reasons for slow inference. One is that convolutional
networks fold batch norm into the convolution, and transformers have no counterpart. Here both halves are fused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import backends
from .._utils.arguments import check_model
from .._utils.plain import DTYPES, cast_floats, copy_of, is_identity, is_plain, settle, tensor_reason, weight_reasons
from .._utils.text import some, some_lines
from ..adapters import adapter_of, restore
from ..adapters._block import BlockParts, Refusal, layer_weights
from ..adapters._swap import backend_of
from ..ops import TransformerLayerWeights
from . import graphs, half_range
from .block import FrozenMobileViTBlock
from .convolutions import freeze_convolutions, freeze_inverted_residuals, freeze_means, replace
from .folding import is_norm
from .frozen import Frozen
from .graphs import CudaGraphs
from .half_range import HalfRange
from .modules import FrozenInvertedResidual, FrozenSequential
from .native import Native
from .pyramid import freeze_pyramids
from .saved import Saver
from .whole import freeze_whole

logger = logging.getLogger("mvit_kernels")
Model = TypeVar("Model", bound=nn.Module)


class FreezeReport(NamedTuple):
    """What `freeze` did, by module path; printable. It is the frozen model's attribute ``freeze_report``."""

    blocks: tuple[str, ...]  # MobileViT blocks
    inverted_residuals: tuple[str, ...]
    convolutions: tuple[str, ...]  # every frozen convolution, including those inside blocks and inverted residuals
    left: tuple[tuple[str, str], ...]  # modules that were not frozen, and why
    composed: tuple[tuple[str, str], ...] = ()  # frozen modules that run part by part, and why
    unhooked: tuple[str, ...] = ()  # modules that lost their state-dict hooks; other hooks are kept
    pyramids: tuple[str, ...] = ()  # DeepLabv3's, around five of the frozen convolutions
    # What float16 would have to hold inside of inverted residuals, on the example; those without a `reason` use it.
    half_ranges: tuple[tuple[str, HalfRange], ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{len(self.blocks)} MobileViT blocks, {len(self.inverted_residuals)} inverted residuals and "
            f"{len(self.convolutions)} convolutions frozen"
        ]
        if self.pyramids:
            lines.append(f"  with DeepLabv3's pyramid: {', '.join(self.pyramids)}")
        verified = [known.headroom for _, known in self.half_ranges if known.reason is None]
        if verified:
            lines.append(
                f"  {len(verified)} inverted residuals within float16's range on the example, with a headroom of "
                f"{min(verified):.3g} and more: on a GPU they may filter in it"
            )
        beyond = ((name, known.reason) for name, known in self.half_ranges if known.reason is not None)
        lines += some_lines(_counted(beyond, "filters", "filter", "in float32"), "freeze_report.half_ranges")
        unhooked = ((name, "the frozen module has different keys") for name in self.unhooked)
        lines += some_lines(_counted(self.left, "was", "were", "not frozen"), "freeze_report.left")
        lines += some_lines(_counted(self.composed, "runs", "run", "part by part"), "freeze_report.composed")
        lines += some_lines(_counted(unhooked, "lost its", "lost their", "state-dict hooks"), "freeze_report.unhooked")
        return "\n".join(lines)


def _counted(modules: Iterable[tuple[str, str]], one: str, several: str, what: str) -> list[str]:
    """A line for each reason: the module that it is about, or how many there are."""
    names: dict[str, list[str]] = {}
    for name, reason in modules:
        names.setdefault(reason, []).append(name)
    return [
        f"  {len(of)} × {several} {what} ({some(of)}): {reason}" if len(of) > 1 else f"  {of[0]} {one} {what}: {reason}"
        for reason, of in names.items()
    ]


def freeze(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool | int | CudaGraphs = False,
    example: Tensor | Sequence[Tensor] | None = None,
) -> Model:
    """Make a fast inference-only copy of `model`; `model` itself is not changed.

    Example:
        >>> fast = mvit_kernels.freeze(model)                        # any of the five kinds of MobileViT
        >>> fast = mvit_kernels.freeze(model, dtype=torch.bfloat16)  # half the bytes, twice the rate on bf16 units
        >>> with torch.inference_mode():
        ...     logits = fast(images)

    Batch norms are folded into their convolutions (in float64), SiLU, ReLU and residual additions are fused as
    epilogues, and everything runs channels-last inside, whatever the memory format of the input. On the
    CPU, in float32 and bfloat16, a chain of frozen layers is one native call with packed weights
    (`mvit_kernels.freezing.network`). On a GPU, in bfloat16 and float16, it is one list of launches, prepared once for
    each input shape (`mvit_kernels.freezing.launched`), and a block's transformer weights are packed for the CUDA
    kernel that runs it in one launch. The model's other modules (pooling, heads, ``features_only``, Hugging
    Face's output classes) are kept, and a network that is known as a whole (classifiers, backbones and DeepLabv3 of all
    five kinds) is one native call from the image to its result (`mvit_kernels.freezing.whole`).

    A layer that cannot be frozen is kept unchanged and listed in ``fast.freeze_report``. So is one that only looks
    foldable, such as a batch norm subclass with its own forward. Weights that pruning, weight norm or spectral norm
    compute are frozen at their evaluation-mode values. Forward and backward hooks on replaced modules are still called;
    their state-dict hooks are not, and are listed.

    ``load_state_dict``, ``to`` and the replacement of inner modules work on a frozen model; an in-place change of a
    buffer goes unnoticed. Two threads may call one frozen model at the same time. It takes inputs of the four dtypes
    below; integer and complex inputs raise a TypeError, because a cast would silently misinterpret them. Save it with
    ``torch.save(fast, path)``, or save its ``state_dict()`` (safetensors works) and load that into a model frozen in
    the same way. ``save_pretrained`` raises, because ``from_pretrained`` could not read the result.

    With `cuda_graph`, as in ``freeze(model.cuda(), dtype=torch.bfloat16, cuda_graph=True)``, each native call on a GPU
    is captured as a CUDA graph when an input shape comes first, and replayed for the next ones
    (`mvit_kernels.freezing.graphs`). Results are ordinary new tensors, and calls from several threads and streams are
    safe. Inside a capture of yours the launches become part of your graph. The buffers belong to the model: copies and
    pickles have none, and changes of weights and ``to`` drop them. While a shape is captured, which takes milliseconds,
    older releases of PyTorch refuse other threads random numbers on that GPU: call each shape once beforehand.

    With `example`, as in ``freeze(model, dtype=torch.bfloat16, example=images)``, inverted residuals compute in float16
    inside on a GPU, with fewer instructions and, beside bfloat16, more exactly, where these images stay 4 times within
    its range (`mvit_kernels.freezing.half_range`); ``freeze_report.half_ranges`` has what was found. Give some dozen
    images as the model will see them. Images that go beyond the range after all give infinite or NaN results, not wrong
    ones that look right. The finding goes with copies, pickles, moves and casts; ``load_state_dict`` and other changes
    of a weight drop it, and then filters are float32, as without an example. On a CPU it changes nothing.

    Args:
        model: a timm, Hugging Face, Kornia, cvnets or own MobileViT, accelerated or not. The frozen copy's
            ``state_dict`` has other keys, so load checkpoints before freezing.
        dtype: float32, bfloat16, float16 or float64. All weights of these four dtypes are cast to it, inputs are cast
            on entry, and outputs have it. None keeps the model's dtypes.
        cuda_graph: True keeps the graphs of 8 input shapes, a number those of so many, `CudaGraphs` says more. It wants
            a model that is on a GPU, in bfloat16 or float16.
        example: images, (B, C, H, W), scaled and normalized, on the model's device; or a list of such batches. The
            frozen copy computes them once.

    Returns:
        A new model in evaluation mode, without parameters that require a gradient, of the model's class (unless that is
        one of a block). Its ``train()`` raises RuntimeError.

    Raises:
        TypeError: `model` is not an ``nn.Module``, `dtype` is none of the four, `cuda_graph` is none of those, or
            `example` is no float tensor nor a list of them.
        ValueError: a convolution, a batch norm or a MobileViT block has values that are not finite, or a batch norm has
            a negative running variance; or `cuda_graph` is asked for a model that is not on a GPU, or of which nothing
            is a native call; or the `example` is empty, on another device, not finite, or nothing that the model takes,
            or there is no inverted residual to try it on.
    """
    check_model("freeze", model)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"freeze: dtype is {dtype!r}; float32, bfloat16, float16 or float64 is wanted")
    options = graphs.checked(cuda_graph)
    devices = {value.device for value in (*model.parameters(), *model.buffers())}
    if options is not None:
        graphs.check_device(devices)
    batches = None if example is None else half_range.checked(example, devices)
    with torch.inference_mode(False):  # whose tensors do not count their changes; one call has to see the classifier's
        return _freeze(model, dtype, options, batches)


def _freeze(model: Model, dtype: torch.dtype | None, options: CudaGraphs | None, batches: list[Tensor] | None) -> Model:
    # In a holder, so that the model itself can be replaced where it is a block or a unit.
    holder = nn.Module()
    holder.model = copy_of(model).eval().requires_grad_(False)
    requested = {module: backend_of(module) for module in holder.modules()}
    restore(holder)
    names = {module: _name_in_model(name) for name, module in holder.named_modules()}
    _settle_and_check(holder)
    if dtype == torch.float64:
        cast_floats(holder, dtype)  # before folding: a fold rounded to float32 would keep that error
    left: list[tuple[str, str]] = []
    convolutions = _collect(freeze_convolutions(holder), left)
    inverted_residuals = _collect(freeze_inverted_residuals(holder), left)
    blocks = _freeze_blocks(holder, requested, left)
    pyramids = _collect(freeze_pyramids(holder), left)
    freeze_means(holder)
    _join_sequentials(holder)
    if dtype is not None:
        cast_floats(holder, dtype)
    holder.eval()

    frozen = holder.model
    ranges = {} if batches is None else _half_ranges(holder, batches, left)
    for module in holder.modules():
        if isinstance(module, Frozen):
            module.cuda_graph = options
    composed = [(_name_in_model(name), reason) for name, reason in _pack(holder, "", set())]
    if options is not None and not any(isinstance(getattr(m, "_network", None), Native) for m in holder.modules()):
        raise ValueError(
            f"freeze: cuda_graph is for native calls, and there is none: "
            f"{some((f'{name}: {reason}' for name, reason in (*left, *composed)), joint='; ') or 'nothing is frozen'}"
        )
    frozen_blocks = [module for module in holder.modules() if isinstance(module, FrozenMobileViTBlock)]
    for block in frozen_blocks:
        block.pack()
    if frozen_blocks:
        weight = frozen_blocks[0].layers()[0].proj_weight
        servings = [block.serving() for block in frozen_blocks]
        backends.warn_without_kernels("freeze", servings, weight.device.type, weight.dtype)
    for module in holder.modules():
        if hasattr(module, "save_pretrained") and any(isinstance(part, Frozen) for part in module.modules()):
            module.save_pretrained = _refuse_save_pretrained
    freeze_whole(frozen)
    kept = set(holder.modules())
    unhooked = [name for module, name in names.items() if module not in kept and _has_state_dict_hooks(module)]
    lists = (blocks, inverted_residuals, convolutions, left, composed, unhooked, pyramids, ranges.items())
    report = FreezeReport(*map(tuple, lists))
    frozen.freeze_report = report
    if not hasattr(type(frozen), "save"):
        frozen.save = Saver(frozen)
    logger.info("freeze: %s", report)
    return frozen


def _half_ranges(holder: nn.Module, batches: list[Tensor], left: list[tuple[str, str]]) -> dict[str, HalfRange]:
    """What float16 would have to hold in each inverted residual, by its path in the model."""
    blocks = {
        _name_in_model(name): module
        for name, module in holder.named_modules()
        if isinstance(module, FrozenInvertedResidual)
    }
    if not blocks:
        reasons = (f"{name}: {reason}" for name, reason in left)
        raise ValueError(
            f"freeze: example is for inverted residuals, and none was frozen{'; '.join(['', *reasons])}; leave it out"
        )
    return half_range.measure(holder.model, blocks, batches)


def _settle_and_check(holder: nn.Module) -> None:
    """Replace computed weights by plain ones in everything that will be frozen, and reject values that are not finite:
    after folding, their origin would be lost. Other modules are not checked."""
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
                    f"freeze: {full_name} has values that are not finite; fix or reload the weights before freezing"
                )
            if own_name == "running_var" and (value < 0).any():
                raise ValueError(
                    f"freeze: {full_name} has negative variances; fix or reload the weights before freezing"
                )


def _has_state_dict_hooks(module: nn.Module) -> bool:
    """Whether `module` has state-dict hooks other than those of torch itself, such as spectral norm's."""
    kinds = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    hooks = [hook for kind in kinds for hook in module.__dict__.get(kind, {}).values()]
    return any(not getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.") for hook in hooks)


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained: this model is frozen; from_pretrained would build an unfrozen one, find none of its weights "
        "here, and leave it with random ones. Save the model that freeze() was given and freeze it again after "
        "loading; or keep the frozen one with torch.save(model, path), or its state_dict() for a model frozen alike"
    )


def _name_in_model(name: str) -> str:
    """A module's path in the model, from its path in the holder."""
    return name.removeprefix("model").removeprefix(".")


def _collect(steps: Iterable[tuple[str, str | None]], left: list[tuple[str, str]]) -> list[str]:
    done = []
    for name, reason in steps:
        if reason is None:
            done.append(_name_in_model(name))
        else:
            left.append((_name_in_model(name), reason))
    return done


def _freeze_blocks(holder: nn.Module, requested: dict[nn.Module, str | None], left: list[tuple[str, str]]) -> list[str]:
    """Replace every MobileViT block by a `FrozenMobileViTBlock`; declined blocks are kept."""
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
            backend=requested[block],
        )
        replace(holder, block, frozen)
        done.append(name)
    return done


def _tied(parts: BlockParts) -> list[tuple[nn.Module, str, str]]:
    """(module, parameter name, buffer name): where the library's block keeps what `FrozenMobileViTBlock` holds."""
    tied = []
    for index, layer in enumerate(parts.layers):
        (qkv,) = layer.qkv  # one Linear: only Kornia's and cvnets' blocks serve some calls themselves
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
    """Replace every Sequential of frozen modules only by a `FrozenSequential`, innermost first."""
    for module in reversed(list(holder.modules())):
        if type(module) is not nn.Sequential or not is_plain(module, nn.Sequential):
            continue
        frozen = [isinstance(child, Frozen) for child in module]
        if any(frozen) and all(done or is_identity(child) for child, done in zip(module, frozen, strict=True)):
            joined = FrozenSequential()
            joined._modules.update(module._modules)
            replace(holder, module, joined)


def _pack(module: nn.Module, name: str, seen: set[nn.Module]) -> list[tuple[str, str]]:
    """Build the native calls of all frozen modules below `module`, on CPU or GPU; return (name, reason) where there is
    none."""
    if module in seen:
        return []
    seen.add(module)
    if isinstance(module, Frozen):
        if any(value.device.type not in ("cpu", "cuda") for value in module.buffers()):
            return []
        network = module.native()
        if isinstance(network, Native):
            return []
        if not isinstance(module, FrozenSequential):
            return [(name, str(network))]
    reasons = []
    for child_name, child in list(module._modules.items()):
        if child is not None:
            reasons += _pack(child, f"{name}.{child_name}".removeprefix("."), seen)
    return reasons


def _own(value: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter's value as a plain contiguous tensor, for a buffer."""
    return None if value is None else value.detach().contiguous()
