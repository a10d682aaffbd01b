# SPDX-License-Identifier: Apache-2.0
"""This package's MobileViT under timm's roof: `timm.create_model("mvit_kernels_mobilevit_s")`.

Needs timm, and is imported only by `mvit_kernels.nn.register_timm_models`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .mobilevit import MobileViT

__all__ = ["TimmMobileViT"]


class TimmMobileViT(MobileViT):
    """`MobileViT` with timm's argument names and timm's habits.

    Example:
        >>> timm.create_model("mvit_kernels_mobilevit_xxs", num_classes=0)(torch.rand(1, 3, 256, 256)).shape
        torch.Size([1, 320])
        >>> timm.create_model("mvit_kernels_mobilevit_xxs", features_only=True).feature_info.channels()
        [16, 24, 48, 64, 80]

    Other than `MobileViT`, without classes it gives the pooled features, unless `global_pool=""` asks for the
    map. `features_only` gives the five stages, and with 5 in `out_indices` the last convolution as well.

    Args:
        mode, in_chans, num_classes: see `MobileViT`.
        global_pool: "avg", or "" for the last map (then without classes).
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside transformer layers, `MobileViT`'s `dropout`.
    """

    def __init__(
        self,
        mode: str,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__(mode, in_chans, num_classes, dropout=proj_drop_rate, classifier_dropout=drop_rate)
        self.in_chans = in_chans
        self._set_pool(global_pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return super().forward_head(x, pre_logits) if self.global_pool else x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """`feature_maps` timm's way: the last map, and those at `indices` (an int n: the last n)."""
        if output_fmt != "NCHW":
            raise ValueError(f"MobileViT.forward_intermediates: output_fmt={output_fmt!r}; maps are 'NCHW'")
        wanted = self._take(indices)
        if intermediates_only:
            return self.feature_maps(x, wanted)
        *intermediates, last = self.feature_maps(x, [*wanted, -1])
        return last, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers beyond the last of `indices`, and the classifier; return the indices used."""
        wanted = self._take(indices)
        ends_early = max(wanted) < len(self.feature_info) - 1
        self.stages = self.stages[: max(wanted) + 1]
        if ends_early:
            self.final_conv = nn.Identity()
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes)
        self._set_pool(self.global_pool if global_pool is None else global_pool)

    def _take(self, indices: int | list[int] | None) -> list[int]:
        every = list(range(len(self.feature_info)))
        if indices is None:
            return every
        return every[-indices:] if isinstance(indices, int) else [every[index] for index in indices]

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"MobileViT: global_pool={global_pool!r} is unknown; choose 'avg' or ''")
        if self.num_classes and not global_pool:
            raise ValueError("MobileViT: global_pool='' leaves nothing to classify; give num_classes=0 too")
        self.global_pool = global_pool


def _create(mode: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"mvit_kernels_mobilevit_{mode} has no weights of its own to download; create it without "
            "pretrained and give mvit_kernels.load_checkpoint() a timm, Hugging Face or cvnets checkpoint"
        )
    return build_model_with_cfg(
        TimmMobileViT,
        f"mvit_kernels_mobilevit_{mode}",
        pretrained,
        feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3, 4)},
        mode=mode,
        **kwargs,
    )


# Preprocessing as published: RGB in [0, 1] without mean and standard deviation, 256 px from a 0.9 crop.
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 256, 256),
    "pool_size": (8, 8),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "first_conv": "stem.conv",
    "classifier": "classifier",
}
default_cfgs = generate_default_cfgs({f"mvit_kernels_mobilevit_{mode}": _CFG for mode in ("xxs", "xs", "s")})


@register_model
def mvit_kernels_mobilevit_xxs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("xxs", pretrained, **kwargs)


@register_model
def mvit_kernels_mobilevit_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("xs", pretrained, **kwargs)


@register_model
def mvit_kernels_mobilevit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("s", pretrained, **kwargs)
