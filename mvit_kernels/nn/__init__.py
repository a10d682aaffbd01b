# SPDX-License-Identifier: Apache-2.0
"""This package's own MobileViT, its parts, networks for other tasks on it, and what it registers with timm."""

from __future__ import annotations

import importlib
import logging
import sys

from .._utils.third_party import import_timm
from .block import MobileViTBlock, TransformerLayer
from .deeplabv3 import ASPP, MobileViTDeepLabV3
from .layers import ConvNormAct, InvertedResidual
from .mobilevit import MobileViT
from .ssdlite import MobileViTSSDLite, SSDHead, SSDOutput

__all__ = [
    "ASPP",
    "ConvNormAct",
    "InvertedResidual",
    "MobileViT",
    "MobileViTBlock",
    "MobileViTDeepLabV3",
    "MobileViTSSDLite",
    "SSDHead",
    "SSDOutput",
    "TransformerLayer",
    "register_timm_models",
]


def register_timm_models() -> None:
    """Register this package's models with `timm.create_model`.

    Example:
        >>> mvit_kernels.nn.register_timm_models()
        >>> timm.create_model("mvit_kernels_mobilevit_s", num_classes=10)(torch.rand(1, 3, 256, 256)).shape
        torch.Size([1, 10])

    Adds `mvit_kernels_mobilevit_xxs`, `_xs` and `_s`, and as `accelerated_mobilevit_xxs`, `_xs` and `_s` timm's own
    models with `accelerate` applied, for programs that make models by name. Importing `mvit_kernels.nn` does this
    automatically if timm was imported before; call it if timm is imported later. Repeated calls do no harm.

    Raises:
        ImportError: timm is not installed, or is too old (before 0.9).
    """
    import_timm()
    for name in ("timm_models", "timm_accelerated"):
        importlib.import_module(f"{__name__}.{name}")  # registers on its first import


if "timm.models" in sys.modules:
    try:
        register_timm_models()
    except ImportError as error:  # timm before 0.9: everything but the registration works
        logging.getLogger("mvit_kernels").warning("timm.create_model will not find the mvit_kernels models: %s", error)
