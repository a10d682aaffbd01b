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
    "CudaGraphs": "freezing.graphs",
    "export": "exporting",
    "ExportReport": "exporting",
    "load": "freezing.saved",
    "SavedNetwork": "freezing.saved",
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

if TYPE_CHECKING:  # `as` makes a name public for type checkers, which cannot read _EXPORTS
    from ._utils.freed_memory import keep_freed_memory as keep_freed_memory
    from ._utils.third_party import prepare_torchvision as prepare_torchvision
    from .adapters import AccelerationReport as AccelerationReport
    from .adapters import accelerate as accelerate
    from .adapters import report as report
    from .adapters import restore as restore
    from .backends import BackendError as BackendError
    from .backends import use_backend as use_backend
    from .checkpoints import convert_state_dict as convert_state_dict
    from .checkpoints import load_checkpoint as load_checkpoint
    from .dropout import LayerDropout as LayerDropout
    from .exporting import ExportReport as ExportReport
    from .exporting import export as export
    from .freezing import freeze as freeze
    from .freezing.graphs import CudaGraphs as CudaGraphs
    from .freezing.saved import SavedNetwork as SavedNetwork
    from .freezing.saved import load as load
    from .nn import MobileViT as MobileViT
    from .nn import MobileViTDeepLabV3 as MobileViTDeepLabV3
    from .nn import MobileViTSSDLite as MobileViTSSDLite
    from .ops import TransformerLayerWeights as TransformerLayerWeights
    from .ops.batch_norm_activation import batch_norm_activation as batch_norm_activation
    from .ops.inverted_residual import inverted_residual as inverted_residual
    from .ops.layer_norm import layer_norm as layer_norm
    from .ops.layer_norm_linear import layer_norm_linear as layer_norm_linear
    from .ops.layer_norm_mlp import layer_norm_mlp as layer_norm_mlp
    from .ops.linear_residual import linear_residual as linear_residual
    from .ops.patch_attention import patch_attention as patch_attention
    from .ops.transformer import transformer as transformer
    from .ops.transformer_layer import transformer_layer as transformer_layer
    from .training.sampler import MultiScaleSampler as MultiScaleSampler
    from .verification import VerificationReport as VerificationReport
    from .verification import verify as verify

if not TYPE_CHECKING:  # a checker would take any name

    def __getattr__(name: str) -> object:
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
