# SPDX-License-Identifier: Apache-2.0
"""A stand-in for cvnets' single-shot detector on MobileViT: its module tree, keys and settings as published, rewritten.

The settings are those of its configuration for COCO: ReLU in everything after the encoder, no bias in a convolution
unless it is asked for (the last extra layer has none), a depthwise unit that always has a norm and never an activation.
Anchors and boxes are in its units: centre and size, relative to the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from support import cvnets

OUTPUT_STRIDES = (16, 32, 64, 128, 256, -1)
PROJECTIONS = (512, 256, 256, 128, 128, 64)
ASPECT_RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))
SCALES = [0.1 + 0.95 * index / 6 for index in range(7)]


def conv_layer(inp: int, out: int, kernel: int, stride=1, groups=1, *, bias=False, norm=True, act=True) -> nn.Module:
    layer = cvnets.ConvLayer2d(inp, out, kernel, stride, groups, norm=norm, act=False)
    if bias:
        layer.block.conv.bias = nn.Parameter(torch.zeros(out))
    if act:
        layer.block.add_module("act", nn.ReLU())
    return layer


@cvnets._in_package("cvnets.layers.conv_layer")
class SeparableConv2d(nn.Module):
    def __init__(self, inp: int, out: int, stride: int = 1, *, bias=False, norm=True, act=True) -> None:
        super().__init__()
        self.dw_conv = conv_layer(inp, inp, 3, stride, inp, act=False)
        self.pw_conv = conv_layer(inp, out, 1, bias=bias, norm=norm, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw_conv(self.dw_conv(x))


@cvnets._in_package("cvnets.modules.ssd_heads")
class SSDHead(nn.Module):
    def __init__(self, inp: int, anchors: int, classes: int, projection: int, kernel: int) -> None:
        super().__init__()
        self.proj_layer = None
        if kernel > 1 and projection != inp:
            self.proj_layer = conv_layer(inp, projection, 1)
            inp = projection
        out, bare = anchors * (4 + classes), {"bias": True, "norm": False, "act": False}
        self.loc_cls_layer = SeparableConv2d(inp, out, **bare) if kernel > 1 else conv_layer(inp, out, 1, **bare)
        self.classes = classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.proj_layer is not None:
            x = self.proj_layer(x)
        predictions = self.loc_cls_layer(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4 + self.classes))
        return predictions.split([4, self.classes], dim=-1)


@cvnets._in_package("cvnets.models.detection.ssd")
class SingleShotMaskDetector(nn.Module):
    """`forward` gives scores (logits), boxes (offsets) and the anchors, (A, 4): cx, cy, w, h."""

    def __init__(self, variant: str, classes: int = 81, **options) -> None:
        super().__init__()
        self.encoder = cvnets.MobileViT(variant, **options)
        self.encoder.classifier = self.encoder.conv_1x1_exp = None
        channels = list(cvnets.VARIANTS[variant][0][3:])
        self.extra_layers = nn.ModuleDict()
        for stride, out in zip(OUTPUT_STRIDES[2:], PROJECTIONS[2:], strict=True):
            layer = (
                nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_layer(channels[-1], out, 1, norm=False))
                if stride == -1
                else SeparableConv2d(channels[-1], out, 2)
            )
            self.extra_layers[f"os_{stride}"] = layer
            channels.append(out)
        self.ssd_heads = nn.ModuleList(
            SSDHead(inp, 2 + 2 * len(ratios), classes, projection, 1 if stride == -1 else 3)
            for inp, ratios, projection, stride in zip(
                channels, ASPECT_RATIOS, PROJECTIONS, OUTPUT_STRIDES, strict=True
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoder = self.encoder
        for layer in (encoder.conv_1, encoder.layer_1, encoder.layer_2, encoder.layer_3):
            x = layer(x)
        maps = [encoder.layer_4(x)]
        maps.append(encoder.layer_5(maps[0]))
        for layer in self.extra_layers.values():
            maps.append(layer(maps[-1]))
        locations, confidences = zip(
            *(head(each) for head, each in zip(self.ssd_heads, maps, strict=True)), strict=True
        )
        anchors = [anchors_of(*each.shape[2:], index) for index, each in enumerate(maps)]
        return torch.cat(confidences, 1), torch.cat(locations, 1), torch.cat(anchors)


def anchors_of(height: int, width: int, index: int) -> Tensor:
    """The anchors of map `index`, (n, 4) in float64: cx, cy, w, h relative to the image, sizes cut to 1."""
    small, large = SCALES[index], math.sqrt(SCALES[index] * SCALES[index + 1])
    shapes = [(small, small), (large, large)]
    for ratio in ASPECT_RATIOS[index]:
        root = math.sqrt(ratio)
        shapes += [(small * root, small / root), (small / root, small * root)]
    rows = [
        ((x + 0.5) / width, (y + 0.5) / height, min(w, 1.0), min(h, 1.0))
        for y in range(height)
        for x in range(width)
        for w, h in shapes
    ]
    return torch.tensor(rows, dtype=torch.float64)


def decoded(offsets: Tensor, anchors: Tensor) -> Tensor:
    """(n, 4) offsets to boxes x1, y1, x2, y2 relative to the image; variances 0.1 and 0.2."""
    centre = anchors[:, :2] + 0.1 * offsets[:, :2] * anchors[:, 2:]
    half = anchors[:, 2:] * torch.exp(0.2 * offsets[:, 2:]) / 2
    return torch.cat((centre - half, centre + half), dim=1)
