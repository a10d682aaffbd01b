# SPDX-License-Identifier: Apache-2.0
"""This package's MobileViT as timm models: `timm.create_model("mvit_kernels_mobilevit_s")`.

Requires timm; imported only by `mvit_kernels.nn.register_timm_models`.
"""

# No `from __future__ import annotations`: torch.fx writes a forward's annotations into its graph, and fails on strings.

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from torch import nn

from ..checkpoints import convert_state_dict
from .block import MobileViTBlock
from .mobilevit import MobileViT, feature_index

__all__ = ["TimmMobileViT"]


class TimmMobileViT(MobileViT):
    """`MobileViT` with timm's argument names and conventions.

    Example:
        >>> timm.create_model("mvit_kernels_mobilevit_xxs", num_classes=0)(torch.rand(1, 3, 256, 256)).shape
        torch.Size([1, 320])
        >>> timm.create_model("mvit_kernels_mobilevit_xxs", features_only=True).feature_info.channels()
        [16, 24, 48, 64, 80]

    Unlike `MobileViT`, it returns pooled features if there are no classes, or the last map with `global_pool=""`.
    `features_only` returns the five stages, and with 5 in `out_indices` the last convolution as well.

    Args:
        mode, in_chans, num_classes, output_stride, device, dtype: see `MobileViT`; 1000 classes by default.
        global_pool: "avg" (the default), "max", "avgmax", "catavgmax", or "" for the last map (only without classes).
        drop_rate: dropout before the classifier, `MobileViT`'s `classifier_dropout`.
        drop_path_rate: stochastic depth in the last block, `MobileViT`'s `drop_path`.
        proj_drop_rate: dropout inside transformer layers, `MobileViT`'s `dropout`.

    Raises:
        ValueError: `global_pool` is not one of these, or is "" with classes; otherwise as `MobileViT`.
    """

    def __init__(
        self,
        mode: str,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            mode,
            in_chans,
            num_classes,
            dropout=proj_drop_rate,
            classifier_dropout=drop_rate,
            output_stride=output_stride,
            drop_path=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.in_chans = in_chans
        self.num_maps = len(self.feature_info)
        self._set_pool("avg" if global_pool is None else global_pool, num_classes)
        if num_classes and self.head_hidden_size != self.num_features:
            self.reset_classifier(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = nn.functional.dropout(self.pool(x), self.classifier_dropout, self.training)
        return x if pre_logits else self.classifier(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """timm's form of `feature_maps`: the last map, and those at `indices`.

        Args:
            x: images, as for `forward`.
            indices: indices of the maps, as in `feature_maps`; an int n for the last n; all six by default.
            norm: ignored; no norm follows the last map.
            stop_early: compute nothing after the last map of `indices`, which is then returned as the last map.
            output_fmt: "NCHW".
            intermediates_only: return the list of maps alone.

        Returns:
            (last map, list of maps), or the list.

        Raises:
            ValueError: another `output_fmt`, an index of no map; images as for `forward`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"MobileViT.forward_intermediates: output_fmt='{output_fmt}'; maps are 'NCHW'")
        if not torch.jit.is_scripting():
            self._check_images(x)
        wanted = self._take(indices)
        last = max(wanted)
        maps = self._maps_until(last if stop_early or intermediates_only else self.num_maps - 1, x)
        intermediates = [maps[index] for index in wanted]
        if intermediates_only:
            return intermediates
        return maps[-1], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of `indices` and return the indices used.

        The classifier is dropped with `prune_head`, and whenever layers are.
        """
        wanted = self._take(indices)
        last = max(wanted)
        ends_early = last < self.num_maps - 1
        self.stages = self.stages[: last + 1]
        if ends_early:
            self.final_conv = nn.Identity()  # type: ignore[assignment] # of a whole classifier it is a ConvNormAct
            self.num_features = self.feature_info[last]["num_chs"]
            self.feature_info = self.feature_info[: last + 1]
            self.num_maps = last + 1
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is None:
            global_pool = self.global_pool or ("avg" if num_classes else "")  # a new classifier needs pooling again
        self._set_pool(global_pool, num_classes)
        super().reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name patterns that group the layers by depth, for timm's layer-wise learning-rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final_conv", (99999,))]}

    def _take(self, indices: int | list[int] | None) -> list[int]:
        """The requested map indices in the given order: all for None, the last n for an int n."""
        if indices is None:
            indices = self.num_maps
        if isinstance(indices, int):
            if not 0 < indices <= self.num_maps:
                raise ValueError(
                    f"MobileViT: the last {indices} maps were requested, of {self.num_maps}; take 1 to {self.num_maps}"
                )
            return list(range(self.num_maps - indices, self.num_maps))
        return [feature_index(index, self.num_maps) for index in indices]

    def _set_pool(self, global_pool: str, num_classes: int) -> None:
        if num_classes and not global_pool:
            raise ValueError(
                "MobileViT: global_pool='' leaves nothing to classify; give num_classes=0 too, or a pool, such as 'avg'"
            )
        try:
            pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        except AssertionError as error:
            raise ValueError(
                f"MobileViT: global_pool={global_pool!r} is unknown; choose 'avg', 'max', 'avgmax', 'catavgmax' or ''"
            ) from error
        self.pool = pool.train(self.training)
        self.global_pool = global_pool
        self.head_hidden_size = self.num_features * self.pool.feat_mult()


class _Features(FeatureGetterNet):  # type: ignore[misc] # timm has no types
    """timm's `features_only` through `forward_intermediates`, with the model's gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


# A leaf for timm's FX tracer, as timm's own block is: its control flow depends on the map's size.
register_notrace_module(MobileViTBlock)


def _as_own(state_dict: dict[str, Any], model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    return convert_state_dict(state_dict, to="own")


def _create(mode: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = f"mvit_kernels_mobilevit_{mode}"
    if pretrained:
        source = {name: kwargs.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
        cfg = resolve_pretrained_cfg(variant, **source)
        if not (cfg.has_weights or cfg.state_dict):
            raise RuntimeError(
                f"{variant} has no weights of its own to download; give pretrained_cfg_overlay={{'file': path}} with a "
                "timm, Hugging Face, cvnets or own checkpoint, or create it without pretrained and call "
                "mvit_kernels.load_checkpoint(model, path)"
            )
    return build_model_with_cfg(
        TimmMobileViT,
        variant,
        pretrained,
        pretrained_filter_fn=_as_own,
        # timm's other extractors find modules by name, and have to look inside the Sequential of all stages.
        feature_cfg={"flatten_sequential": True} if kwargs.get("feature_cls") else {"feature_cls": _Features},
        mode=mode,
        **kwargs,
    )


# Preprocessing as published: RGB in [0, 1], not normalized by mean and standard deviation, 256 px from a 0.9 crop.
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
    "license": "apache-2.0",
    "paper_name": "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer",
    "paper_ids": "arXiv:2110.02178",
}
default_cfgs = generate_default_cfgs({f"mvit_kernels_mobilevit_{mode}": _CFG for mode in ("xxs", "xs", "s")})


@register_model
def mvit_kernels_mobilevit_xxs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileViT-XXS; arguments as for `TimmMobileViT`. With `pretrained`, `pretrained_cfg_overlay` names a file."""
    return _create("xxs", pretrained, **kwargs)


@register_model
def mvit_kernels_mobilevit_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileViT-XS; arguments as for `TimmMobileViT`. With `pretrained`, `pretrained_cfg_overlay` names a file."""
    return _create("xs", pretrained, **kwargs)


@register_model
def mvit_kernels_mobilevit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileViT-S; arguments as for `TimmMobileViT`. With `pretrained`, `pretrained_cfg_overlay` names a file."""
    return _create("s", pretrained, **kwargs)
