# SPDX-License-Identifier: Apache-2.0
"""What a module computes, known exactly or not at all: the basis of `freeze` and of the adapters.

A name proves nothing (anyone may have a class called Swish), nor does ``isinstance`` (timm's ``BatchNormAct2d`` is a
``BatchNorm2d`` that also applies an activation). A module is known if its class is exactly one of PyTorch's, or a
subclass that overrides nothing of it, such as cvnets' ``Conv2d``; or exactly that of a library whose source was read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What a subclass may define without changing what it computes.
_HARMLESS = frozenset(
    "__module__ __qualname__ __doc__ __init__ __repr__ __annotations__ __annotate__ __annotate_func__ __orig_bases__ "
    "__annotations_cache__ __constants__ __firstlineno__ __static_attributes__ __dict__ __weakref__ __slots__ "
    "__abstractmethods__ __parameters__ _abc_impl extra_repr reset_parameters reset_running_stats _get_name".split()
)


def is_plain(module: nn.Module | None, *bases: type[nn.Module]) -> bool:
    """Whether `module` computes what one of `bases` computes: neither its class nor the instance overrides anything."""
    return any(isinstance(module, base) and _overrides_nothing(module, base) for base in bases)


def _overrides_nothing(module: nn.Module, base: type[nn.Module]) -> bool:
    if any(callable(getattr(base, name, None)) for name in module.__dict__):
        return False  # such as a forward on the instance
    # A class attribute that hides an instance's is a property, such as parametrize makes of a weight.
    names = {*dir(base), *module.__dict__, *module._parameters, *module._buffers, *module._modules}
    names |= {name for cls in base.__mro__ for name in cls.__dict__.get("__annotations__", ())}
    added = {name for cls in type(module).__mro__ if cls not in base.__mro__ for name in vars(cls)}
    return not (added - _HARMLESS) & names


def is_own(module: nn.Module | None, package: str, *names: str) -> bool:
    """Whether the class of `module` is exactly one that `package` has under one of `names`, also in a vendored copy
    (``x.cvnets.y``), and its forward is not patched."""
    cls = type(module)
    return cls.__name__ in names and package in cls.__module__.split(".") and "forward" not in module.__dict__


# The checks below compare classes first: torch.compile can trace that, but not what `is_plain` does.


def _is_exactly(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    return type(module) is cls and "forward" not in module.__dict__


def is_silu(module: nn.Module | None) -> bool:
    """Whether `module` is x · sigmoid(x), of PyTorch, Hugging Face, cvnets or timm (memory-efficient, scripted too)."""
    return (
        _is_exactly(module, nn.SiLU)
        or is_own(module, "transformers", "SiLUActivation")
        or is_own(module, "cvnets", "Swish")
        or is_own(module, "timm", "Swish", "SwishMe", "SwishJit")
        or is_plain(module, nn.SiLU)
    ) and not module._parameters  # not a Swish with a learned slope


def activation_kind(module: nn.Module | None) -> str | None:
    """The activation that `module` is known to compute, "silu" or "relu"; None for any other module."""
    if is_silu(module):
        return "silu"
    if _is_exactly(module, nn.ReLU) or is_own(module, "cvnets", "ReLU") or is_plain(module, nn.ReLU):
        return "relu"
    return None


def is_global_mean(module: nn.Module | None) -> bool:
    """Whether `module` takes the mean over a map and keeps its axes: ``nn.AdaptiveAvgPool2d(1)``."""
    return is_plain(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])


def is_identity(module: nn.Module | None) -> bool:
    """Whether `module` is an identity, in training and in evaluation."""
    return _is_exactly(module, nn.Identity) or is_own(module, "cvnets", "Identity") or is_plain(module, nn.Identity)


def is_dropout(module: nn.Module | None) -> bool:
    """Whether `module` is a dropout, which is an identity in evaluation."""
    return (
        _is_exactly(module, nn.Dropout)
        or is_own(module, "timm", "DropPath", "DropBlock2d")
        or is_own(module, "mvit_kernels", "DropPath")
        or is_own(module, "cvnets", "Dropout", "Dropout2d", "StochasticDepth")
        or is_own(module, "torchvision", "StochasticDepth", "DropBlock2d")
        or is_plain(module, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    )


def does_nothing(module: nn.Module | None) -> bool:
    """Whether `module` is an identity in its current mode; an empty Sequential is one too."""
    if is_dropout(module):
        return not module.training
    return is_identity(module) or (is_plain(module, nn.Sequential) and len(module) == 0)


def tensor_reason(name: str, value: Tensor | None) -> str | None:
    """Why a weight cannot be read and merged with others; None if it can.

    Args:
        name: the weight's, for the message.
        value: the weight; None is an absent one, against which there is no reason.
    """
    if value is None:
        return None
    if type(value) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(value).__name__}, whose values freeze cannot join or pack; give it a plain tensor"
    if value.layout != torch.strided or value.dtype not in DTYPES:
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{name} is a {layout}tensor of {value.dtype}; dense float32, bfloat16, float16 or float64 is wanted"
    return None


def weight_reasons(block: nn.Module, modules: Collection[nn.Module]) -> list[str]:
    """`tensor_reason` for every parameter of those of `modules` that are in `block`."""
    reasons: list[str] = []
    for path, module in block.named_modules():
        if module in modules:
            weights = module.named_parameters(path, recurse=False)
            reasons += filter(None, (tensor_reason(name, value) for name, value in weights))
    return reasons


# -- pruning, weight norm, spectral norm: weights that are computed from others at every call


def parametrising_hooks(module: nn.Module) -> dict[int, object]:
    """The hooks that compute a weight before every call: of ``prune``, and of the older weight norm and spectral norm.

    Returns:
        Key -> hook, as in the module's forward pre-hooks.
    """
    kinds = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kinds)}


def settle(module: nn.Module) -> None:
    """Replace computed weights by the values that `module` would compute in evaluation, in place and for good."""
    for hook in parametrising_hooks(module).values():
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        else:
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it deletes the property from the class, which a copied model shares.
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))


# -- classes whose source was not read


def alike(module: nn.Module, other: nn.Module, channels: int, sizes: Iterable[tuple[int, int]]) -> bool:
    """Whether both modules map random inputs to the same outputs, in evaluation mode and in float64.

    Vendored copies of a library's classes are recognised by this, in addition to their names. Neither module is
    changed, and no hooks are called but those that compute weights.

    Args:
        module, other: the modules to compare.
        channels: of the inputs.
        sizes: (height, width) of each input map.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        ours, theirs = (_to_try(each) for each in (module, other))
        device = next((value.device for value in (*theirs.parameters(), *theirs.buffers())), torch.device("cpu"))
        with torch.no_grad():
            for size in sizes:
                x = torch.randn((1, channels, *size), generator=generator, dtype=torch.float64, device="cpu").to(device)
                expected = theirs(x)
                if not (ours(x) - expected).abs().max() <= 1e-9 * expected.abs().max():  # on "meta" this raises
                    return False
    except Exception:  # whatever an unknown class raises: it is not the one that we know
        return False
    return True


def _to_try(module: nn.Module) -> nn.Module:
    copied = cast_floats(copy_of(module), torch.float64).eval()
    for part in copied.modules():
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict(parametrising_hooks(part))
    return copied


# -- whole models


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, including what ``copy.deepcopy`` does not copy.

    These are computed tensors, as pruning and weight norm keep them (detached in the copy), compressed sparse tensors,
    and the parameters of a ScriptModule (leaves in the copy).
    """
    memo = {id(value): value.detach().clone() for value in _uncopied(model)}
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_()
    return copied


def _uncopied(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in (*module.__dict__.values(), *module._buffers.values()):
            if isinstance(value, Tensor) and (
                not value.is_leaf or value.layout not in (torch.strided, torch.sparse_coo)
            ):
                yield value


def cast_floats(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model.to(dtype)`` for tensors of the usual floating dtypes; others, such as 8-bit floats, may encode something
    else and stay as they are."""
    return model._apply(lambda value: value.to(dtype) if value.dtype in DTYPES else value)
