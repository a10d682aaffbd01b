# SPDX-License-Identifier: Apache-2.0
"""What a module computes, known for certain or not at all: the ground on which `freeze` and the adapters stand.

A name says nothing (anybody may have a class called Swish), nor does ``isinstance`` (timm's ``BatchNormAct2d`` is a
``BatchNorm2d``, and applies an activation). A module is known if it is exactly a class of PyTorch, or a subclass that
overrides nothing of it, such as cvnets' ``Conv2d``; or exactly a class of a library that was read.
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

# What a subclass may have of its own without computing anything else.
_HARMLESS = frozenset(
    "__module__ __qualname__ __doc__ __init__ __repr__ __annotations__ __annotate__ __annotate_func__ __orig_bases__ "
    "__annotations_cache__ __constants__ __firstlineno__ __static_attributes__ __dict__ __weakref__ __slots__ "
    "__abstractmethods__ __parameters__ _abc_impl extra_repr reset_parameters reset_running_stats _get_name".split()
)


def is_plain(module: nn.Module | None, *bases: type[nn.Module]) -> bool:
    """Whether `module` computes what one of `bases` computes: neither its class nor itself overrides anything of it."""
    return any(isinstance(module, base) and _overrides_nothing(module, base) for base in bases)


def _overrides_nothing(module: nn.Module, base: type[nn.Module]) -> bool:
    if any(callable(getattr(base, name, None)) for name in module.__dict__):
        return False  # a forward of the instance's own
    # A class attribute that hides one of the instance's is a property, as parametrize makes of a weight.
    names = {*dir(base), *module.__dict__, *module._parameters, *module._buffers, *module._modules}
    names |= {name for cls in base.__mro__ for name in cls.__dict__.get("__annotations__", ())}
    added = {name for cls in type(module).__mro__ if cls not in base.__mro__ for name in vars(cls)}
    return not (added - _HARMLESS) & names


def is_own(module: nn.Module | None, package: str, *names: str) -> bool:
    """Whether `module` is of exactly a library's class of one of `names`, also where that is vendored (``x.cvnets.y``),
    and not patched."""
    cls = type(module)
    return cls.__name__ in names and package in cls.__module__.split(".") and "forward" not in module.__dict__


# In what follows classes are compared first: torch.compile traces that, and not what `is_plain` does.


def _is_exactly(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    return type(module) is cls and "forward" not in module.__dict__


def is_silu(module: nn.Module | None) -> bool:
    """Whether `module` is x · sigmoid(x): PyTorch's, Hugging Face's, timm's (also memory-efficient and scripted)."""
    return (
        _is_exactly(module, nn.SiLU)
        or is_own(module, "transformers", "SiLUActivation")
        or is_own(module, "cvnets", "Swish")
        or is_own(module, "timm", "Swish", "SwishMe", "SwishJit")
        or is_plain(module, nn.SiLU)
    ) and not module._parameters  # a Swish with a learned slope


def is_identity(module: nn.Module | None) -> bool:
    """Whether `module` does nothing, ever."""
    return _is_exactly(module, nn.Identity) or is_own(module, "cvnets", "Identity") or is_plain(module, nn.Identity)


def is_dropout(module: nn.Module | None) -> bool:
    """Whether `module` is a dropout, which in evaluation does nothing."""
    return (
        _is_exactly(module, nn.Dropout)
        or is_own(module, "timm", "DropPath", "DropBlock2d")
        or is_own(module, "mvit_kernels", "DropPath")
        or is_own(module, "cvnets", "Dropout", "Dropout2d", "StochasticDepth")
        or is_own(module, "torchvision", "StochasticDepth", "DropBlock2d")
        or is_plain(module, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    )


def does_nothing(module: nn.Module | None) -> bool:
    """Whether `module` does nothing in the mode that it is in; an empty Sequential is such a one too."""
    if is_dropout(module):
        return not module.training
    return is_identity(module) or (is_plain(module, nn.Sequential) and len(module) == 0)


def tensor_reason(name: str, value: Tensor | None) -> str | None:
    """Why the values of a weight cannot be read and joined with others; None where they can."""
    if value is None:
        return None
    if type(value) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(value).__name__}, whose values freeze cannot join or pack; give it a plain tensor"
    if value.layout != torch.strided or value.dtype not in DTYPES:
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{name} is a {layout}tensor of {value.dtype}; dense float32, bfloat16, float16 or float64 is wanted"
    return None


def weight_reasons(block: nn.Module, modules: Collection[nn.Module]) -> list[str]:
    """`tensor_reason` of every parameter of those of `modules` that are in `block`."""
    reasons = []
    for path, module in block.named_modules():
        if module in modules:
            weights = module.named_parameters(path, recurse=False)
            reasons += filter(None, (tensor_reason(name, value) for name, value in weights))
    return reasons


# -- pruning, weight norm, spectral norm: weights that are computed from others at every call


def parametrising_hooks(module: nn.Module) -> dict[int, object]:
    """The hooks that set a weight before every call: of ``prune``, and of the older weight and spectral norm."""
    kinds = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kinds)}


def settle(module: nn.Module) -> None:
    """Make the weights that `module` would compute at a call in evaluation its own, in place, once and for all."""
    for hook in parametrising_hooks(module).values():
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        else:
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it takes the property from a class that the copied model has too.
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))


# -- classes whose source was not read


def alike(module: nn.Module, other: nn.Module, channels: int, sizes: Iterable[tuple[int, int]]) -> bool:
    """Whether both map random maps to the same, in evaluation and float64: how vendored copies of a library's classes
    are known, beside their names. Neither is changed, nor are anybody's hooks called."""
    generator = torch.Generator().manual_seed(0)
    try:
        ours, theirs = (_to_try(each) for each in (module, other))
        device = next((value.device for value in (*theirs.parameters(), *theirs.buffers())), torch.device("cpu"))
        with torch.no_grad():
            for size in sizes:
                x = torch.randn((1, channels, *size), generator=generator, dtype=torch.float64, device="cpu").to(device)
                expected = theirs(x)
                if not (ours(x) - expected).abs().max() <= 1e-9 * expected.abs().max():  # nor if on meta: it raises
                    return False
    except Exception:  # whatever somebody's class raises: it is not the one that we know
        return False
    return True


def _to_try(module: nn.Module) -> nn.Module:
    copied = cast_floats(copy_of(module), torch.float64).eval()
    for part in copied.modules():
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict(parametrising_hooks(part))
    return copied


# -- whole models, whatever else they hold


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of what PyTorch does not copy: computed tensors, as pruning and weight norm keep them (detached
    here), compressed sparse ones, and the parameters of a ScriptModule (leaves again)."""
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
    """``model.to(dtype)`` for the usual floats; of others, such as 8-bit ones, the bytes may mean something else."""
    return model._apply(lambda value: value.to(dtype) if value.dtype in DTYPES else value)
