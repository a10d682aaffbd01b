# SPDX-License-Identifier: Apache-2.0
"""`Frozen`, the base class of frozen modules: permanent evaluation mode, and one native call for everything inside
(`mvit_kernels.freezing.native`), of C++ on the CPU, of prepared launches on a GPU. Where that is not possible (other
devices and dtypes, tracing, a required gradient, hooks inside) a module is composed of its parts.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops._checks import DTYPES
from . import changes
from .graphs import CudaGraphs
from .native import Native, is_current, kind_for, kind_of
from .program import Builder, NotNative, Place


class Frozen(nn.Module):
    """Base class of the frozen modules: permanent evaluation mode, and a native call for everything inside.

    A subclass implements its computation twice: ``composed(x)`` with PyTorch, and ``emit(builder, source, target)`` as
    steps of a `Builder`, which raises `NotNative` if no steps can express it. ``place(builder)`` is where it wants its
    input, None for anywhere; ``in_channels`` is the number of channels of the input.
    """

    generation = 0  # incremented by every change that makes packed weights stale
    cuda_graph: CudaGraphs | None = None  # of its native call on a GPU
    _network: Native | NotNative | None = None
    _composes = False  # while `mvit_kernels.freezing.half_range` looks at what is inside

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__["_buffers"] = changes.NotedDict(self._buffers)
        self.training = False

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode; raises RuntimeError if `mode` is True."""
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is frozen for inference and cannot be trained; train the model that freeze() "
                "was given (accelerate() speeds that up), then freeze it again"
            )
        return super().train(False)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__} is frozen, and its native calls cannot be compiled by TorchScript; use "
            "torch.jit.trace, or torch.jit.script the model that freeze() was given"
        )

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        kind = None if self._composes else kind_for(x)
        if kind is not None:
            network = self.native(kind)
            plan = network.plan(x) if isinstance(network, Native) else None
            if plan is not None:
                return network(x, plan)
        return self.composed(x)

    def _check(self, x: Tensor) -> None:
        """Reject what PyTorch's convolution rejects too. Floats are cast to the weights' dtype, but integers are an
        unscaled image, and a cast of complex numbers drops the imaginary part. (0.2 µs.)"""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x is {type(x).__name__}; a torch.Tensor is wanted")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{type(self).__name__}: x is {x.dtype}; float32, bfloat16, float16 or float64 is wanted. Scale it "
                "to the range that the model was trained on first: x.float() / 255 for an image of bytes, then its "
                "mean and standard deviation"
            )

    def native(self, kind: type[Native] | None = None) -> Native | NotNative:
        """The native call of `kind` (None: that of the weights' device) for the current state, or the reason why there
        is none."""
        network, kind = self._network, kind or kind_of(self)
        if not is_current(network, kind):
            try:
                network = kind(self)
            except NotNative as reason:
                network = reason.about_kind(kind)
            self._network = network if isinstance(network, Native) or network.lasts else None
        return network

    def place(self, builder: Builder) -> Place | None:
        return None

    def _changed(self) -> None:
        self.generation += 1
        self._network = None
        changes.note()

    # Weights are packed again after a move, a load, a copy, unpickling, and a change of an inner module. A hook is
    # noted too, since a native call around this module would skip it.

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle = super().register_forward_hook(*args, **kwargs)
        changes.note()
        return handle

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle = super().register_forward_pre_hook(*args, **kwargs)
        changes.note()
        return handle

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changed()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and (isinstance(value, (nn.Module, Tensor)) or name in self._modules):
            self._changed()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._changed()
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._changed()
        super().add_module(name, module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None, "_buffers": dict(self._buffers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_buffers"] = changes.NotedDict(self._buffers)
