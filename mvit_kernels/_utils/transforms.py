# SPDX-License-Identifier: Apache-2.0
"""What raw operators are opaque to: PyTorch's transforms, tensors of other classes, gradients of gradients.

A raw operator computes numbers. Forward-mode AD finds no tangent in it, ``torch.func`` no rule for ``vmap``, a tensor
with ``__torch_dispatch__`` no meaning of its own, and a second backward no graph. `obstacle` says so before a call is
made, and PyTorch's own operators serve it; `gradients` composes a backward pass of them, where `again` tells that the
gradients themselves are to be differentiated or transformed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# FSDP, DDP and torch.func.functional_call hand out either; None is an absent bias.
PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


@torch.compiler.assume_constant_result  # torch.compile guards on both itself, and enters those that it traces
def transform() -> str:
    """Why nothing but PyTorch's own operators may serve here and now: the transform that is active; "" if none is.

    It costs 0.1 µs.
    """
    if forward_ad._current_level >= 0:
        return "a level of forward-mode AD is open, in which only PyTorch's own operators have tangents"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active, which only PyTorch's own operators have rules for"
    return ""


def is_channels_last(x: Tensor) -> bool:
    """Whether a (B, C, H, W) map is in that memory format; the tensors of vmap, which have none, are not."""
    return not torch._C._are_functorch_transforms_active() and x.is_contiguous(memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """A (B, C, H, W) map in that memory format, where tensors have one."""
    return x if torch._C._are_functorch_transforms_active() else x.contiguous(memory_format=torch.channels_last)


def overrides(cls: type) -> bool:
    """Whether tensors of `cls` decide themselves what operators mean: quantized, distributed, fake ones."""
    return cls not in PLAIN and (
        cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
        or getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
        not in (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)
    )


def obstacle(tensors: Iterable[Tensor | None]) -> str:
    """Why no raw operator may see these `tensors` here and now, "" if any may."""
    reason = transform()
    if reason or PLAIN.issuperset(map(type, tensors)):
        return reason
    return next((f"a tensor is {why_not(type(tensor))}" for tensor in tensors if overrides(type(tensor))), "")


def why_not(cls: type) -> str:
    """What is said against tensors of a class that `overrides`."""
    return f"of class {cls.__name__}, which decides what PyTorch's operators mean and knows no others"


def is_shard(cls: type) -> bool:
    """Whether tensors of `cls` may be FSDP2's, which keeps them between calls and hands out plain ones inside."""
    return cls.__name__ == "DTensor" and cls.__module__.startswith("torch.distributed.")


def again() -> bool:
    """Whether the gradients that are being computed will be differentiated (``create_graph=True``), or transformed."""
    return bool(torch.is_grad_enabled() or transform()) and not torch.compiler.is_compiling()


def zeros_like_bias(weight: Tensor) -> Tensor:
    """In place of a bias whose value no gradient depends on, so that none was kept: one for each row of `weight`."""
    return weight.new_zeros(weight.shape[:1]).requires_grad_()


def gradients(function: Callable[..., Tensor], grad_out: Tensor, *inputs) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)``, made of PyTorch's operators; None for what needs none."""
    create_graph = torch.is_grad_enabled()

    def needs_one(value) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    with torch.enable_grad():
        # Views, since a tensor that comes in twice has two gradients.
        inputs = [value.view_as(value) if needs_one(value) else value for value in inputs]
        wanted = [value for value in inputs if needs_one(value)]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad_out, create_graph=create_graph))
    return tuple(next(found) if needs_one(value) else None for value in inputs)
