# SPDX-License-Identifier: Apache-2.0
"""Where raw operators cannot be used: PyTorch's transforms, tensor subclasses, gradients of gradients.

A raw operator only computes numbers. Forward-mode AD finds no tangent rule for it, ``torch.func`` no ``vmap`` rule, a
tensor with ``__torch_dispatch__`` no implementation, and a second backward no graph. `obstacle` says so before a call,
and PyTorch's own operators serve it. `gradients` composes a backward pass of PyTorch's operators, for when `again` says
that the gradients themselves will be differentiated or transformed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .compiling import assume_constant_result

# FSDP, DDP and torch.func.functional_call pass either of the two; NoneType is that of an absent bias.
PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


@assume_constant_result  # torch.compile itself guards on both, and enters the transforms that it traces
def transform() -> str:
    """Why only PyTorch's own operators can run now: the transform that is active; "" if none is. It takes 0.1 µs."""
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active, which only PyTorch's own operators support"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active, which only PyTorch's own operators support"
    return ""


def is_channels_last(x: Tensor) -> bool:
    """Whether a (B, C, H, W) map is channels-last in memory. Under ``torch.func`` tensors have no format: False."""
    return not torch._C._are_functorch_transforms_active() and x.is_contiguous(memory_format=torch.channels_last)


def layout_of(x: Tensor) -> str:
    """How a map lies in memory, as a fact of a `Call`: "channels_last", "contiguous" or "strided"."""
    return "channels_last" if is_channels_last(x) else "contiguous" if x.is_contiguous() else "strided"


def channels_last(x: Tensor) -> Tensor:
    """A (B, C, H, W) map in channels-last format. Under ``torch.func`` tensors have no format: x itself."""
    return x if torch._C._are_functorch_transforms_active() else x.contiguous(memory_format=torch.channels_last)


def overrides(cls: Any) -> bool:
    """Whether tensors of `cls` define PyTorch's operators themselves, as quantized, distributed and fake ones do."""
    return cls not in PLAIN and (
        cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
        or getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
        not in (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined] # a method
    )


def obstacle(tensors: Iterable[Tensor | None]) -> str:
    """Why no raw operator may take these `tensors` now; "" if one may."""
    reason = transform()
    if reason or PLAIN.issuperset(map(type, tensors)):
        return reason
    return next((f"a tensor is {why_not(type(tensor))}" for tensor in tensors if overrides(type(tensor))), "")


def why_not(cls: type) -> str:
    """The reason against tensors of a class for which `overrides` holds."""
    return f"of class {cls.__name__}, which overrides PyTorch's operators and does not implement mvit_kernels' own"


def is_shard(cls: type) -> bool:
    """Whether tensors of `cls` may be FSDP2's, which keeps them between calls and passes plain ones inside a call."""
    return cls.__name__ == "DTensor" and cls.__module__.startswith("torch.distributed.")


def again() -> bool:
    """Whether the gradients being computed will be differentiated (``create_graph=True``) or transformed."""
    return bool(torch.is_grad_enabled() or transform()) and not torch.compiler.is_compiling()


def zeros_like_bias(weight: Tensor) -> Tensor:
    """A stand-in for a bias that was not saved because no gradient depends on its value: one zero a row of `weight`."""
    return weight.new_zeros(weight.shape[:1]).requires_grad_()


def gradients(function: Callable[..., Tensor], grad_out: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)``, computed by PyTorch's operators.

    Args:
        function: differentiable by PyTorch.
        grad_out: the gradient of its result.
        inputs: its arguments; those that are not tensors have no gradient.

    Returns:
        One gradient for each input, None where none is needed; differentiable where gradients are enabled.
    """
    create_graph = torch.is_grad_enabled()

    def needs_one(value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    with torch.enable_grad():
        # Views: a tensor that is passed twice has a gradient for each place.
        views = [value.view_as(value) if needs_one(value) else value for value in inputs]
        wanted = [value for value in views if needs_one(value)]
        found = iter(torch.autograd.grad(function(*views), wanted, grad_out, create_graph=create_graph))
    return tuple(next(found) if needs_one(value) else None for value in views)
