# SPDX-License-Identifier: Apache-2.0
"""MobileViT as the backbone of a network for another task."""

from __future__ import annotations

import torch
from torch import nn

from .mobilevit import MobileViT

__all__ = ["task_backbone"]


def task_backbone(
    mode: str,
    *,
    in_channels: int,
    output_stride: int,
    dropout: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> MobileViT:
    """A MobileViT that ends with stage 5, dilated by cvnets' rule, as in the published networks for other tasks.

    Example:
        >>> task_backbone("s", in_channels=3, output_stride=16, dropout=0, device=None, dtype=None).num_features
        160

    Its last convolution is an `nn.Identity`, and `feature_info` has the five stages.

    Args:
        mode, in_channels, output_stride, dropout, device, dtype: as for `MobileViT`, which raises the errors.
    """
    backbone = MobileViT(
        mode,
        in_channels,
        dropout=dropout,
        output_stride=output_stride,
        device=device,
        dtype=dtype,
        dilate_blocks=False,
    )
    backbone.final_conv = nn.Identity()  # type: ignore[assignment] # its type is that of a whole classifier's
    backbone.feature_info.pop()
    backbone.num_features = backbone.head_hidden_size = backbone.feature_info[-1]["num_chs"]
    return backbone
