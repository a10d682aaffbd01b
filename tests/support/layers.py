# SPDX-License-Identifier: Apache-2.0
"""One transformer layer on the Triton backend: by four operators, and as one.

Example:
    >>> layer = weights_of(32, torch.bfloat16)
    >>> layer_of(torch.randn(1, 4, 4, 32, dtype=torch.bfloat16), layer).sum().backward()
"""

import torch

import mvit_kernels
from support.cases import convert, make


def operators_of(x, layer, heads=4):
    """One transformer layer by four operators."""
    norm1, qkv, proj, mlp = layer[:2], layer[2:4], layer[4:6], layer[6:]
    with mvit_kernels.use_backend("triton"):
        attended = mvit_kernels.patch_attention(
            mvit_kernels.layer_norm_linear(x, *norm1, *qkv), num_heads=heads, patch_size=(2, 2)
        )
        return mvit_kernels.layer_norm_mlp(mvit_kernels.linear_residual(attended, *proj, x), *mlp)


def layer_of(x, layer, dropout=None, seed=None):
    return mvit_kernels.transformer_layer(
        x, layer, num_heads=4, patch_size=(2, 2), dropout=dropout, seed=seed, backend="triton"
    )


def weights_of(d, dtype):
    tensors, _ = make("transformer_layer", dict(shape=(1, 2, 2, d), heads=4, patch=(2, 2)))
    weights = convert(tensors, dtype, torch.float32)
    del weights["x"]
    return mvit_kernels.TransformerLayerWeights(*(t.requires_grad_() for t in weights.values()))
