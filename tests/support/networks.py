# SPDX-License-Identifier: Apache-2.0
"""Frozen layers with random weights, chains of them, and the two ways to call these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels import TransformerLayerWeights
from mvit_kernels.freezing import network, whole
from mvit_kernels.freezing.block import FrozenMobileViTBlock
from mvit_kernels.freezing.frozen import Frozen
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenInvertedResidual, FrozenSequential
from mvit_kernels.freezing.pyramid import FrozenASPP


class Draw:
    """Frozen layers with random weights that keep the variance."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def conv(
        self, inp: int, out: int, kernel: int = 1, *, stride=1, dilation=1, groups=1, act: bool | str = True
    ) -> FrozenConv2d:
        weight = self(out, inp // groups, kernel, kernel, std=(2 / (inp // groups * kernel * kernel)) ** 0.5)
        return FrozenConv2d(
            weight,
            self(out, std=0.3),
            stride=(stride, stride),
            padding=(dilation * (kernel // 2),) * 2,
            dilation=(dilation, dilation),
            groups=groups,
            activation=act if isinstance(act, str) else "silu" if act else None,
        )

    def inverted(self, inp: int, hidden: int, out: int, *, stride=1, dilation=1) -> FrozenInvertedResidual:
        depthwise = self.conv(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        residual = stride == 1 and inp == out
        return FrozenInvertedResidual(self.conv(inp, hidden), depthwise, self.conv(hidden, out, act=False), residual)

    def depthwise(self, width: int, *, stride=1, dilation=1, act: bool | str = False) -> FrozenConv2d:
        return self.conv(width, width, 3, stride=stride, dilation=dilation, groups=width, act=act)

    def pyramid(self, inp: int, width: int, out: int, rates=(2, 3, 5)) -> FrozenASPP:
        dilated = [self.conv(inp, width, 3, dilation=rate, act="relu") for rate in rates]
        branches = [self.conv(inp, width, act="relu"), *dilated]
        joint = width * (len(branches) + 1)
        return FrozenASPP(branches, self.conv(inp, width, act="relu"), self.conv(joint, out, act="relu"))

    def block(
        self, inp: int, d: int, *, heads=4, head_dim=None, hidden=None, layers=2, patch=(2, 2), fusion=True,
        input_first=True, final_norm=True, qkv_bias=True, dilation=1,
    ) -> FrozenMobileViTBlock:  # fmt: skip
        inner, hidden = heads * (head_dim or d // heads), hidden or 2 * d

        def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
            return self(out, width, std=width**-0.5), self(out, std=0.1)

        def norm() -> tuple[Tensor, Tensor]:
            return 1 + self(d, std=0.1), self(d, std=0.1)

        weights = []
        for _ in range(layers):
            qkv = linear(3 * inner, d)
            parts = (*norm(), qkv[0], qkv[1] if qkv_bias else None, *linear(d, inner), *norm())
            weights.append(TransformerLayerWeights(*parts, *linear(hidden, d), *linear(d, hidden)))
        return FrozenMobileViTBlock(
            downsampling=None,
            before=(self.conv(inp, inp, 3, dilation=dilation), self.conv(inp, d, act=False)),
            layers=weights,
            final_norm=norm() if final_norm else None,
            after=(self.conv(d, inp),),
            fusion=self.conv(2 * inp, inp, 3) if fusion else None,
            input_first=input_first,
            num_heads=heads,
            patch_size=patch,
            eps=1e-5,
        )


def native(module: Frozen, x: Tensor) -> Tensor:
    """The module's result, which must come from one native call."""
    with torch.inference_mode():
        y = module(x)
    assert isinstance(module.native(), network.Network), module.native()
    assert module._network.plan(x) is not None
    return y


def called(model: nn.Module) -> list[nn.Module]:
    """The frozen modules of a model that are native calls; of a network in one call, that, and the
    classifier, of which it has a copy."""
    call = vars(model).get(whole._CALL)
    candidates = [*model.modules(), *([] if call is None else [call.whole.links])]
    found = [part for part in candidates if isinstance(vars(part).get("_network"), network.Network)]
    return found if call is None or call.chain.classifier is None else [*found, call.chain.classifier]


def composed(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), mvit_kernels.use_backend("reference"):
        return module(x)


def chain(seed: int = 0) -> tuple[FrozenSequential, Draw]:
    draw = Draw(seed)
    links = (
        draw.conv(3, 16, 3, stride=2),
        draw.inverted(16, 32, 24, stride=2),
        draw.inverted(24, 48, 24),
        draw.block(24, 36),
        draw.inverted(24, 64, 32, stride=2),
        draw.block(32, 48, patch=(2, 1)),
        draw.conv(32, 64),
        draw.depthwise(64, act="relu"),
        draw.pyramid(64, 16, 64),
    )
    return FrozenSequential(*links), draw
