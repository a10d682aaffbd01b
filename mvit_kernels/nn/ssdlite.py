# SPDX-License-Identifier: Apache-2.0
"""SSDLite on MobileViT: the object detector of the paper's section 4.2.1 (with MobileNetV2's separable heads)."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from . import multibox
from .backbone import task_backbone
from .layers import ConvNormAct
from .multibox import SSDOutput

__all__ = ["MobileViTSSDLite", "SSDHead", "SSDOutput"]

_HEAD_CHANNELS = (512, 256, 256, 128, 128, 64)  # of the six maps, as their heads read them
_STAGES = (3, 4)  # of the backbone, whose maps have a head
_CODE = 4  # values that say where a box is


class SSDHead(nn.Module):
    """One map's predictions: for each pixel and anchor four offsets and K logits, by one convolution.

    Example:
        >>> logits, offsets = SSDHead(128, 512, anchors=6, num_classes=81)(torch.rand(1, 128, 20, 20))
        >>> logits.shape, offsets.shape
        (torch.Size([1, 2400, 81]), torch.Size([1, 2400, 4]))

    A 1x1 convolution with batch norm and ReLU to `channels`, if the map has another number of channels; a depthwise 3x3
    convolution with batch norm, without activation; a 1x1 convolution with bias to `anchors * (4 + num_classes)`
    channels. A head of a pooled map is the last convolution alone.

    Args:
        in_channels: of the map.
        channels: that the predictions are made from.
        anchors: of each pixel.
        num_classes: K, with the background.
        pooled: the map has one pixel.

    Shapes: `(B, in_channels, H, W)` to `SSDOutput` of `(B, H * W * anchors, K)` and `(B, H * W * anchors, 4)`.
    """

    def __init__(
        self, in_channels: int, channels: int, *, anchors: int, num_classes: int, pooled: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if in_channels != channels and not pooled:
            layers["project"] = ConvNormAct(in_channels, channels, activation="relu")
            in_channels = channels
        if not pooled:
            layers["depthwise"] = ConvNormAct(in_channels, in_channels, 3, groups=in_channels, activation=None)
        layers["predict"] = nn.Conv2d(in_channels, anchors * (_CODE + num_classes), 1)
        self.layers = nn.Sequential(layers)  # in one call: frozen ones are one native call

    def forward(self, x: Tensor) -> SSDOutput:
        values = self.layers(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, _CODE + self.num_classes)
        return SSDOutput(values[..., _CODE:], values[..., :_CODE])


class MobileViTSSDLite(nn.Module):
    """The paper's object detector: MobileViT, four more layers that halve the map, and a head on each of six maps.

    Example:
        >>> model = MobileViTSSDLite("xxs", num_classes=21)  # 20 classes and the background
        >>> load_checkpoint(model.backbone, "mobilevit_xxs.pth")  # a classifier's weights, to start from
        >>> output = model(images)  # (B, 3, 320, 320)
        >>> loss = model.loss(output, targets, (320, 320))["loss"]
        >>> found = model.detect(output, (320, 320), score=0.5)  # boxes, scores and labels of each image

    Maps of stride 16 and 32 come from the backbone, those of stride 64, 128 and 256 from depthwise separable 3x3
    convolutions of stride 2, and the last is the mean of the one before. Each pixel has six anchors, that of the last
    map four: 3232 at 320 x 320 pixels. Parameters with COCO's 81 classes: 1,755,050 (xxs), 2,742,042 (xs), 5,738,826
    (s).

    Args:
        mode: "xxs", "xs" or "s".
        num_classes: K, with the background, which is class 0: one more than there are kinds of objects.
        in_channels: channels of the images.
        output_stride: of the backbone's last map: 32, or 8 or 16 for finer maps, dilated instead of strided as in
            cvnets. The other maps follow: at 16 their strides are 16, 16, 32, 64 and 128, at 8 they are 8, 8, 16, 32
            and 64.
        dropout: in training, dropout in every transformer layer, as in `MobileViT`.
        device, dtype: device and dtype of the parameters.

    Shapes: `(B, in_channels, H, W)` with any H, W >= 32 to `SSDOutput`: logits `(B, A, K)` and offsets `(B, A, 4)`.
    Images and dtypes as for `MobileViT`. torchvision is needed for `anchors`, `loss` and `detect`, not for the network.
    In training a batch of one image must be larger than 256 x 256 pixels (8 times the output stride in general), or the
    batch norm of the fifth map would have a single value a channel.

    Initialization is `MobileViT`'s, and for everything after it, as published, Xavier uniform with biases 0.

    Attributes:
        mode: as given.
        num_classes: as given.
        backbone: a `MobileViT` that ends with stage 5.
        extra: the four layers after it.
        heads: six of them, each an `SSDHead`.

    Raises:
        ValueError: `num_classes` below 2; otherwise as `MobileViT`, also when called.
        TypeError: as `MobileViT`.

    MobileViT paper, sections 4.2.1 and B; Sandler et al. 2018, arXiv:1801.04381, section 6.2; Liu et al. 2016,
    arXiv:1512.02325.
    """

    def __init__(
        self,
        mode: str = "s",
        num_classes: int = 81,
        *,
        in_channels: int = 3,
        output_stride: int = 32,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
            raise ValueError(
                f"MobileViTSSDLite: num_classes={num_classes!r}; give an integer of 2 or more: the background and the "
                "objects' classes"
            )
        self.mode = mode
        self.num_classes = num_classes
        self.backbone = task_backbone(
            mode, in_channels=in_channels, output_stride=output_stride, dropout=dropout, device=device, dtype=dtype
        )
        sources = [self.backbone.feature_info[stage] for stage in _STAGES]
        self._strides = (
            *(source["reduction"] for source in sources),
            *(output_stride * 2**step for step in (1, 2, 3)),
        )
        widths = (*(source["num_chs"] for source in sources), *_HEAD_CHANNELS[2:])
        with contextlib.nullcontext() if device is None else torch.device(device):
            self.extra = nn.ModuleList(map(_halving, widths[1:4], widths[2:5]))
            self.extra.append(_pooling(*widths[4:]))
            self.heads = nn.ModuleList(
                SSDHead(width, channels, anchors=anchors, num_classes=num_classes, pooled=index == len(widths) - 1)
                for index, (width, channels, anchors) in enumerate(
                    zip(widths, _HEAD_CHANNELS, multibox.anchors_per_cell(), strict=True)
                )
            )
        for part in (self.extra, self.heads):
            part.apply(_initialise).to(dtype=dtype)

    def forward(self, x: Tensor) -> SSDOutput:
        """Images to logits and offsets of all anchors; see the class for shapes and errors."""
        maps = self.backbone.feature_maps(x, _STAGES)
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        outputs = [head(each) for head, each in zip(self.heads, maps, strict=True)]
        return SSDOutput(*(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)))

    def anchors(self, height: int, width: int) -> Tensor:
        """The anchors of images of this size, in the order of the outputs.

        Example:
            >>> MobileViTSSDLite("xxs").anchors(320, 320).shape
            torch.Size([3232, 4])

        Returns:
            `(A, 4)`, x1, y1, x2, y2 in pixels, float32, on the model's device. The boxes at the border reach beyond it,
            as published.

        Raises:
            ValueError: `height` or `width` is not an integer of 32 or more.
            ImportError: torchvision is not installed.
        """
        device = next(iter((*self.parameters(), *self.buffers()))).device
        return self._anchors((height, width), device, torch.float32, "anchors").clone()

    def loss(self, output: SSDOutput, targets: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> dict[str, Tensor]:
        """The multibox loss; `multibox.multibox_loss` describes it.

        Example:
            >>> target = {"boxes": torch.tensor([[40.0, 60.0, 200.0, 240.0]]), "labels": torch.tensor([3])}
            >>> model.loss(model(images), [target] * len(images), (320, 320))["loss"].backward()

        Args:
            output: of this model for B images.
            targets: for each image a dict of `boxes`, (n, 4), x1, y1, x2, y2 in pixels of the network's input, and
                `labels`, (n,), 1 to K - 1. n may be 0.
            size: (height, width) of the network's input.

        Returns:
            `loss`, and its terms `classification` and `localization`: scalars in float32, or float64 for float64.

        Raises:
            ValueError: a size that does not fit the output; targets that `multibox.multibox_loss` refuses.
            TypeError: as `multibox.multibox_loss`.
            ImportError: torchvision is not installed.
        """
        dtype = torch.float64 if output[0].dtype == torch.float64 else torch.float32
        anchors = self._anchors_of(output, size, dtype, "loss")
        return multibox.multibox_loss(output, targets, anchors, where="MobileViTSSDLite.loss")

    def detect(
        self,
        output: SSDOutput,
        size: tuple[int, int],
        *,
        score: float = 0.01,
        iou: float = 0.5,
        top: int = 400,
        most: int = 200,
    ) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image; `multibox.detections` describes them.

        Example:
            >>> with torch.inference_mode():
            ...     found = model.eval().detect(model(images), (320, 320), score=0.5)
            >>> found[0]["boxes"].shape, found[0]["scores"].shape, found[0]["labels"].shape
            (torch.Size([2, 4]), torch.Size([2]), torch.Size([2]))

        Args:
            output: of this model for B images.
            size: (height, width) of the network's input.
            score, iou, top, most: least score, largest overlap within a class, most boxes of a class before, and of an
                image after suppression. The defaults are the published ones, for computing mAP.

        Returns:
            For each image a dict of `boxes`, (n, 4), x1, y1, x2, y2 in pixels of the network's input, float32;
            `scores`, (n,), falling; `labels`, (n,), 1 to K - 1.

        Raises:
            ValueError: a size that does not fit the output; a threshold or a count out of range.
            ImportError: torchvision is not installed.
        """
        anchors = self._anchors_of(output, size, torch.float32, "detect")
        where, (height, width) = "MobileViTSSDLite.detect", size
        return multibox.detections(
            SSDOutput(*output), anchors, (height, width), where=where, score=score, iou=iou, top=top, most=most
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing of the backbone, as in `MobileViT`; the layers after it keep too little."""
        self.backbone.set_grad_checkpointing(enable)

    def _anchors(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype, where: str) -> Tensor:
        height, width = size
        for name, value in {"height": height, "width": width}.items():
            if not isinstance(value, Integral) or value < 32:
                raise ValueError(f"MobileViTSSDLite.{where}: {name}={value!r}; an integer of 32 or more is wanted")
        maps = [(-(-height // stride), -(-width // stride)) for stride in self._strides] + [(1, 1)]
        return multibox.default_boxes(maps, (int(height), int(width)), device, dtype)

    def _anchors_of(self, output: SSDOutput, size: tuple[int, int], dtype: torch.dtype, where: str) -> Tensor:
        """The anchors of `output`, which is checked to be this model's for images of this size."""
        logits, offsets = output
        batch, count = logits.shape[:2]
        if logits.shape != (batch, count, self.num_classes) or offsets.shape != (batch, count, _CODE):
            raise ValueError(
                f"MobileViTSSDLite.{where}: output has logits of {tuple(logits.shape)} and offsets of "
                f"{tuple(offsets.shape)}; (B, A, {self.num_classes}) and (B, A, {_CODE}) are wanted, as forward gives"
            )
        anchors = self._anchors(size, logits.device, dtype, where)
        if len(anchors) != count:
            raise ValueError(
                f"MobileViTSSDLite.{where}: the output is of {count} anchors, and size={tuple(size)} has "
                f"{len(anchors)}; give the (height, width) of the images that the network was called with"
            )
        return anchors


def _halving(in_channels: int, channels: int) -> nn.Sequential:
    """A depthwise separable convolution of stride 2; as published, the depthwise half has no activation."""
    depthwise = ConvNormAct(in_channels, in_channels, 3, stride=2, groups=in_channels, activation=None)
    pointwise = ConvNormAct(in_channels, channels, activation="relu")
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def _pooling(in_channels: int, channels: int) -> nn.Sequential:
    """The mean of the map, and a 1x1 convolution with ReLU; as published, it has neither norm nor bias."""
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), conv=conv, act=nn.ReLU()))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
