# SPDX-License-Identifier: Apache-2.0
"""Kornia's ``MobileViTBlock`` (kornia.models.vit_mobile, in older releases kornia.contrib): the variant that it is.

Four heads of eight channels whatever the width, no qkv bias, batch norm and SiLU on the 1×1 into the transformer, no final
LayerNorm, dropout after SiLU too, and the block's input last in the concatenation. Maps that do not split into whole patches
are an error in Kornia, and stay one.
"""

from __future__ import annotations

from torch import Tensor, nn

from ._block import BlockParts, Inspector, LayerModules

NAME = "kornia"
BLOCK = "MobileViTBlock"
CHILDREN = ("conv1", "conv2", "transformer", "conv3", "conv4")


def parts(block: nn.Module) -> BlockParts:
    """Where Kornia keeps what; raises `Refusal` with every reason against it."""
    look = Inspector(block)
    layers, heads = [], set()
    for index in range(len(block.transformer.layers)):
        layers.append(_layer(look, f"transformer.layers.{index}", heads))
    bypassed = look.hooks(("transformer",))
    look.require(len(heads) <= 1, f"its layers have different numbers of heads: {sorted(heads)}")
    eps = look.consistent(layers, None, num_heads=next(iter(heads), 1))
    return BlockParts(
        downsampling=None,
        before=(block.conv1, block.conv2),
        layers=tuple(layers),
        final_norm=None,
        after=(block.conv3,),
        fusion=block.conv4,
        input_first=False,
        num_heads=heads.pop(),
        patch_size=(block.ph, block.pw),
        eps=eps,
        bypassed=bypassed,
    )


def takes(block: nn.Module, x: Tensor) -> bool:
    """Kornia raises on maps that do not split into whole patches: leave it its error."""
    return x.shape[-2] % block.ph == 0 and x.shape[-1] % block.pw == 0


def _layer(look: Inspector, path: str, heads: set[int]) -> LayerModules:
    attention = look.get(f"{path}.0.fn")
    if attention is not None:
        heads.add(getattr(attention, "heads", 0))
    look.silu(f"{path}.1.fn.net.1")
    return LayerModules(
        norm1=look.norm(f"{path}.0.norm"),
        qkv=(look.linear(f"{path}.0.fn.to_qkv"),),
        proj=look.linear(f"{path}.0.fn.to_out.0"),
        norm2=look.norm(f"{path}.1.norm"),
        fc1=look.linear(f"{path}.1.fn.net.0"),
        fc2=look.linear(f"{path}.1.fn.net.3"),
        projection_dropout=look.dropout(f"{path}.0.fn.to_out.1"),
        activation_dropout=look.dropout(f"{path}.1.fn.net.2"),
        mlp_dropout=look.dropout(f"{path}.1.fn.net.4"),
    )
