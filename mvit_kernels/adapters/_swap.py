# SPDX-License-Identifier: Apache-2.0
"""The class swap behind `accelerate`: a subclass of the same name, made once for each class, that pickles as the original."""

from __future__ import annotations

import copyreg
import importlib
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _block
from ._block import BlockParts, Refusal

logger = logging.getLogger("mvit_kernels")
_classes: dict[type[nn.Module], type[nn.Module]] = {}
_warned: set[str] = set()
_BACKEND, _PLAN = "_mvit_backend", "_mvit_plan"  # in the block's __dict__


class Plan(NamedTuple):
    """A block's parts, and what must still be so for them to be right; checked at every eager call (about 3 µs a layer)."""

    parts: BlockParts | None  # None: declined
    owners: tuple[tuple[dict, str, nn.Module], ...]  # owner._modules, name, the module that was there
    types: tuple[tuple[nn.Module, type], ...]  # parametrize and quantization change a module's class in place
    hooks: tuple[dict, ...]

    def holds(self) -> bool:
        return (
            self.parts is not None  # a declined block is looked at again each time: what was in the way may be gone
            and all(modules.get(name) is module for modules, name, module in self.owners)
            and all(module.__class__ is cls for module, cls in self.types)
            and not any(self.hooks)
        )


def is_accelerated(module: nn.Module) -> bool:
    return "_mvit_original" in type(module).__dict__


def backend_of(block: nn.Module) -> str | None:
    """The backend that `accelerate` was asked for."""
    return block.__dict__.get(_BACKEND)


def swap(block: nn.Module, adapter: ModuleType, backend: str | None) -> None:
    """Make `block` an instance of the accelerated subclass of its class."""
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

    def forward(self, x, *args, **kwargs):
        # cvnets passes tuples and keywords for video: anything but a plain map is the block's own business
        if isinstance(x, Tensor) and not args and not kwargs:
            parts = _parts(self, adapter)
            if parts is not None and (takes is None or takes(self, x)):
                return _block.forward(self, parts, x, self.__dict__[_BACKEND])
        return original.forward(self, x, *args, **kwargs)

    namespace = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_mvit_original": original,
        "_mvit_adapter": adapter.__name__,
    }
    cls = _classes[original] = type(original.__name__, (original,), namespace)
    if hasattr(adapter, "registered"):
        adapter.registered(cls)
    return cls


def _parts(block: nn.Module, adapter: ModuleType) -> BlockParts | None:
    """The block's parts, None where they are declined now. The plan is kept; a traced call reads the modules afresh, so
    that torch.compile guards on what it saw."""
    if torch.compiler.is_compiling():
        try:
            return adapter.parts(block)
        except Refusal:
            return None
    plan = block.__dict__.get(_PLAN)
    if plan is None or not plan.holds():
        plan = block.__dict__[_PLAN] = _make_plan(block, adapter)
    return plan.parts


def _make_plan(block: nn.Module, adapter: ModuleType) -> Plan:
    try:
        parts = adapter.parts(block)
    except Refusal as refusal:
        message = f"{type(block).__name__} runs unaccelerated: {refusal}"
        if message not in _warned:
            _warned.add(message)
            logger.warning(message)
        return Plan(None, (), (), ())
    inner = [module for _, module in parts.bypassed]
    owners = [(block._modules, name, module) for name, module in block._modules.items()]
    owners += [(owner._modules, name, module) for owner in inner for name, module in owner._modules.items()]
    hooks = [
        hooks
        for module in inner
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ]
    return Plan(parts, tuple(owners), tuple((module, type(module)) for module in inner), tuple(hooks))


# Pickling and deepcopy go by the original class, which can be imported by name; its accelerated subclass cannot.


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    state = self.__dict__.copy()
    state.pop(_PLAN, None)
    return _rebuild, (type(self)._mvit_original, type(self)._mvit_adapter), state


def _rebuild(original: type[nn.Module], adapter: str) -> nn.Module:
    cls = _accelerated(original, importlib.import_module(adapter))
    return copyreg.__newobj__(cls)
