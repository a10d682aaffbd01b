# SPDX-License-Identifier: Apache-2.0
"""MobileViT-XXS, -XS and -S: the network of Mehta & Rastegari, "MobileViT" (ICLR 2022), table 4."""

# No `from __future__ import annotations`: torch.fx writes a forward's annotations into its graph, and fails on strings.

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
    """The paper's network, as a backbone or as an image classifier.

    Example:
        >>> MobileViT(mode="xxs")(torch.rand(1, 3, 256, 256)).shape  # a backbone: the last map
        torch.Size([1, 320, 8, 8])
        >>> MobileViT(mode="xxs", num_classes=1000)(torch.rand(1, 3, 256, 256)).shape  # a classifier: logits
        torch.Size([1, 1000])
        >>> [tuple(m.shape[1:]) for m in MobileViT("s").feature_maps(torch.rand(1, 3, 256, 256), [2, 3, 4])]
        [(96, 32, 32), (128, 16, 16), (160, 8, 8)]

    The network has a 3x3 stem of stride 2; stage 1 with one inverted residual; stage 2 with three, the first of stride
    2; stages 3 to 5 with an inverted residual of stride 2 and a MobileViT block of 2, 4 and 3 transformer layers; and a
    1x1 convolution to 320, 384 or 640 channels. A classifier adds mean pooling, dropout and a linear layer. Parameters
    with 1000 classes: 1,272,024 (xxs), 2,317,848 (xs), 5,578,632 (s); without a classifier: 951,024, 1,932,848,
    4,937,632.

    Args:
        mode: "xxs", "xs" or "s".
        in_channels: channels of the images.
        num_classes: 0 for a backbone, otherwise the number of logits.
        patch_size: (height, width) of a patch, or one int for both.
        dropout: in training, dropout in every transformer layer, after the attention's output projection and after the
            MLP. The paper trains xs and s with 0.1 and xxs with 0.05; the default is 0, so that nothing is random
            unless asked for.
        classifier_dropout: in training, dropout before the last linear layer; the paper's recipe has 0.1.
        output_stride: ratio of the image's size to the last map's: 32, or 8 or 16. Stages that would exceed it are
            dilated instead of strided, as for segmentation.
        drop_path: in training, stochastic depth: the probability of dropping a residual branch, which rises linearly
            from 0 in the first block to this value in the last (`DropPath`).
        device, dtype: device and dtype of the parameters.
        dilate_blocks: with an output stride of 8 or 16, dilate the MobileViT blocks' first 3x3 convolution too, as timm
            does, and not only the inverted residuals, as cvnets and Hugging Face do. Published DeepLabv3 weights expect
            False.

    Shapes: `(B, in_channels, H, W)` with any H, W >= 32 to `(B, num_features, ceil(H / 32), ceil(W / 32))`, where 32 is
    the output stride, or to `(B, num_classes)`. Maps that do not divide into patches are resized inside the block, as
    in the published models. Images have the parameters' dtype (float32, float64, bfloat16, float16), or any floating
    dtype under autocast.

    The blocks are accelerated on construction, as by `mvit_kernels.accelerate`. `mvit_kernels.restore` returns them to
    plain PyTorch, which is also what `torch.jit.script` compiles.

    Initialization is the usual one of these networks: convolutions Kaiming normal by fan-out, linear weights normal
    with standard deviation 0.02, truncated at two standard deviations, biases 0, norm weights 1 and biases 0.

    Attributes:
        num_features: channels of the last map.
        head_hidden_size: features that the classifier reads.
        feature_info: the maps that `feature_maps` can return: a list of dicts with `num_chs` (channels), `reduction`
            (stride to the image) and `module` (name of the submodule that outputs the map).

    Raises:
        ValueError: an unknown mode or output stride, a patch size that is not of positive ints, a count or probability
            out of range; when called, images that are not `(B, in_channels, H, W)` with H, W >= 32, or that are on
            another device than the parameters.
        TypeError: when called, images that are not a tensor, that are integers, or that have another dtype than the
            parameters outside autocast.
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
        *,
        dilate_blocks: bool = True,
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
                raise ValueError(f"MobileViT: {name}={probability} is not a probability; give 0 <= {name} <= 1")

        variant = _VARIANTS[mode]
        self.mode = mode
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = variant.features
        self.classifier_dropout = classifier_dropout
        self.grad_checkpointing = False

        with contextlib.nullcontext() if device is None else torch.device(device):
            self.stem = ConvNormAct(in_channels, _STEM_CHANNELS, 3, stride=2)
            self.stages = _build_stages(variant, patch_size, dropout, output_stride, drop_path, dilate_blocks)
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
        """Images to logits, or without classes to the last map; see the class for shapes and errors."""
        x = self.forward_features(x)
        return self.forward_head(x) if self.num_classes else x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map, `(B, num_features, ceil(H / 32), ceil(W / 32))`, independent of `num_classes`."""
        if not torch.jit.is_scripting():
            self._check_images(x)
        x = self.stem(x)
        if not torch.jit.is_scripting() and self._recomputes():
            for stage in self.stages:
                x = checkpoint(stage, x, use_reentrant=False)
        else:
            x = self.stages(x)  # in one call: frozen stages are one native call
        return self.final_conv(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map to logits, `(B, num_classes)`; with `pre_logits`, or without classes, to pooled features."""
        x = x.mean(dim=(2, 3))
        if pre_logits or not self.num_classes:
            return x
        return self.classifier(nn.functional.dropout(x, self.classifier_dropout, self.training))

    def feature_maps(self, x: torch.Tensor, indices: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Intermediate feature maps, for a detection or segmentation head.

        Example:
            >>> [m.shape[-1] for m in MobileViT("xxs").feature_maps(torch.rand(1, 3, 64, 64))]
            [32, 16, 8, 4, 2, 2]

        Args:
            x: images, as for `forward`.
            indices: maps to return, in this order: 0 to 4 for the stages (strides 2, 4, 8, 16, 32), 5 for the last
                convolution (stride 32); negative indices count from the end. All six by default. Nothing after the last
                requested map is computed.

        Returns:
            One map per index; channels and strides are those of `feature_info[index]`.

        Raises:
            ValueError: an index outside -6 to 5; images as for `forward`.
            TypeError: images as for `forward`.
        """
        self._check_images(x)
        count = len(self.feature_info)
        wanted = range(count) if indices is None else [feature_index(index, count) for index in indices]
        last, stages = max(wanted, default=-1), len(self.stages)
        if not hasattr(self.stages, "maps"):
            maps = self._maps_until(last, x)
            return [maps[index] for index in wanted]
        # Frozen: the stages between two wanted maps are one native call.
        through = sorted({min(index, stages - 1) for index in wanted})
        maps = self.stages.maps(self.stem(x), through)  # type: ignore[operator] # a method, of FrozenSequential
        found = dict(zip(through, maps, strict=True))
        if last == stages:
            found[stages] = self.final_conv(found[stages - 1])
        return [found[index] for index in wanted]

    def _maps_until(self, last: int, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps from the first to that of index `last`, with nothing computed beyond; TorchScript can compile it."""
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
        """Whether backward recomputes the stages. (The rest of the network keeps too little to be worth it.)"""
        return self.grad_checkpointing and self.training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing: in training keep only the maps between stages, and recompute the rest in backward."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one, on the same device and in the same dtype.

        Args:
            num_classes: number of logits; 0 removes the classifier.

        Raises:
            ValueError: `num_classes` is negative or not an integer.
        """
        _check_count("num_classes", num_classes, 0)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.classifier.apply(_initialise).to(device=like.device, dtype=like.dtype).train(self.training)

    def _check_images(self, x: torch.Tensor) -> None:
        if isinstance(x, fx.Proxy):  # torch.fx is tracing; there is no image yet
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
        if weight is None:  # a frozen stem has buffers instead of parameters, and casts images itself
            return
        if x.device != weight.device:
            raise ValueError(f"{wanted} on {weight.device}, as the model is; got {x.device}: move one of them")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{wanted} of {weight.dtype}, as the parameters; got {x.dtype}: convert one of them, "
                "or run under torch.autocast"
            )


def _build_stages(
    variant: _Variant,
    patch_size: int | tuple[int, int],
    dropout: float,
    output_stride: int,
    drop_path: float,
    dilate_blocks: bool,
) -> nn.Sequential:
    """The five stages of table 4, each an `nn.Sequential`.

    A stage that may not halve the map dilates what follows instead (Chen et al. 2017, arXiv:1706.05587, section 3.1).
    Its own first convolution keeps the dilation of the previous stage, so that weights trained at stride 32 fit.
    """
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
                dilation=dilation if dilate_blocks else 1,
            )
            blocks.append(block)
        stages.append(blocks)
    return stages


def _accelerate(model: nn.Module) -> None:
    from ..adapters import accelerate  # imported late: only construction needs the adapters

    accelerate(model)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
    # BatchNorm2d and LayerNorm are initialized to weight 1 and bias 0 by PyTorch.


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"MobileViT: {name}={value!r} is not a count; give an integer of {least} or more")


def feature_index(index: int, count: int) -> int:
    """`index` counted from the front, also if it is negative; raises ValueError if there is no such map."""
    if not -count <= index < count:
        raise ValueError(f"MobileViT: there is no map {index}; take {-count} to {count - 1}")
    return index % count
