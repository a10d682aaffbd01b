# SPDX-License-Identifier: Apache-2.0
"""MobileViT-XXS, -XS and -S: the network of Mehta & Rastegari, "MobileViT" (ICLR 2022), table 4."""

# No `from __future__ import annotations`: torch.fx writes a forward's annotations into its graph, and cannot strings.

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from .block import MobileViTBlock
from .layers import ConvNormAct, InvertedResidual

__all__ = ["MobileViT"]


class _Variant(NamedTuple):
    channels: tuple[int, int, int, int, int]  # of the five stages
    dims: tuple[int, int, int]  # transformer widths of stages 3, 4, 5
    features: int  # channels of the last convolution
    expand_ratio: float  # of every inverted residual


_VARIANTS = {
    "xxs": _Variant((16, 24, 48, 64, 80), (64, 80, 96), 320, 2.0),
    "xs": _Variant((32, 48, 64, 80, 96), (96, 120, 144), 384, 4.0),
    "s": _Variant((32, 64, 96, 128, 160), (144, 192, 240), 640, 4.0),
}
_STEM_CHANNELS = 16
_DEPTHS = (2, 4, 3)  # transformer layers of stages 3, 4, 5
_BLOCKS = 10  # inverted residuals and MobileViT blocks, all stages together
_STRIDE = 32  # of the whole network: stem and stages 2 to 5 halve the map
_OUTPUT_STRIDES = (8, 16, 32)


