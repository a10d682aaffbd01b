# SPDX-License-Identifier: Apache-2.0
"""One check for every refusal: what we would compute wrongly runs in its original form, before and after
`accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from support import models


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return models.output(model(x))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def block_classes(model: nn.Module) -> list[type]:
    return [type(block) for block in models.blocks(model)]


def assert_declined(
    library: str,
    change: Callable[[nn.Module], None],
    *words: str,
    runs: bool = True,
    differs: bool = True,
    **options,
) -> None:
    """`change` makes the first of three blocks compute something else. It is left alone, and the reason contains
    `words`.

    Args:
        library, options: of `models.build`.
        change: applied to the block; deterministic, since it is applied to several copies.
        words: all in the reason.
        runs: whether the changed model still runs in its own library.
        differs: whether it computes something else then.
    """
    change = torch.no_grad()(change)  # so that weights it computes can be deep-copied
    model = models.build(library, **options).double()
    x = models.images(1, 64, 64).double()
    changed = copy.deepcopy(model)
    change(models.blocks(changed)[0])

    before = copy.deepcopy(changed)
    untouched, blocks_untouched = classes(before), block_classes(before)
    with pytest.raises(ValueError, match="unchanged"):
        mvit_kernels.accelerate(before, strict=True)
    assert classes(before) == untouched
    assert mvit_kernels.accelerate(before) is before
    _assert_first_declined(before, words)
    assert sum(cls is not was for cls, was in zip(block_classes(before), blocks_untouched, strict=True)) == 2

    after = models.accelerated(model)
    evaluated(after, x)  # it has inspected its parts
    change(models.blocks(after)[0])
    _assert_first_declined(after, words)
    if runs:
        expected = evaluated(changed, x)
        assert differs is not torch.allclose(expected, evaluated(model, x), rtol=0, atol=1e-9)
        for candidate in (before, after, copy.deepcopy(after)):
            with models.fast_calls() as calls:
                models.assert_same(evaluated(candidate, x), expected)
            assert len(calls) == 2


def _assert_first_declined(model: nn.Module, words: tuple[str, ...]) -> None:
    report = mvit_kernels.report(model)
    first = report.blocks[0]
    assert [block.accelerated for block in report.blocks] == [False, True, True]
    assert report.declined == (first,)
    text = "; ".join(first.reasons)
    assert all(word in text for word in words), text
    line = str(report).splitlines()[1]
    assert first.name in line and "; ".join(first.reasons[:4]) in line


class LoRA(nn.Module):
    """A low-rank update next to a frozen linear layer, as PEFT wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        with torch.no_grad():
            for weight in (self.down.weight, self.up.weight):
                weight.copy_(torch.linspace(-0.3, 0.4, weight.numel()).view_as(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class LoRALinear(nn.Linear):
    """The same as a subclass of nn.Linear, as older adapters have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def replaced(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    """A change that puts ``make(module)`` in place of the module at `path`."""

    def change(block: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(block.get_submodule(owner), name, make(block.get_submodule(path)))

    return change


def as_class(cls: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """For `replaced`: the same module, but of class `cls`."""

    def make(module: nn.Module) -> nn.Module:
        module.__class__ = cls
        return module

    return make
