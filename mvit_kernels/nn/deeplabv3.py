# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3 on MobileViT, for semantic segmentation (paper section 4.2 and appendix E; arXiv:1706.05587)."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from .backbone import task_backbone
from .layers import ConvNormAct

__all__ = ["ASPP", "MobileViTDeepLabV3"]

_RATES = (6, 12, 18)  # dilations of the pyramid's 3x3 convolutions, at any output stride
_CHANNELS = 256  # of each of its branches, and of its result


class ASPP(nn.Module):
    """DeepLabv3's pyramid (atrous spatial pyramid pooling): five views of a map, side by side, projected to one.

    Example:
        >>> ASPP(160)(torch.rand(2, 160, 32, 32)).shape
        torch.Size([2, 256, 32, 32])

    `branches` are a 1x1 convolution and three 3x3 convolutions dilated by 6, 12 and 18; `pool` is a 1x1 convolution of
    the map's mean, whose result is the same at every position; `project` maps the 5 x 256 channels to 256, 1x1. Each is
    followed by batch norm and ReLU, and `project` by `dropout`.

    Args:
        in_channels: channels of the map.
        dropout: in training, the probability of dropping an element of the result.

    Shapes: `(B, in_channels, H, W)` to `(B, 256, H, W)`, any H, W >= 1.

    Raises:
        ValueError: when called in training with one image: `pool` has one value a channel, of which batch norm cannot
            take a variance. It can with two images, with `pool.norm.eval()`, or as SyncBatchNorm of several processes.
    """

    def __init__(self, in_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvNormAct(in_channels, _CHANNELS, activation="relu")])
        for rate in _RATES:
            self.branches.append(ConvNormAct(in_channels, _CHANNELS, 3, dilation=rate, activation="relu"))
        self.pool = ConvNormAct(in_channels, _CHANNELS, activation="relu")
        self.project = ConvNormAct(5 * _CHANNELS, _CHANNELS, activation="relu")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._check_count(x)
        pooled = self.pool(x.mean((2, 3), keepdim=True))
        views = [branch(x) for branch in self.branches]
        views.append(pooled.expand(-1, -1, x.shape[2], x.shape[3]))  # what bilinear resizing of one pixel gives
        return self.dropout(self.project(torch.cat(views, dim=1)))

    def _check_count(self, x: torch.Tensor) -> None:
        norm = self.pool.norm
        if x.shape[0] == 1 and norm.training and isinstance(norm, nn.BatchNorm2d):
            raise ValueError(
                "MobileViTDeepLabV3: one image in training gives the batch norm of the pooled branch one value a "
                "channel; give two images or more (a DataLoader's last batch: drop_last=True), or let that norm keep "
                "its running statistics with model.aspp.pool.norm.eval() after each model.train()"
            )