class MobileViT(nn.Module):
    """The paper's network, as a backbone or as a classifier.

    Example:
        >>> MobileViT(mode="xxs")(torch.rand(1, 3, 256, 256)).shape  # a backbone: the last map
        torch.Size([1, 320, 8, 8])
        >>> MobileViT(mode="xxs", num_classes=1000)(torch.rand(1, 3, 256, 256)).shape  # a classifier: logits
        torch.Size([1, 1000])
        >>> [tuple(m.shape[1:]) for m in MobileViT("s").feature_maps(torch.rand(1, 3, 256, 256), [2, 3, 4])]
        [(96, 32, 32), (128, 16, 16), (160, 8, 8)]

    Stem 3x3 stride 2; stage 1, one inverted residual; stage 2, three, the first of stride 2; stages 3 to 5,
    an inverted residual of stride 2 and a MobileViT block of 2, 4 and 3 layers; a 1x1 convolution to 320, 384
    or 640 channels; for a classifier also mean pooling, dropout and a linear layer. Parameters with 1000
    classes: 1,272,024 (xxs), 2,317,848 (xs), 5,578,632 (s); without a classifier 951,024, 1,932,848,
    4,937,632.

    Args:
        mode: "xxs", "xs" or "s".
        in_channels: channels of the images.
        num_classes: 0 for a backbone, else the number of logits.
        patch_size: (height, width) of a patch, or one number for both.
        dropout: in every transformer layer while training, after the attention's output projection and after
            the MLP. The paper trains xs and s with 0.1 and xxs with 0.05; 0 here, so that nothing random
            happens unasked.
        classifier_dropout: before the last linear layer while training; the paper's recipe has 0.1.
        output_stride: of the last map to the image: 32, or 8 or 16, and then the stages that would go
            beyond are dilated instead, as for segmentation.
        drop_path: stochastic depth while training: the probability of dropping a residual branch, from 0 in the
            first block rising linearly to this in the last (`DropPath`).
        device, dtype: where the parameters are made, and in what they are kept.

    Shapes: `(B, in_channels, H, W)` with any H, W >= 32 to `(B, features, ceil(H / 32), ceil(W / 32))`, 32 being
    the output stride, or to `(B, num_classes)`. Maps that do not divide into patches are resized inside the block,
    as published. Images have the parameters' dtype (float32, float64, bfloat16, float16), or any under autocast.

    The blocks run on this package's operators from birth, as if `mvit_kernels.accelerate` had been called;
    `mvit_kernels.restore` returns them to plain PyTorch, and `torch.jit.script` compiles the plain PyTorch.

    Initial values, as is usual for these networks: convolutions Kaiming normal over fan-out, linear weights
    from a normal of standard deviation 0.02 truncated at two, biases 0, norms 1 and 0.

    Attributes:
        num_features: channels of the last map.
        head_hidden_size: features that the classifier reads.
        feature_info: what `feature_maps` can give: a list of dicts with `num_chs` (channels), `reduction`
            (stride to the image) and `module` (name of the submodule the map comes from).

    Raises:
        ValueError: an unknown mode or output stride, a patch that is not of positive integers, a count or
            probability out of range; when called, images that are not `(B, in_channels, H, W)` with H, W >= 32,
            or that lie on another device than the parameters.
        TypeError: when called, images of integers, or of another dtype than the parameters outside autocast.
    """

    def __init__(
        self,
        mode: str = "xxs",
        in_channels: int = 3,
        num_classes: int = 0,
        patch_size: int | tuple[int, int] = (2, 2),
        dropout: float = 0.0,
        classifier_dropout: float = 0.0,
        output_stride: int = _STRIDE,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in _VARIANTS:
            raise ValueError(f"MobileViT: mode={mode!r} is unknown; choose one of {list(_VARIANTS)}")
        _check_count("in_channels", in_channels, 1)
        _check_count("num_classes", num_classes, 0)
        if output_stride not in _OUTPUT_STRIDES:
            raise ValueError(f"MobileViT: output_stride={output_stride!r} is unknown; choose one of {_OUTPUT_STRIDES}")
        probabilities = {"dropout": dropout, "classifier_dropout": classifier_dropout, "drop_path": drop_path}
        for name, probability in probabilities.items():
            if not 0.0 <= probability <= 1.0:
                raise ValueError(f"MobileViT: {name}={probability} is no probability; give 0 <= {name} <= 1")

        variant = _VARIANTS[mode]
        self.mode = mode
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = variant.features
        self.classifier_dropout = classifier_dropout
        self.grad_checkpointing = False

        with contextlib.nullcontext() if device is None else torch.device(device):
            self.stem = ConvNormAct(in_channels, _STEM_CHANNELS, 3, stride=2)
            self.stages = _build_stages(variant, patch_size, dropout, output_stride, drop_path)
            self.final_conv = ConvNormAct(variant.channels[-1], variant.features)
            self.classifier = nn.Linear(variant.features, num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": channels, "reduction": min(2 ** (stage + 1), output_stride), "module": f"stages.{stage}"}
            for stage, channels in enumerate(variant.channels)
        ]
        self.feature_info.append({"num_chs": variant.features, "reduction": output_stride, "module": "final_conv"})
        self.apply(_initialise)
        self.to(dtype=dtype)
        _accelerate(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x) if self.num_classes else x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map, `(B, num_features, ceil(H / 32), ceil(W / 32))`, whatever `num_classes`."""
        if not torch.jit.is_scripting():
            self._check_images(x)
        x = self.stem(x)
        if not torch.jit.is_scripting() and self._recomputes():
            for stage in self.stages:
                x = checkpoint(stage, x, use_reentrant=False)
        else:
            x = self.stages(x)  # at once: frozen stages are one native call
        return self.final_conv(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map to logits; with `pre_logits`, or without a classifier, to pooled features `(B, C)`."""
        x = x.mean(dim=(2, 3))
        if pre_logits or not self.num_classes:
            return x
        return self.classifier(nn.functional.dropout(x, self.classifier_dropout, self.training))

    def feature_maps(self, x: torch.Tensor, indices: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Maps along the network, for a detection or segmentation head.

        Example:
            >>> [m.shape[-1] for m in MobileViT("xxs").feature_maps(torch.rand(1, 3, 64, 64))]
            [32, 16, 8, 4, 2, 2]

        Args:
            x: images, as for `forward`.
            indices: which, in the order wanted: 0 to 4 for the stages (strides 2, 4, 8, 16, 32), 5 for the
                last convolution (stride 32); negative ones count from the end. All six by default. Nothing
                beyond the last one asked for is computed.

        Returns:
            One map an index; channels and strides are those of `feature_info[index]`.

        Raises:
            ValueError: an index outside -6 to 5; images as for `forward`.
        """
        self._check_images(x)
        count = len(self.feature_info)
        wanted = range(count) if indices is None else [feature_index(index, count) for index in indices]
        maps = self._maps_until(max(wanted, default=-1), x)
        return [maps[index] for index in wanted]

    def _maps_until(self, last: int, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps from the first to that of index `last`, and nothing computed beyond; TorchScript compiles it."""
        maps: list[torch.Tensor] = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if index <= last:
                if not torch.jit.is_scripting() and self._recomputes():
                    x = checkpoint(stage, x, use_reentrant=False)
                else:
                    x = stage(x)
                maps.append(x)
        if last >= len(self.stages):
            maps.append(self.final_conv(x))
        return maps

    def _recomputes(self) -> bool:
        """Whether backward recomputes the stages: that frees what they keep inside (the rest keeps too little)."""
        return self.grad_checkpointing and self.training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep only the map between two stages, and recompute what is inside them in backward."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one, on the same device and in the same dtype; 0 removes it.

        Raises:
            ValueError: `num_classes` is negative or not an integer.
        """
        _check_count("num_classes", num_classes, 0)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.classifier.apply(_initialise).to(device=like.device, dtype=like.dtype).train(self.training)

    def _check_images(self, x: torch.Tensor) -> None:
        if isinstance(x, fx.Proxy):  # torch.fx traces what is computed; there is no image yet
            return
        wanted = f"MobileViT: images must be (B, {self.in_channels}, H, W)"
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{wanted}, a tensor; got {type(x).__name__}. Stack the images into one tensor")
        if x.ndim != 4:
            hint = "add the batch axis with x[None]" if x.ndim == 3 else "reshape them to four axes"
            raise ValueError(f"{wanted}; got shape {tuple(x.shape)}: {hint}")
        if x.shape[1] != self.in_channels:
            hint = (
                "move the channels first with x.movedim(-1, 1)"
                if x.shape[3] == self.in_channels
                else (f"build the model with in_channels={x.shape[1]}, or convert the images")
            )
            raise ValueError(f"{wanted}; got shape {tuple(x.shape)}: {hint}")
        if min(x.shape[2], x.shape[3]) < _STRIDE:
            raise ValueError(
                f"{wanted} with H, W >= {_STRIDE}, the network's stride; got {x.shape[2]} x {x.shape[3]}: "
                "resize the images"
            )
        if not x.is_floating_point():
            raise TypeError(f"{wanted} of floating point; got {x.dtype}: take x.float() / 255, then normalise")
        weight = next(self.stem.parameters(), None)
        if weight is None:  # a frozen stem has packed weights instead, and converts images by itself
            return
        if x.device != weight.device:
            raise ValueError(f"{wanted} on {weight.device}, as the model is; got {x.device}: move one of them")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{wanted} of {weight.dtype}, as the parameters; got {x.dtype}: convert one of them, "
                "or run under torch.autocast"
            )


def _build_stages(
    variant: _Variant, patch_size: int | tuple[int, int], dropout: float, output_stride: int, drop_path: float
) -> nn.Sequential:
    """The five stages of table 4, each an `nn.Sequential`. Where a stage may not halve the map, what comes after it is
    dilated instead (Chen et al. 2017, arXiv:1706.05587, section 3.1); its own first convolution still reads the
    neighbours that the previous stage's did, so that weights trained at stride 32 serve."""
    stages = nn.Sequential()
    channels, reduction, dilation = _STEM_CHANNELS, 2, 1
    drop_paths = iter(torch.linspace(0.0, drop_path, _BLOCKS, device="cpu").tolist())
    for stage, out_channels in enumerate(variant.channels):
        blocks = nn.Sequential()
        for index in range(3 if stage == 1 else 1):
            stride, block_dilation = 1, dilation
            if stage > 0 and index == 0:
                if reduction < output_stride:
                    stride, reduction = 2, 2 * reduction
                else:
                    dilation *= 2
            blocks.append(
                InvertedResidual(
                    channels,
                    out_channels,
                    stride=stride,
                    expand_ratio=variant.expand_ratio,
                    dilation=block_dilation,
                    drop_path=next(drop_paths),
                )
            )
            channels = out_channels
        if stage >= 2:
            block = MobileViTBlock(
                channels,
                dim=variant.dims[stage - 2],
                depth=_DEPTHS[stage - 2],
                patch_size=patch_size,
                dropout=dropout,
                drop_path=next(drop_paths),
                dilation=dilation,
            )
            blocks.append(block)
        stages.append(blocks)
    return stages


def _accelerate(model: nn.Module) -> None:
    from ..adapters import accelerate  # the adapters know this package's blocks, so they come after them

    accelerate(model)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
    # BatchNorm2d and LayerNorm start at weight 1 and bias 0 by themselves.


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"MobileViT: {name}={value!r} is not a count; give an integer of {least} or more")


def feature_index(index: int, count: int) -> int:
    """An index from the front, of one that may count from the end; ValueError where there is no such map."""
    if not -count <= index < count:
        raise ValueError(f"MobileViT: there is no map {index}; take {-count} to {count - 1}")
    return index % count
