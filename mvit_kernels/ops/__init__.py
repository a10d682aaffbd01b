# SPDX-License-Identifier: Apache-2.0
"""The operators: one file each, with its checks, fake, autograd and public function.

All of them are correct under PyTorch's transforms (forward-mode AD, ``torch.func``), for tensor subclasses (quantized,
distributed and fake weights) and when differentiated again (``create_graph=True``): PyTorch's own operators serve those
calls. A backend that was requested by name raises `BackendError` instead.
"""

from ..backends.library import TransformerLayerWeights
from . import flops, native  # noqa: F401 (they register FLOP formulas and fakes)
from .batch_norm_activation import batch_norm_activation
from .inverted_residual import inverted_residual
from .layer_norm import layer_norm
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import layer_norm_mlp
from .linear_residual import linear_residual
from .patch_attention import patch_attention
from .transformer import transformer
from .transformer_layer import transformer_layer
from .transformer_on_map import transformer_on_map

__all__ = [
    "TransformerLayerWeights",
    "batch_norm_activation",
    "inverted_residual",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_attention",
    "transformer",
    "transformer_layer",
    "transformer_on_map",
]
