# SPDX-License-Identifier: Apache-2.0
"""MobileViT's convolutional layers (conv + batch norm + SiLU, MobileNetV2's inverted residual) and stochastic depth."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ConvNormAct", "DropPath", "InvertedResidual", "make_divisible"]


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round `value` to the nearest multiple of `divisor`, but not below 90 % of `value` (MobileNetV2's rule).

    Example:
        >>> make_divisible(16 * 2.0), make_divisible(27)
        (32, 32)
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, None: nn.Identity}


class ConvNormAct(nn.Module):
    """A bias-free convolution that preserves the map's size at stride 1, then batch norm, then an activation.

    Example:
        >>> ConvNormAct(3, 16, kernel_size=3, stride=2)(torch.rand(1, 3, 256, 256)).shape
        torch.Size([1, 16, 128, 128])

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size: odd; the map is padded by `dilation * (kernel_size - 1) // 2`.
        stride, dilation, groups: as in `torch.nn.Conv2d`.
        activation: "silu", "relu" (in the heads of detection and segmentation), or None.

    Shapes: `(B, in_channels, H, W)` to `(B, out_channels, ceil(H / stride), ceil(W / stride))`, in the parameters'
    floating dtype.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch with probability `drop_prob`, and scale it up otherwise.

    Example:
        >>> DropPath(0.1)(torch.rand(8, 256, 64)).shape
        torch.Size([8, 256, 64])

    There is one draw for each entry of the first axis: an image, or in a transformer a sequence. A branch that is kept
    is divided by `1 - drop_prob`, which preserves the mean. In evaluation mode it is the identity.

    Args:
        drop_prob: probability, 0 to 1.

    Raises:
        ValueError: `drop_prob` is outside [0, 1].

    Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"DropPath: drop_prob={drop_prob} is not a probability; give 0 <= drop_prob <= 1")
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0.0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class InvertedResidual(nn.Module):
    """MobileNetV2's inverted residual: expand 1x1, depthwise 3x3, project 1x1; the input is added if shapes allow it.

    Example:
        >>> InvertedResidual(16, 24, stride=2, expand_ratio=2)(torch.rand(1, 16, 128, 128)).shape
        torch.Size([1, 24, 64, 64])

    Every convolution is followed by batch norm, the first two also by SiLU. The hidden width is
    `make_divisible(in_channels * expand_ratio)`. `self.residual` tells whether the input is added: at stride 1, with
    as many output as input channels.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride, dilation: of the depthwise convolution.
        expand_ratio: hidden width relative to `in_channels`.
        drop_path: if the input is added, the probability of dropping the branch in training (`DropPath`).

    Shapes: `(B, in_channels, H, W)` to `(B, out_channels, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: `drop_path` is outside [0, 1] and the input is added.

    MobileViT paper, section 3 and table 4; Sandler et al. 2018.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: float = 4.0,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = make_divisible(in_channels * expand_ratio)
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvNormAct(in_channels, hidden)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.project = ConvNormAct(hidden, out_channels, activation=None)
        self.drop_path = DropPath(drop_path if self.residual else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + self.drop_path(y) if self.residual else y
