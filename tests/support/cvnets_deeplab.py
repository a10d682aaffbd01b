# SPDX-License-Identifier: Apache-2.0
"""A stand-in for cvnets' DeepLabv3 on MobileViT, as `support.cvnets` is one for its classifier.

From 0.1: the head's activation is ReLU, the classifier stands between a dropout and a resizing by the output stride,
so that the result has the image's size. Newer versions have the classifier alone, under a shorter name, and resize
outside of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cvnets import ConvLayer, Dropout, MobileViT, PlainLayerNorm, _in_package

CHANNELS = 256
RATES = (6, 12, 18)


def _unit(inp: int, out: int, kernel: int = 1, dilation: int = 1) -> ConvLayer:
    unit = ConvLayer(inp, out, kernel)
    unit.block.act = nn.ReLU()
    return _dilated(unit, dilation)


def _dilated(unit: ConvLayer, dilation: int) -> ConvLayer:
    conv = unit.block.conv
    conv.stride, conv.dilation = (1, 1), (dilation, dilation)
    conv.padding = tuple(dilation * (side // 2) for side in conv.kernel_size)
    return unit


@_in_package("cvnets.modules.aspp_block")
class ASPPPooling(nn.Module):
    def __init__(self, inp: int) -> None:
        super().__init__()
        self.aspp_pool = nn.Sequential()
        self.aspp_pool.add_module("global_pool", nn.AdaptiveAvgPool2d(1))
        self.aspp_pool.add_module("conv_1x1", _unit(inp, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.aspp_pool(x), x.shape[2:], mode="bilinear", align_corners=False)


@_in_package("cvnets.modules.aspp_block")
class ASPP(nn.Module):
    def __init__(self, inp: int) -> None:
        super().__init__()
        dilated = [_unit(inp, CHANNELS, 3, rate) for rate in RATES]
        self.convs = nn.ModuleList([_unit(inp, CHANNELS), *dilated, ASPPPooling(inp)])
        self.project = _unit(5 * CHANNELS, CHANNELS)
        self.dropout = Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.project(torch.cat([conv(x) for conv in self.convs], 1)))


@_in_package("cvnets.models.segmentation.heads.deeplabv3")
class DeeplabV3(nn.Module):
    def __init__(self, inp: int, num_classes: int, output_stride: int, newer: bool) -> None:
        super().__init__()
        self.aspp = nn.Sequential()
        self.aspp.add_module("aspp_layer", ASPP(inp))
        classifier = ConvLayer(CHANNELS, num_classes, 1, norm=False, act=False)
        classifier.block.conv = nn.Conv2d(CHANNELS, num_classes, 1)  # with a bias
        if newer:
            self.classifier = classifier
        else:
            self.classifier = nn.Sequential()
            self.classifier.add_module("classifier_dropout", nn.Dropout2d(0.1))
            self.classifier.add_module("classifier", classifier)
            resize = nn.Upsample(scale_factor=output_stride, mode="bilinear", align_corners=False)
            self.classifier.add_module(f"up_{output_stride}", resize)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.aspp(x))


@_in_package("cvnets.models.segmentation.enc_dec")
class SegEncoderDecoder(nn.Module):
    """Images to logits of their size, or with `newer` to logits at the output stride."""

    def __init__(self, variant: str, num_classes: int = 21, output_stride: int = 16, newer: bool = False) -> None:
        super().__init__()
        self.encoder = MobileViT(variant, norm=PlainLayerNorm, unit=ConvLayer)
        inp = self.encoder.conv_1x1_exp.block.conv.in_channels
        self.encoder.conv_1x1_exp = self.encoder.classifier = None
        # A layer that does not halve the map passes its dilation on to what follows, and keeps the one it was given.
        for layer, dilation in {32: (), 16: ((5, 1),), 8: ((4, 1), (5, 2))}[output_stride]:
            _dilated(getattr(self.encoder, f"layer_{layer}")[0].block.conv_3x3, dilation)
        self.seg_head = DeeplabV3(inp, num_classes, output_stride, newer)

    def forward(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        for layer in (encoder.conv_1, encoder.layer_1, encoder.layer_2, encoder.layer_3, encoder.layer_4):
            x = layer(x)
        return self.seg_head(encoder.layer_5(x))