class MobileViTDeepLabV3(nn.Module):
    """MobileViT with DeepLabv3's head, for semantic segmentation.

    Example:
        >>> model = MobileViTDeepLabV3("s", num_classes=21)
        >>> model(torch.rand(2, 3, 512, 512)).shape  # logits at the output stride
        torch.Size([2, 21, 32, 32])
        >>> images, masks = torch.rand(2, 3, 512, 512), torch.randint(21, (2, 512, 512))
        >>> model.loss(model(images), masks)["loss"].backward()
        >>> model.segment(model(images), size=(480, 640)).shape  # class indices
        torch.Size([2, 480, 640])

    The network is the published one (paper, cvnets 0.1, Hugging Face's `MobileViTForSemanticSegmentation`): a MobileViT
    without its last convolution, dilated from the output stride on; `ASPP`; dropout; and a 1x1 convolution with bias.
    `load_checkpoint` and `convert_state_dict` know all three layouts. Parameters with 21 classes: 1,854,853 (xxs),
    2,944,069 (xs), 6,357,941 (s).

    Args:
        mode: "xxs", "xs" or "s".
        num_classes: number of classes, the background among them; 2 or more.
        in_channels: channels of the images.
        output_stride: ratio of the image's size to that of the logits: 8, 16 (as published) or 32. The parameters, and
            the dilations of the pyramid, are the same.
        dropout: in training, dropout in the transformer layers, as in `MobileViT`.
        classifier_dropout: in training, dropout in the head: of elements after the pyramid, and of whole channels
            before the classifier. 0.1 as published.
        device, dtype: device and dtype of the parameters.

    Shapes: `(B, in_channels, H, W)` with any H, W >= 32 to `(B, num_classes, ceil(H / output_stride), ceil(W /
    output_stride))`; dtypes as `MobileViT`. In training, B >= 2 (see `ASPP`).

    The backbone's blocks are accelerated on construction. Convolutions are initialized as in `MobileViT`, the
    classifier as its classifier.

    Raises:
        ValueError: an unknown mode or output stride, a count or probability out of range; when called, images as for
            `MobileViT`, and one image in training.
        TypeError: when called, as `MobileViT`.
    """

    def __init__(
        self,
        mode: str = "s",
        num_classes: int = 21,
        *,
        in_channels: int = 3,
        output_stride: int = 16,
        dropout: float = 0.0,
        classifier_dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_classes(num_classes)
        if not 0.0 <= classifier_dropout <= 1.0:
            raise ValueError(
                f"MobileViTDeepLabV3: classifier_dropout={classifier_dropout} is not a probability; give 0 to 1"
            )
        self.mode = mode
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.backbone = task_backbone(
            mode, in_channels=in_channels, output_stride=output_stride, dropout=dropout, device=device, dtype=dtype
        )
        with contextlib.nullcontext() if device is None else torch.device(device):
            self.aspp = ASPP(self.backbone.num_features, dropout=classifier_dropout)
            self.dropout = nn.Dropout2d(classifier_dropout)
            self.classifier = _classifier(num_classes)
        for module in self.aspp.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.aspp.to(dtype=dtype)
        self.classifier.to(dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits at the output stride; see the class for shapes and errors."""
        return self.classifier(self.dropout(self.aspp(self.backbone(x))))

    def loss(self, logits: torch.Tensor, masks: torch.Tensor, ignore_index: int = 255) -> dict[str, torch.Tensor]:
        """Cross-entropy of the logits, resized to the masks, over the pixels that are not ignored.

        Example:
            >>> model.loss(model(images), masks)["loss"].backward()

        Args:
            logits: of `forward`, (B, num_classes, h, w). They are resized (bilinear, `align_corners=False`) and summed
                up in float32, also under autocast, or in float64 if they are in float64.
            masks: class indices, (B, H, W), of any integer dtype.
            ignore_index: the index of pixels that do not count.

        Returns:
            `{"loss": …}`: the mean over the pixels; 0, with gradients of 0, if all are ignored.

        Raises:
            ValueError: shapes or devices that do not fit; on the CPU, an index of no class. (On a GPU such an index
                fails in PyTorch's kernel: looking for it would wait for the GPU at every step.)
            TypeError: masks that are not integers.
        """
        self._check(logits)
        self._check_masks(logits, masks, ignore_index)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, masks.long(), ignore_index=ignore_index, reduction="sum")
        return {"loss": total / (masks != ignore_index).sum().clamp(min=1)}

    @torch.no_grad()
    def segment(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The most likely class of every pixel: the logits, resized, and their largest.

        Example:
            >>> masks = model.segment(model(images), size=images.shape[2:])

        Args:
            logits: of `forward`, (B, num_classes, h, w).
            size: (height, width) of the result, such as the size of the image before it was resized for the network.

        Returns:
            Class indices, (B, height, width), int64.

        Raises:
            ValueError: logits of another shape, or a size that is not of two positive ints.
        """
        self._check(logits)
        size = tuple(size)  # type: ignore[assignment] # of any length: the next line looks
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"MobileViTDeepLabV3.segment: size={size} must be (height, width), two positive integers")
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one, on the same device and in the same dtype.

        Example:
            >>> load_checkpoint(model, "voc21.pth").reset_classifier(11)  # keeps what the pyramid has learnt

        Args:
            num_classes: number of classes, 2 or more.

        Raises:
            ValueError: `num_classes` is below 2 or not an integer.
        """
        _check_classes(num_classes)
        like = self.classifier.weight
        self.num_classes = num_classes
        self.classifier = _classifier(num_classes).to(device=like.device, dtype=like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing of the backbone's stages, as in `MobileViT`. (Of the head nothing is recomputed.)"""
        self.backbone.set_grad_checkpointing(enable)

    def _check(self, logits: torch.Tensor) -> None:
        if logits.ndim != 4 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise ValueError(
                f"MobileViTDeepLabV3: logits must be (B, {self.num_classes}, h, w), of floating point, as the model "
                f"returns them; got {tuple(logits.shape)} in {logits.dtype}"
            )

    def _check_masks(self, logits: torch.Tensor, masks: torch.Tensor, ignore_index: int) -> None:
        wanted = f"MobileViTDeepLabV3.loss: masks must be ({logits.shape[0]}, H, W), one for each image"
        if not isinstance(masks, torch.Tensor):
            raise TypeError(f"{wanted}, a tensor; got {type(masks).__name__}: stack the masks into one")
        if masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool:
            raise TypeError(f"{wanted}, of class indices; got {masks.dtype}: take masks.long()")
        if masks.ndim != 3 or masks.shape[0] != logits.shape[0] or 0 in masks.shape[1:]:
            hint = ": take masks.squeeze(1)" if masks.ndim == 4 and masks.shape[1] == 1 else ""
            raise ValueError(f"{wanted}; got shape {tuple(masks.shape)}{hint}")
        if masks.device != logits.device:
            raise ValueError(f"{wanted} on {logits.device}, as the logits are; got {masks.device}: move one of them")
        if masks.device.type == "cpu" and not torch.compiler.is_compiling():
            stray = masks[(masks != ignore_index) & ((masks < 0) | (masks >= self.num_classes))]
            if len(stray):
                raise ValueError(
                    f"{wanted}, of class indices 0 to {self.num_classes - 1}, or {ignore_index} for what is ignored; "
                    f"got {stray.unique()[:4].tolist()} in {len(stray)} pixels: build the model with as many classes, "
                    "or name the index that is ignored (ignore_index)"
                )


def _classifier(num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(_CHANNELS, num_classes, 1)
    nn.init.trunc_normal_(classifier.weight, std=0.02, a=-0.04, b=0.04)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type] # it has one
    return classifier


def _check_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise ValueError(
            f"MobileViTDeepLabV3: num_classes={num_classes!r}; give an integer of 2 or more (the background is a class)"
        )
