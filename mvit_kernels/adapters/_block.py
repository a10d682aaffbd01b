# SPDX-License-Identifier: Apache-2.0
"""What the adapters share: a library's block as plain parts, the checks of those parts, and the block's fast forward.

An adapter says where a library keeps the parts of its block (`BlockParts`); everything else is here. Parts are read from
the modules at every call, so that optimizers, FSDP, EMA or a user may replace parameters at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.functional import LayerDropout, transformer_on_map
from ..ops import TransformerLayerWeights


class LayerModules(NamedTuple):
    """One transformer layer of a library, as the modules that hold its weights and its dropout."""

    norm1: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]  # one Linear, or query, key and value
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


class BlockParts(NamedTuple):
    """A MobileViT block of some library: ``fusion(cat(x, after(transformer(before(x)))))``.

    `bypassed` are the modules that the fast path does not call, each with its path inside the block: nobody's hook on one
    of them may be left without its call.
    """

    downsampling: nn.Module | None  # Hugging Face keeps the stride-2 inverted residual inside the block
    before: tuple[nn.Module, ...]
    layers: tuple[LayerModules, ...]
    final_norm: nn.LayerNorm | None
    after: tuple[nn.Module, ...]
    fusion: nn.Module | None
    input_first: bool  # the order of the concatenation
    num_heads: int
    patch_size: tuple[int, int]
    eps: float
    bypassed: tuple[tuple[str, nn.Module], ...]


class Refusal(Exception):
    """A block that the fast path would get wrong; `reasons` say why."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("; ".join(self.reasons))


class Inspector:
    """Collects the reasons against a block while an adapter reads its parts; paths are relative to the block.

    Types are compared exactly: a quantised, LoRA-wrapped or parametrised linear is another type, and computes something else.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.reasons: list[str] = []

    def get(self, path: str) -> nn.Module | None:
        """The submodule at `path`, None (and a reason) if there is none."""
        try:
            return self.block.get_submodule(path)
        except AttributeError:
            self.reasons.append(f"it has no {path}")
            return None

    def linear(self, path: str) -> nn.Linear | None:
        return self._exact(path, (nn.Linear,), "a quantised, LoRA-wrapped or parametrised linear computes something else")

    def norm(self, path: str, also: tuple[type, ...] = ()) -> nn.LayerNorm | None:
        norm = self._exact(path, (nn.LayerNorm, *also), "only LayerNorm is fused")
        if norm is not None and (norm.weight is None or norm.bias is None):
            self.reasons.append(f"{path} has no weight or no bias")
        if norm is not None and len(norm.normalized_shape) != 1:
            self.reasons.append(f"{path} normalises over {len(norm.normalized_shape)} axes; only the last is fused")
        return norm

    def silu(self, path: str) -> None:
        module = self.get(path)
        if module is not None and type(module).__name__ not in ("SiLU", "SiLUActivation", "Swish"):
            self.reasons.append(f"{path} is {type(module).__name__}; only SiLU is fused")

    def dropout(self, path: str, also: tuple[str, ...] = ()) -> nn.Module | None:
        module = self.get(path)
        if module is not None and type(module).__name__ not in ("Dropout", "Identity", *also):
            self.reasons.append(f"{path} is {type(module).__name__}; only Dropout is known there")
        return module

    def identity(self, path: str) -> None:
        module = self.get(path)
        if module is not None and type(module) is not nn.Identity:
            self.reasons.append(f"{path} is {type(module).__name__}; the fast path has no such step")

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            self.reasons.append(reason)

    def _exact(self, path: str, types: tuple[type, ...], why: str):
        module = self.get(path)
        if module is None or type(module) in types:
            return module
        self.reasons.append(f"{path} is {type(module).__module__}.{type(module).__name__}; {why}")
        return None

    def hooks(self, paths: Iterable[str]) -> tuple[tuple[str, nn.Module], ...]:
        """The modules at and below `paths`, none of which the fast path calls; a reason for each that carries a hook."""
        bypassed = []
        for path in paths:
            root = self.get(path)
            for name, module in root.named_modules() if root is not None else ():
                full = f"{path}.{name}" if name else path
                bypassed.append((full, module))
                if has_hooks(module):
                    self.reasons.append(f"{full} carries a hook, which would no longer be called; put it on the block")
        return tuple(bypassed)

    def consistent(self, layers: list[LayerModules], final_norm: nn.LayerNorm | None, num_heads: int) -> float:
        """Widths fit and every LayerNorm has one eps, which is returned; call it when nothing was refused so far."""
        if self.reasons:
            raise Refusal(self.reasons)
        self.require(bool(layers), "it has no transformer layers")
        norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
        norms += [final_norm] if final_norm is not None else []
        self.require(len({norm.eps for norm in norms}) <= 1, "its LayerNorms have different eps")
        for index, layer in enumerate(layers):
            d, inner = layer.norm1.normalized_shape[0], layer.proj.in_features
            fits = (
                sum(linear.out_features for linear in layer.qkv) == 3 * inner
                and all(linear.in_features == d for linear in (*layer.qkv, layer.fc1))
                and len({linear.bias is None for linear in layer.qkv}) == 1
                and inner % num_heads == 0
                and layer.proj.out_features == layer.fc2.out_features == d
                and layer.fc1.out_features == layer.fc2.in_features
            )
            self.require(fits, f"the widths of layer {index} do not fit together (pruned heads?)")
            biases = all(linear.bias is not None for linear in (layer.proj, layer.fc1, layer.fc2))
            self.require(biases, f"a linear of layer {index} has no bias")
        if self.reasons:
            raise Refusal(self.reasons)
        return norms[0].eps


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is to be called around the module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def forward(block: nn.Module, parts: BlockParts, x: Tensor, backend: str | None) -> Tensor:
    """The block on a (B, C, H, W) map, its transformer by `transformer_on_map`. Convolutions stay the library's own."""
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
        dropout=[live_dropout(layer) for layer in parts.layers] if block.training else None,
        backend=backend,
    )
    for module in parts.after:
        y = module(y)
    if parts.fusion is None:
        return y
    return parts.fusion(torch.cat((x, y) if parts.input_first else (y, x), dim=1))


def layer_weights(layer: LayerModules) -> TransformerLayerWeights:
    """The layer's present weights; separate query, key and value are joined (a copy of 3·d² values, differentiable)."""
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
    """The probabilities in force now: each dropout module has its own training flag."""
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
