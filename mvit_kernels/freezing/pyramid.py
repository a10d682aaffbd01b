# SPDX-License-Identifier: Apache-2.0
"""The frozen ASPP, DeepLabv3's pyramid (arXiv:1706.05587, section 3.3): `freeze` puts it in place of any library's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._utils.plain import does_nothing, is_global_mean, is_own
from .convolutions import FURTHER, UNFOLDED, replace
from .folding import hooked
from .frozen import Frozen
from .modules import FrozenConv2d
from .program import Builder, Place


class _Branches(Frozen, nn.ModuleList):
    """A list whose changes are seen, as those of every frozen module."""


class FrozenASPP(Frozen):
    """Convolutions of one map side by side, beside one of its mean, concatenated and projected, for inference.

    In a native call the branches write side by side into one map, so that the concatenation costs nothing.

    Args:
        branches: convolutions of the map that preserve its size.
        pool: a 1×1 convolution of its mean; the result is the same at every position.
        project: a convolution of the concatenated maps, `pool`'s last.
    """

    def __init__(self, branches: Sequence[FrozenConv2d], pool: FrozenConv2d, project: FrozenConv2d) -> None:
        super().__init__()
        self.branches, self.pool, self.project = _Branches(branches), pool, project

    @property
    def in_channels(self) -> int:
        return self.pool.in_channels

    def place(self, builder: Builder) -> Place:
        return builder.value(self.in_channels, max(branch.border for branch in self.branches))

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        widths = [branch.out_channels for branch in (*self.branches, self.pool)]
        *parts, last = builder.side_by_side(*widths, border=self.project.border)
        for branch, part in zip(self.branches, parts, strict=True):
            branch.emit(builder, source, part)
        pooled = self.pool.emit(builder, builder.mean(source), None)
        builder.resize(pooled, source, last)
        return self.project.emit(builder, builder.whole(last), target)

    def composed(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True))
        views = [branch(x) for branch in self.branches]
        views.append(pooled.expand(-1, -1, *x.shape[2:]))  # what bilinear resizing of one pixel gives
        return self.project(torch.cat(views, dim=1))


def freeze_pyramids(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Replace every library's ASPP of frozen convolutions by a `FrozenASPP`; yields as `freeze_convolutions` does."""
    for name, module in list(model.named_modules()):
        if is_own(module, "mvit_kernels", "ASPP"):
            branches, pool, inside = list(module.branches), module.pool, {module.branches}
        elif is_own(module, "transformers", "MobileViTASPP"):
            *branches, pooling = module.convs
            pool = getattr(pooling, "conv_1x1", None)
            inside = {module.convs, pooling, getattr(pooling, "global_pool", None)}
            if not is_own(pooling, "transformers", "MobileViTASPPPooling") or not is_global_mean(pooling.global_pool):
                yield name, f"its last branch is a {type(pooling).__name__}"
                continue
        else:
            continue
        units = [*branches, pool, module.project]
        reason = _reason(module, units, inside)
        if reason is None:
            replace(model, module, FrozenASPP(branches, pool, module.project))
        yield name, reason


def _reason(module: nn.Module, units: list[nn.Module], inside: set[nn.Module]) -> str | None:
    """Why `module` may compute something else than its `units` in a `FrozenASPP`; None if it does not."""
    if not all(isinstance(unit, FrozenConv2d) for unit in units):
        return UNFOLDED
    others = [part for part in module.modules() if part is not module and part not in units]
    if not all(part in inside or does_nothing(part) for part in others):
        return FURTHER
    return hooked(*others)
