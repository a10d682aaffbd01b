# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for MobileViT: drop-in for timm, Hugging Face, Kornia, cvnets and our own model.

Example:
    >>> import timm, mvit_kernels
    >>> model = mvit_kernels.accelerate(timm.create_model("mobilevit_s"))   # in place, for training and inference
    >>> fast = mvit_kernels.freeze(model)                                   # a copy, for inference only

Names are imported on first use: ``import mvit_kernels`` itself loads neither torch nor a compiled library, and
touches no GPU.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "accelerate": "adapters",
    "restore": "adapters",
    "report": "adapters",
    "AccelerationReport": "adapters",
    "freeze": "freezing",
    "verify": "verification",
    "VerificationReport": "verification",
    "load_checkpoint": "checkpoints",
    "convert_state_dict": "checkpoints",
    "MobileViT": "nn",
    "MobileViTDeepLabV3": "nn",
    "MobileViTSSDLite": "nn",
    "use_backend": "backends",
    "BackendError": "backends",
    "batch_norm_activation": "ops",
    "layer_norm": "ops",
    "layer_norm_linear": "ops",
    "patch_attention": "ops",
    "linear_residual": "ops",
    "layer_norm_mlp": "ops",
    "inverted_residual": "ops",
    "transformer": "ops",
    "transformer_layer": "ops",
    "TransformerLayerWeights": "ops",
    "LayerDropout": "dropout",
    "MultiScaleSampler": "training.sampler",
    "prepare_torchvision": "_utils.third_party",
    "keep_freed_memory": "_utils.freed_memory",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from ._utils.freed_memory import keep_freed_memory
    from .adapters import AccelerationReport, accelerate, report, restore
    from .backends import BackendError, use_backend
    from .checkpoints import convert_state_dict, load_checkpoint
    from .dropout import LayerDropout
    from .freezing import freeze
    from .nn import MobileViT, MobileViTDeepLabV3, MobileViTSSDLite
    from .ops import (
        TransformerLayerWeights,
        batch_norm_activation,
        inverted_residual,
        layer_norm,
        layer_norm_linear,
        layer_norm_mlp,
        linear_residual,
        patch_attention,
        transformer,
        transformer_layer,
    )
    from .training.sampler import MultiScaleSampler
    from .verification import VerificationReport, verify


def __getattr__(name: str):
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'mvit_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))


if "timm.models" in sys.modules:  # then torch is loaded too: register our models with timm.create_model
    importlib.import_module(f"{__name__}.nn")
