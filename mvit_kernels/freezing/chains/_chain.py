# SPDX-License-Identifier: Apache-2.0
"""What a library's file says about a network: `Chain`, and how its forward is called: `Calls`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..._utils.plain import does_nothing, is_own, is_plain
from ..modules import Frozen
from ..program import NotNative


class Calls(NamedTuple):
    """How a network's forward is called.

    Args:
        image: from (model, args, kwargs) to the image; None if this call asks for more than the network's result.
        output: from (model, kwargs, result of the chain) to what the library returns.
    """

    image: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Any]
    output: Callable[[nn.Module, Mapping[str, Any], Tensor], Any]


def _one_image(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    return kwargs["x"] if not args and kwargs.keys() == {"x"} else None


def _as_it_is(model: nn.Module, kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
    return y


ONE_TENSOR = Calls(_one_image, _as_it_is)  # forward(x), which returns a tensor


class Chain(NamedTuple):
    """What a network computes: frozen modules one after another, a mean over the last map, a classifier.

    Args:
        body: the modules from the image to the last map, each frozen or an identity.
        pools: channels of the last map, if its mean is taken; 0 if it is not.
        classifier: a linear layer after the mean, or a frozen 1×1 convolution of the last map.
        passed: modules beside the body that the library's forward calls or looks into, and one call does not.
        facts: (object, attribute) of everything else that forward, in evaluation, depends on.
        checks: what the library's forward does first, with the image: our own models raise their errors there.
    """

    body: tuple[nn.Module, ...]
    pools: int = 0
    classifier: nn.Module | None = None
    passed: tuple[nn.Module, ...] = ()
    facts: tuple[tuple[object, str], ...] = ()
    checks: tuple[Callable[[Any], None], ...] = ()


def frozen(model: nn.Module, *paths: str) -> tuple[nn.Module, ...]:
    """The modules at `paths` below `model`; raises `NotNative` with the names of those that are not frozen."""
    modules = [model.get_submodule(path) for path in paths]
    left = [
        path
        for path, module in zip(paths, modules, strict=True)
        if not isinstance(module, Frozen) and not does_nothing(module)
    ]
    if left:
        raise NotNative(f"not frozen: {', '.join(left)}")
    return tuple(modules)


def idle(model: nn.Module, *paths: str) -> tuple[nn.Module, ...]:
    """The modules at `paths`, which are identities; raises `NotNative` if one computes something."""
    modules = [model.get_submodule(path) for path in paths]
    for path, module in zip(paths, modules, strict=True):
        if not does_nothing(module):
            mode = "in training mode" if module.training else "no identity"
            raise NotNative(f"{path} ({type(module).__name__}) is {mode}")
    return tuple(modules)


def is_linear(module: nn.Module | None) -> bool:
    """Whether `module` is an nn.Linear, or cvnets' LinearLayer, whose weight is alike unless it works channel-first. Of
    a copy of cvnets only the name is known here; its values are tested."""
    if is_plain(module, nn.Linear):
        return True
    named = is_own(module, "cvnets", "LinearLayer") or type(module).__name__ == "LinearLayer"
    return named and "weight" in module._parameters and not getattr(module, "channel_first", False)
