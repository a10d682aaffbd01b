# SPDX-License-Identifier: Apache-2.0
"""Arguments of raw operators as literals, for `gates.malformed`: specifications of a tensor, a network's program, its
weights, packed or as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

LARGE = 1 << 20  # elements, beyond which a tensor is not allocated but expanded from one
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128", "bool", "uint8", "int8", "int32")
DTYPES += ("int64", "float8_e4m3fn")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "overlapping", "offset", "negated", "meta", "sparse")
LAYOUTS += ("zero", "needs_grad")


class Spec:
    """The specification of an argument; its literal leaves out what has its default."""

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"
        )


@dataclass(frozen=True, repr=False)
class T(Spec):
    """A tensor of these sizes; `fill` replaces its values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    fill: float | None = None

    def make(self) -> torch.Tensor:
        dtype, numel = getattr(torch, self.dtype), 1
        for size in self.shape:
            numel *= size
        if self.layout == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        if self.layout == "zero":
            return torch._efficientzerotensor(self.shape, dtype=dtype)
        if numel == 0:  # sizes whose strides overflow are possible too
            return torch.empty(0, dtype=dtype).as_strided(self.shape, [0] * len(self.shape))
        if numel > LARGE or self.layout == "overlapping":
            return self._values(1).to(dtype).as_strided(self.shape, [0] * len(self.shape))
        t = self._values(numel).to(dtype).view(self.shape)
        if self.layout == "transposed":
            return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
        if self.layout == "strided":
            return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t
        if self.layout == "expanded":
            return t[:1].expand(self.shape) if t.dim() else t
        if self.layout == "offset":
            return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(self.shape)
        if self.layout == "negated":
            return torch._neg_view(t)
        if self.layout == "sparse":
            return t.to_sparse()
        return t.requires_grad_() if self.layout == "needs_grad" else t

    def _values(self, count: int) -> torch.Tensor:
        if self.fill is not None:
            return torch.full((count,), self.fill)
        return _NOISE[:count].clone() if self.dtype.startswith(("float", "bfloat")) else _NOISE[:count] * 50


_NOISE = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)) * 0.3


@dataclass(frozen=True, repr=False)
class Words(Spec):
    """The program of `network(base)`, or `stored(base)` if so asked, with some words replaced, reduced to those at
    `keep`, in that order."""

    base: str
    replaced: tuple[tuple[int, int], ...] = ()
    keep: tuple[int, ...] | None = None
    dtype: str = "int64"
    layout: str = "contiguous"
    stored: bool = False

    def steps_at(self) -> int:
        """Where the steps begin."""
        program, at = network_of(self).program, 4
        for _ in range(int(program[2])):
            at += 3 + int(program[at + 2]) if self.stored else 2
        return at

    def make(self) -> torch.Tensor:
        words = network_of(self).program.clone()
        for at, word in self.replaced:
            words[at] = word
        if self.keep is not None:
            words = words[list(self.keep)]
        return lay_out(words, self.dtype, self.layout)


@dataclass(frozen=True, repr=False)
class Weights(Spec):
    """The weights of `network(base)`, or `stored(base)` if so asked, all or the first `bytes_` of them."""

    base: str
    bytes_: int | None = None
    dtype: str = "uint8"
    layout: str = "contiguous"
    stored: bool = False

    def make(self) -> torch.Tensor:
        return lay_out(network_of(self).weights[: self.bytes_].clone(), self.dtype, self.layout)


def network_of(spec: Words | Weights) -> Any:
    return (stored if spec.stored else network)(spec.base)


def lay_out(values: torch.Tensor, dtype: str, layout: str) -> torch.Tensor:
    values = values.to(getattr(torch, dtype))
    if layout == "strided":
        return values.repeat_interleave(2)[::2]
    if layout == "offset":
        return torch.cat((values[:1], values))[1:]
    if layout == "two axes":
        return values[None]
    return values.to("meta") if layout == "meta" else values


class Call(NamedTuple):
    """``mvit_kernels::<operator>.<backend>`` and its arguments, with tensors as their specifications."""

    operator: str
    backend: str
    arguments: tuple[Any, ...]

    def make(self) -> tuple[Any, ...]:
        return tuple(
            [t if t is None else t.make() for t in a]
            if isinstance(a, list) and a and hasattr(a[0], "make")
            else _made(a)
            for a in self.arguments
        )

    def __call__(self) -> Any:
        return getattr(getattr(torch.ops.mvit_kernels, self.operator), self.backend)(*self.make())


def _made(argument: Any) -> Any:
    return argument.make() if hasattr(argument, "make") else argument


def network(base: str) -> Any:
    """A small frozen chain's native call: "chain" in float32, "half" in bfloat16 (in pairs where there are such)."""
    if base not in _networks:
        from mvit_kernels.freezing.network import Network

        _networks[base] = Network(_module(base))
    return _networks[base]


def stored(base: str) -> Any:
    """The same, for any processor: what is packed."""
    if base not in _stored:
        from mvit_kernels.freezing.program import build

        _stored[base] = build(_module(base), torch.bfloat16 if base == "half" else torch.float32).stored()
    return _stored[base]


def _module(base: str) -> Any:
    from support.networks import chain

    module, _ = chain()
    return module.bfloat16() if base == "half" else module


_networks: dict[str, Any] = {}
_stored: dict[str, Any] = {}
