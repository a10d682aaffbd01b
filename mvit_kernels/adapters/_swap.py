# SPDX-License-Identifier: Apache-2.0
"""The class swap behind `accelerate`: one subclass per block class, of the same name, pickled by the original class.

A block here is a MobileViT block or a convolution layer (`_convolution`). An adapter has `parts`, and if they are not
those of a MobileViT block `forward`, which runs them. Calls may be left to the original forward: by `takes`, which sees
block and input, and before the parts are looked at by `TRAINING_ONLY` and by `wants`, which sees the input.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .._utils.transforms import overrides, why_not
from . import _block
from ._block import Refusal

logger = logging.getLogger("mvit_kernels")
_classes: dict[type[nn.Module], type[nn.Module]] = {}
_logged: set[str] = set()
_BACKEND, _PLAN = "_mvit_backend", "_mvit_plan"  # keys in the block's __dict__


@dataclass(frozen=True, slots=True)  # not a tuple: torch.export walks tuples it finds in a module, and this has cycles
class Plan:
    """An adapter's answer for a block, and the conditions under which it remains valid.

    They are checked at every eager call, with loops that run in C only: 2.9 µs a layer, where generator expressions
    take 4.9 µs.
    """

    parts: Any  # what `adapter.parts` returned; None: declined
    owners: tuple[dict, ...]  # the `_modules` of each module that has children
    children: tuple[tuple[nn.Module | None, ...], ...]  # their values when the plan was made
    modules: tuple[nn.Module, ...]
    types: tuple[type, ...]  # parametrize and quantization change a module's class in place
    attributes: tuple[dict, ...]  # for each name below, the `__dict__` of its module
    names: tuple[str, ...]  # attributes: eps, heads, …, and "forward", which must not be set on the instance
    values: tuple[Any, ...]
    hooks: tuple[dict, ...]
    hooked: bool
    parameters: tuple[dict, ...]  # the `_parameters` of each module that has any
    kinds: frozenset[type]  # classes of the parameters: quantization puts subclasses of Tensor there

    def holds(self, block: nn.Module) -> bool:
        return (
            self.owners[0] is block._modules  # DataParallel copies a block's __dict__, including this plan
            and tuple(map(tuple, map(dict.values, self.owners))) == self.children
            and tuple(map(type, self.modules)) == self.types
            and tuple(map(dict.get, self.attributes, self.names)) == self.values
            and any(self.hooks) is self.hooked
            and set(map(type, chain.from_iterable(map(dict.values, self.parameters)))) == self.kinds
        )


def global_hooks() -> list[str]:
    """The reason against any fast path while a global module hook is registered, as FLOP counters do; else empty."""
    if not _has_any_global_hook():
        return []
    return [
        "a hook on all modules (register_module_forward_hook and the like) is registered, which must see every call"
    ]


def is_accelerated(module: nn.Module) -> bool:
    return hasattr(type(module), "_mvit_original")


def derived_from_accelerated(module: nn.Module) -> bool:
    """Whether the class of `module` is derived from an accelerated class, as ``fully_shard`` makes it."""
    return is_accelerated(module) and "_mvit_original" not in type(module).__dict__


def backend_of(block: nn.Module) -> str | None:
    """The backend that `accelerate` was given, or None."""
    return block.__dict__.get(_BACKEND)


def swap(block: nn.Module, adapter: ModuleType, backend: str | None) -> None:
    """Change the class of `block` to the accelerated subclass of its class."""
    if not is_accelerated(block):
        block.__class__ = _accelerated(type(block), adapter)
    block.__dict__[_BACKEND] = backend
    block.__dict__.pop(_PLAN, None)


def unswap(block: nn.Module) -> None:
    """Undo `swap`."""
    block.__class__ = type(block)._mvit_original
    block.__dict__.pop(_BACKEND, None)
    block.__dict__.pop(_PLAN, None)


def _accelerated(original: type[nn.Module], adapter: ModuleType) -> type[nn.Module]:
    cls = _classes.get(original)
    if cls is not None:
        return cls
    takes = getattr(adapter, "takes", None)
    wants = getattr(adapter, "wants", None)
    run = getattr(adapter, "forward", _block.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # cvnets passes tuples and keywords for video: anything but a single map goes to the original forward.
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and (wants is None or wants(args[0])):
            parts = _parts(self, adapter)
            if parts is not None and (takes is None or takes(self, args[0])):
                return run(parts, args[0], backend_of(self))
        return original.forward(self, *args, **kwargs)

    namespace = {
        "forward": _scriptable(forward, original.forward, getattr(adapter, "TRAINING_ONLY", False)),
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_mvit_original": original,
        "_mvit_adapter": adapter.__name__,
    }
    cls = _classes[original] = type(original.__name__, (original,), namespace)
    return cls


def _scriptable(fast: Callable, original: FunctionType, training_only: bool) -> FunctionType:
    """`fast` in a form that TorchScript takes for `original`: scripting compiles the library's own forward.

    `torch.jit.script` finds the source through ``__wrapped__`` and resolves the names in it through ``__globals__``.
    (The hook ``__prepare_scriptable__`` does not work here: the module that it returns also replaces the block in the
    model that is being scripted.)
    """

    def always(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(self, *args, **kwargs)

    def in_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(self, *args, **kwargs) if self.training else original(self, *args, **kwargs)

    forward = in_training if training_only else always
    forward = FunctionType(forward.__code__, original.__globals__, "forward", closure=forward.__closure__)
    return functools.update_wrapper(forward, original)


def _parts(block: nn.Module, adapter: ModuleType) -> Any:
    """The block's parts, or None if it is declined now.

    Eager calls keep the answer as a `Plan`. A traced call reads the modules afresh, so that torch.compile guards on
    what it reads.
    """
    if torch.compiler.is_compiling():
        try:
            return None if global_hooks() else adapter.parts(block)
        except Refusal:
            return None
    for reason in global_hooks():
        _log_once(block, adapter, reason)
        return None
    plan = block.__dict__.get(_PLAN)
    if plan is None or not plan.holds(block):
        plan = block.__dict__[_PLAN] = _make_plan(block, adapter)
    return plan.parts


def _make_plan(block: nn.Module, adapter: ModuleType) -> Plan:
    try:
        parts = adapter.parts(block)
        seen = parts.seen
    except Refusal as refusal:
        _log_once(block, adapter, str(refusal))
        parts, seen = None, refusal.seen
    inner = seen.modules[1:]
    owners = tuple(module._modules for module in seen.modules if module._modules)
    facts = [*seen.facts, *((module, "forward", module.__dict__.get("forward")) for module in inner)]
    hooks = tuple(hooks for module in inner for hooks in _block.hooks_of(module))
    parameters = tuple(module._parameters for module in inner if module._parameters)
    kinds = frozenset(map(type, chain.from_iterable(map(dict.values, parameters))))
    for cls in filter(overrides, kinds if parts is not None else ()):
        _log_once(block, adapter, f"a parameter is {why_not(cls)}")
        parts = None
    return Plan(
        parts=parts,
        owners=owners,
        children=tuple(map(tuple, map(dict.values, owners))),
        modules=inner,
        types=tuple(map(type, inner)),
        attributes=tuple(module.__dict__ for module, _, _ in facts),
        names=tuple(name for _, name, _ in facts),
        values=tuple(value for _, _, value in facts),
        hooks=hooks,
        hooked=any(hooks),
        parameters=parameters,
        kinds=kinds,
    )


def _log_once(block: nn.Module, adapter: ModuleType, reason: str) -> None:
    message = f"{type(block).__name__} runs unaccelerated: {reason}"
    if message not in _logged:
        _logged.add(message)
        logger.log(getattr(adapter, "LOG_LEVEL", logging.WARNING), message)


# Pickle and deepcopy store the original class, which can be imported by name; the accelerated subclass cannot be, and
# is made again on loading.


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    state = self.__dict__.copy()
    state.pop(_PLAN, None)
    return _rebuild, (type(self)._mvit_original, type(self)._mvit_adapter), state


def _rebuild(original: type[nn.Module], adapter: str) -> nn.Module:
    cls = _accelerated(original, importlib.import_module(adapter))
    return copyreg.__newobj__(cls)
