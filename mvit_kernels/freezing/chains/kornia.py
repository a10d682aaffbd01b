# SPDX-License-Identifier: Apache-2.0
"""Kornia's MobileViT (kornia.models.vit_mobile, formerly kornia.contrib): a backbone, whose result is the last map."""

from __future__ import annotations

from torch import nn

from ..._utils.plain import is_own
from ..program import NotNative
from ._chain import Chain, frozen

# The order in which its forward calls them.
_ORDER = ("conv1", "mv2.0", "mv2.1", "mv2.2", "mv2.3", "mv2.4", "mvit.0", "mv2.5", "mvit.1", "mv2.6", "mvit.2", "conv2")


def chain(model: nn.Module) -> Chain | None:
    """The chain of Kornia's model; None for a model of another library."""
    if not is_own(model, "kornia", "MobileViT"):
        return None
    if (len(model.mv2), len(model.mvit)) != (7, 3):
        raise NotNative(
            f"it has {len(model.mv2)} inverted residuals and {len(model.mvit)} blocks, not Kornia's 7 and 3"
        )
    return Chain(frozen(model, *_ORDER), passed=(model.mv2, model.mvit))
