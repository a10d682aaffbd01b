# SPDX-License-Identifier: Apache-2.0
"""What the operators check before anything runs, and what autocast does to their arguments.

Every message names the operator, the argument, what came, what is wanted and what to do. The checks read only shapes,
dtypes and devices, so a traced call pays nothing at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from .._utils.plain import DTYPES
from .._utils.transforms import obstacle
from ..backends import Call

First = TypeVar("First", bound=Tensor | None)
Second = TypeVar("Second", bound=Tensor | None)
OPTIONAL = ("bias", "qkv_bias")  # the arguments that may be None


def tensor(op: str, name: str, value: Any, ndim: int | None = None, layout: str = "") -> None:
    """Check that `value` is a floating tensor, with `ndim` axes if given.

    Args:
        op, name: the operator and the argument, for the message.
        value: the argument.
        ndim: how many axes it must have.
        layout: the names of the axes, for the message.

    Raises:
        TypeError: not a tensor, or of another dtype than float32, bfloat16, float16 and float64.
        ValueError: another number of axes.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {_article(type(value).__name__)}; a torch.Tensor is wanted")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} is {value.dtype}; one of float32, bfloat16, float16, float64 is wanted. Convert it with "
            ".float()"
        )
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; {ndim} axes {layout} are wanted")


def shape(op: str, name: str, value: Tensor, wanted: Sequence[int], why: str) -> None:
    """Check that `value` has exactly the shape `wanted`; `why` says where the numbers come from.

    Raises:
        ValueError: another shape.
    """
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; {tuple(wanted)} is wanted, {why}")


def like(op: str, x: Tensor, x_name: str, autocast: bool, **others: Any) -> None:
    """Check that all of `others` are on x's device and have x's dtype.

    LayerNorm's parameters may be float32 beside 16-bit rows. Under autocast any floating dtype but float64 is allowed.

    Args:
        op: the operator, for the message.
        x, x_name: the tensor to compare with, and its name.
        autocast: whether autocast applies to x.
        others: argument name -> tensor; those in `OPTIONAL` may be None.

    Raises:
        TypeError: not a floating tensor, or another dtype.
        ValueError: another device.
    """
    for name, other in others.items():
        if other is None and name in OPTIONAL:
            continue
        tensor(op, name, other)
        if other.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {other.device} and {x_name} on {x.device}; move both to one device with "
                ".to(device)"
            )
        if other.dtype == x.dtype or (autocast and other.dtype != torch.float64):
            continue
        if "norm" in name and other.dtype == torch.float32 and x.dtype != torch.float64:
            continue
        raise TypeError(
            f"{op}: {name} is {other.dtype} and {x_name} {x.dtype}; give both one dtype (model.to(dtype) or "
            f"{x_name}.to(dtype)), or call under torch.autocast"
        )


def norm_parameters(op: str, x: Tensor, **parameters: Tensor) -> None:
    """Check that a norm's `parameters` are on x's device and have one dtype, x's or float32, as PyTorch wants them.

    Args:
        op, x: the operator, for the message, and its map.
        parameters: argument name -> tensor.

    Raises:
        TypeError: not a floating tensor, or another dtype.
        ValueError: another device.
    """
    for name, value in parameters.items():
        tensor(op, name, value)
        if value.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {value.device} and x on {x.device}; move both to one device with .to(device)"
            )
    first, dtype = next((name, value.dtype) for name, value in parameters.items())
    if dtype != x.dtype and (dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(
            f"{op}: {first} is {dtype} and x {x.dtype}; {x.dtype} or float32 is wanted for it, as model.to(dtype) gives"
        )
    for name, value in parameters.items():
        if value.dtype != dtype:
            raise TypeError(
                f"{op}: {name} is {value.dtype} and {first} {dtype}; one dtype is wanted for both, as model.to(dtype) "
                "gives"
            )


def patch(op: str, patch_size: Any) -> tuple[int, int]:
    """`patch_size` as (height, width), from an int or a pair of ints.

    Raises:
        ValueError: anything else, or a side below 1.
    """
    pair = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    pair = tuple(pair) if isinstance(pair, Iterable) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair):
        raise ValueError(f"{op}: patch_size is {patch_size!r}; a pair (height, width) of positive ints is wanted")
    return pair


def whole_patches(op: str, name: str, height: int, width: int, patch_size: tuple[int, int]) -> None:
    """Check that a map of `height` × `width` tokens splits into whole patches, at least one.

    Raises:
        ValueError: it does not.
    """
    ph, pw = patch_size
    if height == 0 or width == 0 or height % ph or width % pw:
        raise ValueError(
            f"{op}: {name} is a map of {height} × {width} tokens, which does not split into patches of {ph} × {pw}; "
            "resize it first, as MobileViT does (mvit_kernels.ops.transformer_on_map)"
        )


def heads(op: str, num_heads: Any) -> None:
    """Check that `num_heads` is a positive int.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"{op}: num_heads is {num_heads!r}; a positive int is wanted")


def eps(op: str, value: Any) -> None:
    """Check that `value` is a positive, finite number.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{op}: eps is {value!r}; a positive number is wanted")


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype that autocast gives an operator on x; None without autocast, and for float64, which is never cast."""
    return autocast_dtype_on(x.device.type, x.dtype) if isinstance(x, Tensor) else None


def autocast_dtype_on(device_type: str, dtype: torch.dtype) -> torch.dtype | None:
    """The same for a tensor of `dtype` on a device of `device_type`."""
    if dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@overload
def cast(dtype: torch.dtype, first: First, second: Second, /) -> tuple[First, Second]: ...
@overload
def cast(dtype: torch.dtype, *tensors: First) -> tuple[First, ...]: ...
def cast(dtype: torch.dtype, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in `dtype`; None, and those that have it already, are returned as they are."""
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def call(op: str, x: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None, **facts: Any) -> Call:
    """The `Call` that backends judge.

    Args:
        op: the operator.
        x: its first tensor.
        tensors: all that may need a gradient or be an obstacle to kernels.
        dtype: of x when the operator runs, if it is cast first.
        facts: the operator's own.
    """
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return Call(
        op, x.device.type, dtype or x.dtype, needs_grad, tuple(x.shape), tuple(facts.items()), obstacle(tensors)
    )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
