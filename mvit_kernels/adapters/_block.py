# SPDX-License-Identifier: Apache-2.0
"""Shared by all adapters: a library's block as plain parts, and its fast forward.

An adapter says where its library keeps the parts of a block (`BlockParts`); `Inspector` checks that they are what is
expected. Parameters are read from the modules at every call, so optimizers, FSDP, EMA or the user may replace them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.text import some
from ..backends import Serving
from ..dropout import LayerDropout
from ..ops import TransformerLayerWeights, transformer_on_map
from ..ops.serving import transformer_serving


class LayerModules(NamedTuple):
    """One transformer layer of a library: the modules that hold its weights and its dropouts."""

    norm1: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]  # one joint Linear, or query, key and value
    proj: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    attention_dropout: nn.Module | None = None
    projection_dropout: nn.Module | None = None
    activation_dropout: nn.Module | None = None
    mlp_dropout: nn.Module | None = None
    path1: nn.Module | None = None
    path2: nn.Module | None = None


class Seen(NamedTuple):
    """What an adapter's answer depends on, apart from parameters and buffers."""

    modules: tuple[nn.Module, ...]  # the block, then every module that the fast path bypasses
    facts: tuple[tuple[nn.Module, str, Any], ...]  # plain attributes: module, name, value


class BlockParts(NamedTuple):
    """The parts of a library's MobileViT block: ``fusion(cat(x, after(transformer(before(x)))))``."""

    downsampling: nn.Module | None  # Hugging Face keeps the stride-2 inverted residual inside the block
    before: tuple[nn.Module, ...]
    layers: tuple[LayerModules, ...]
    final_norm: nn.LayerNorm | None
    after: tuple[nn.Module, ...]
    fusion: nn.Module | None
    input_first: bool  # order of the concatenation
    num_heads: int
    patch_size: tuple[int, int]
    eps: float
    seen: Seen


class Refusal(Exception):
    """Raised for a block that the fast path would compute incorrectly: the reasons, and what they depend on.

    Both are kept in `args`, because torch.compile cannot trace an exception with an ``__init__`` of its own.
    """

    @property
    def reasons(self) -> list[str]:
        return self.args[0]

    @property
    def seen(self) -> Seen:
        return self.args[1]

    def __str__(self) -> str:
        return some(self.reasons, joint="; ")


class FrozenBlock:
    """Base class of the modules that `freeze` puts in place of blocks; it marks the frozen blocks of a model."""

    def serving(self) -> Serving:
        """What serves its transformer on the device and in the dtype of its weights."""
        raise NotImplementedError


def original_class(block: nn.Module) -> type[nn.Module]:
    """The class that a block has, or had before `accelerate`."""
    return getattr(type(block), "_mvit_original", type(block))


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has forward or backward hooks of its own."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dictionaries that hold a module's own forward and backward hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def forward(parts: BlockParts, x: Tensor, backend: str | None) -> Tensor:
    """Run the block on a (B, C, H, W) map: `transformer_on_map`, and the library's own convolution modules."""
    if parts.downsampling is not None:
        x = parts.downsampling(x)
    y = x
    for module in parts.before:
        y = module(y)
    y = transformer_on_map(
        y,
        [layer_weights(layer) for layer in parts.layers],
        None if parts.final_norm is None else (parts.final_norm.weight, parts.final_norm.bias),
        num_heads=parts.num_heads,
        patch_size=parts.patch_size,
        eps=parts.eps,
        dropout=[live_dropout(layer) for layer in parts.layers],
        backend=backend,
    )
    for module in parts.after:
        y = module(y)
    if parts.fusion is None:
        return y
    return parts.fusion(torch.cat((x, y) if parts.input_first else (y, x), dim=1))


def block_serving(parts: BlockParts, backend: str | None) -> Serving:
    """What serves the block's transformer on the device and in the dtype of its weights, which may be shards."""
    weight = parts.layers[0].proj.weight
    return transformer_serving(
        parts.layers[0].proj.out_features,
        [(layer.proj.in_features, layer.fc1.out_features) for layer in parts.layers],
        final_norm=parts.final_norm is not None,
        num_heads=parts.num_heads,
        patch_size=parts.patch_size,
        device=weight.device,
        dtype=weight.dtype,
        training=True,
        backend=backend,
    )


def layer_weights(layer: LayerModules) -> TransformerLayerWeights:
    """The layer's current weights; separate query, key and value are concatenated (differentiable, 3·d² values)."""
    if len(layer.qkv) == 1:
        qkv_weight, qkv_bias = layer.qkv[0].weight, layer.qkv[0].bias
    else:
        qkv_weight = torch.cat([linear.weight for linear in layer.qkv])
        qkv_bias = None if layer.qkv[0].bias is None else torch.cat([linear.bias for linear in layer.qkv])
    return TransformerLayerWeights(
        layer.norm1.weight,
        layer.norm1.bias,
        qkv_weight,
        qkv_bias,
        layer.proj.weight,
        layer.proj.bias,
        layer.norm2.weight,
        layer.norm2.bias,
        layer.fc1.weight,
        layer.fc1.bias,
        layer.fc2.weight,
        layer.fc2.bias,
    )


def live_dropout(layer: LayerModules) -> LayerDropout:
    """The dropout probabilities in effect now; each dropout module has its own training flag."""
    return LayerDropout(
        _probability(layer.attention_dropout),
        _probability(layer.projection_dropout),
        _probability(layer.activation_dropout),
        _probability(layer.mlp_dropout),
        _probability(layer.path1),
        _probability(layer.path2),
        getattr(layer.path1, "scale_by_keep", True),
    )


def _probability(module: nn.Module | None) -> float:
    if module is None or not module.training:
        return 0.0
    return getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0
