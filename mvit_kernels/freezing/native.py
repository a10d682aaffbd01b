# SPDX-License-Identifier: Apache-2.0
"""What the two native calls of a frozen module share: until when they are valid, and which calls they serve.

A `Native` is built from a frozen module's program (`mvit_kernels.freezing.program`) for one device and computes it
without the modules: on the CPU in one call of C++ (`mvit_kernels.freezing.network`), on a GPU as a list of launches
(`mvit_kernels.freezing.launched`). `kind_for` says which of them a call may go to.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from .._utils.transforms import PLAIN, obstacle, transform
from ..backends import triton
from . import changes
from .program import Builder, NotNative, build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Native(ABC):
    """A frozen module as one native call, valid until something that it was built from changes.

    Args:
        module: the frozen module.

    Raises:
        NotNative: it must be called module by module instead, for the reason given.
    """

    backends: ClassVar[tuple[str, ...]]  # those that a block may ask for by name

    def __init__(self, module: nn.Module) -> None:
        weight = next(iter(module.buffers()), None)
        where = type(self).place_of_weights()
        if weight is None or weight.device.type != where or weight.dtype not in DTYPES:
            named = "the CPU" if where == "cpu" else "a GPU"
            raise NotNative(f"its weights are not float32, bfloat16 or float16 on {named}")
        self.dtype, self.device = weight.dtype, weight.device
        self._check(module)
        builder = build(module, self.dtype, type(self).backends)
        self._pack(builder)
        self.takes = builder.takes
        self._taken: dict[Any, bool] = {}
        # Inner modules, whose hooks it would skip, and the tensors that were packed, whose changes invalidate it.
        self._inner = [part for part in module.modules() if part is not module]
        self._others = [part for part in self._inner if not hasattr(part, "generation")]  # these note no change
        self._buffers = [part._buffers for part in module.modules() if part._buffers]
        self._packed_from = tuple(chain.from_iterable(map(dict.values, self._buffers)))
        self._generations = [(part, part.generation) for part in module.modules() if hasattr(part, "generation")]
        self._seen: object = None  # the last change before everything was looked at

    @staticmethod
    @abstractmethod
    def place_of_weights() -> str:
        """The type of the device that it runs on."""

    @abstractmethod
    def _check(self, module: nn.Module) -> None:
        """Raise `NotNative` if it cannot run here at all."""

    @abstractmethod
    def _pack(self, builder: Builder) -> None:
        """Keep what the calls need of the module's program and weights; raises `NotNative`."""

    @abstractmethod
    def rows(self, x: Tensor, plan: Any) -> Tensor:
        """Map (B, C, H, W) of any format to contiguous (B, H', W', C'), in the weights' dtype, by what `plan` returned
        for it."""

    def __call__(self, x: Tensor, plan: Any) -> Tensor:
        """Map (B, C, H, W) of any memory format to (B, C', H', W'), channels-last, in the weights' dtype."""
        return self.rows(x, plan).permute(0, 3, 1, 2)

    def is_stale(self) -> bool:
        """Whether something inside has changed since it was built."""
        return self._seen is not changes.last and any(
            part.generation != generation for part, generation in self._generations
        )

    def _has_packed_weights(self) -> bool:
        return all(map(is_, chain.from_iterable(map(dict.values, self._buffers)), self._packed_from))

    def plan(self, x: Tensor) -> Any:
        """How it computes a call with `x`, for `rows`; None if it does not serve it."""
        return self if self._serves(x) else None

    def _serves(self, x: Tensor) -> bool:
        """Whether no hook would be skipped, the weights are the packed ones (``torch.func.functional_call`` substitutes
        others), and every block accepts its map (Kornia raises for maps that are not whole patches)."""
        if self._seen is not changes.last:
            now = changes.last
            if self.is_stale() or hooked(self._inner) or not self._has_packed_weights():
                return False
            if not any(part._buffers for part in self._others):
                self._seen = now
        elif hooked(self._others):
            return False
        if not self.takes:
            return True
        size = (x.shape[2], x.shape[3])
        taken = self._taken.get(size)
        if taken is None:
            if len(self._taken) > 4096:  # bounds the cache when every call has another size
                self._taken.clear()
            taken = self._taken[size] = all(
                block.takes(
                    block.fallback,
                    torch.empty((1, channels, *(-(-side // 2**halvings) for side in size)), device="meta"),
                )
                for block, channels, halvings in self.takes
            )
        return taken


def kind_for(x: object) -> type[Native] | None:
    """The kind of native call that may serve a call with `x` now: inference, not under tracing or a transform, and no
    other backend asked for; None if there is none."""
    if not (
        isinstance(x, Tensor)
        and x.ndim == 4
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not (transform() if type(x) in PLAIN else obstacle((x,)))
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
    ):
        return None
    requested = backends.requested()
    if x.is_cpu and requested in (None, "cpu"):
        return _kind(False)
    # A dispatch mode sees PyTorch's operators and no launch: a FLOP counter would count nothing.
    if (x.is_cpu or x.is_cuda) and requested in (None, "triton") and not torch._C._len_torch_dispatch_stack():
        kind = kind_on(x.device.type)
        return kind if requested in (None, *kind.backends) else None
    return None


def kind_on(device_type: str) -> type[Native]:
    """The kind of native call on such a device: launches on a GPU (and on the CPU where Triton, whose interpreter runs
    there, is the backend asked for), else C++."""
    interpreted = triton.target.INTERPRETED and device_type == "cpu" and backends.requested() == "triton"
    return _kind(device_type == "cuda" or interpreted)


def kind_of(module: nn.Module) -> type[Native]:
    """The kind of native call where the module's weights are."""
    weight = next(iter(module.buffers()), None)
    return kind_on("cpu" if weight is None else weight.device.type)


@functools.cache
def _kind(launched: bool) -> type[Native]:
    """Imported when it is used: both are built on this module."""
    module = importlib.import_module(f"{__package__}.{'launched' if launched else 'network'}")
    return module.LaunchedNetwork if launched else module.Network


def is_current(network: Native | NotNative | None, kind: type[Native]) -> bool:
    """Whether `network`, or the reason why there is none, still answers for calls of `kind`."""
    if type(network) is kind:  # and so no abstract class's isinstance, 10 µs of cold code in each call
        return not network.is_stale()
    return not isinstance(network, Native) and network is not None and network.about == (kind, backends.requested())


def hooks_inside(module: nn.Module) -> bool:
    """Whether a hook would be skipped if the modules inside `module` were not called one by one."""
    return hooked([part for part in module.modules() if part is not module])


def hooked(modules: list[nn.Module]) -> bool:
    """Whether a hook of one of `modules`, or a global one, would be skipped if they were not called."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)
