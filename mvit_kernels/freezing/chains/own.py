# SPDX-License-Identifier: Apache-2.0
"""Our own networks: `MobileViT`, the same as a timm model, and `MobileViTDeepLabV3`."""

from __future__ import annotations

from torch import nn

from ..._utils.plain import does_nothing, is_own
from ..program import NotNative
from ._chain import Chain, frozen, idle
from .timm import pooling


def chain(model: nn.Module) -> Chain | None:
    """The chain of one of our models; None for a model of another library."""
    if is_own(model, "mvit_kernels", "MobileViT"):
        return _backbone(model)._replace(
            pools=model.head_hidden_size if model.num_classes else 0,
            classifier=model.classifier if model.num_classes else None,
        )
    if is_own(model, "mvit_kernels", "TimmMobileViT"):
        pools, passed = pooling(model.pool, "pool")
        return _backbone(model)._replace(
            pools=model.head_hidden_size if pools else 0,
            classifier=None if does_nothing(model.classifier) else model.classifier,
            passed=passed,
        )
    if is_own(model, "mvit_kernels", "MobileViTDeepLabV3"):
        backbone = _backbone(model.backbone, "backbone.")
        if model.backbone.num_classes:
            raise NotNative("its backbone has a classifier")
        return backbone._replace(
            body=(*backbone.body, *frozen(model, "aspp")),
            classifier=model.classifier,
            passed=(model.backbone, *idle(model, "dropout")),
        )
    if is_own(model, "mvit_kernels", "MobileViTSSDLite"):
        raise NotNative("a detector returns two tensors, of the classes and of the boxes, and a chain has one result")
    return None


def _backbone(model: nn.Module, path: str = "") -> Chain:
    names = ("stem", "stages", "final_conv")
    try:
        body = frozen(model, *names)
    except NotNative as reason:
        raise NotNative(f"{reason} (of {path.rstrip('.')})" if path else str(reason)) from None
    return Chain(body, facts=((model, "num_classes"),), checks=(model._check_images,))
