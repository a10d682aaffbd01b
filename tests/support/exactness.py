# SPDX-License-Identifier: Apache-2.0
"""The errors of an operator over random draws, compared with those of careful arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.cases import (
    Tensors,
    call,
    carefully,
    convert,
    device_of,
    differentiable,
    evaluate,
    make,
)

MOST = 1.3  # times the careful error


class Errors(NamedTuple):
    """One result or gradient of one draw, and what its error is measured with."""

    name: str
    ours: Tensor
    careful: Callable[[int], Tensor]  # samples by their seed
    truth: Tensor


def draws(operator: str, sizes: dict[str, Any], path: str, most: int = 24) -> Iterator[Errors]:
    def by(path: str) -> Callable[[Tensors], Tensor]:
        return lambda tensors: call(operator, tensors, settings, path)

    gradients = differentiable(operator, path)
    for seed in range(max(4, min(most, 20_000 // math.prod(sizes["shape"])))):
        tensors, settings = make(operator, sizes, seed)
        tensors = convert(tensors, torch.float32)
        ours = evaluate(by(path), convert(tensors, torch.float32, device=device_of(path)), gradients)
        exact = convert(tensors, torch.float64)
        truth = evaluate(by("oracle"), exact, gradients)
        careful = carefully(by("usual"), exact, gradients, torch.float32)
        for name, value in ours.items():
            yield Errors(name, value.cpu().double(), functools.partial(careful, name), truth[name])


def ratios(found: Iterable[Errors]) -> dict[str, float]:
    """Root mean square errors of each tensor, as multiples of the careful ones."""
    sums: dict[str, Tensor] = {}
    for name, ours, careful, truth in found:
        squares = torch.stack([(value - truth).square().sum() for value in (ours, careful(0))])
        sums[name] = sums[name] + squares if name in sums else squares
    return {name: (ours / careful).sqrt().item() if careful else ours.item() for name, (ours, careful) in sums.items()}
