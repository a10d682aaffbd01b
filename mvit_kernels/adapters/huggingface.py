# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's ``MobileViTLayer`` (transformers.models.mobilevit): the stride-2 inverted residual and the block."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, Inspector, LayerModules

NAME = "huggingface"
BLOCK = "MobileViTLayer"
CHILDREN = ("conv_kxk", "conv_1x1", "transformer", "layernorm", "conv_projection", "fusion")


def parts(block: nn.Module) -> BlockParts:
    """Where transformers keeps what; raises `Refusal` with every reason against it."""
    look = Inspector(block)
    layers, heads = [], set()
    for index in range(len(block.transformer.layer)):
        layers.append(_layer(look, f"transformer.layer.{index}", heads))
    final_norm = look.norm("layernorm")
    bypassed = look.hooks(("transformer", "layernorm"))
    look.require(len(heads) <= 1, f"its layers have different numbers of heads: {sorted(heads)}")
    look.require(
        isinstance(block.patch_height, int) and isinstance(block.patch_width, int),
        f"its patch size is {block.patch_height!r}, {block.patch_width!r}; transformers itself takes one int only",
    )
    eps = look.consistent(layers, final_norm, num_heads=next(iter(heads), 1))
    return BlockParts(
        downsampling=block.downsampling_layer,
        before=(block.conv_kxk, block.conv_1x1),
        layers=tuple(layers),
        final_norm=final_norm,
        after=(block.conv_projection,),
        fusion=block.fusion,
        input_first=True,
        num_heads=heads.pop(),
        patch_size=(block.patch_height, block.patch_width),
        eps=eps,
        bypassed=bypassed,
    )


def _layer(look: Inspector, path: str, heads: set[int]) -> LayerModules:
    attention = look.get(f"{path}.attention.attention")
    if attention is not None:
        heads.add(getattr(attention, "num_attention_heads", 0))
    look.silu(f"{path}.intermediate.intermediate_act_fn")
    names = ("query", "key", "value")
    return LayerModules(
        norm1=look.norm(f"{path}.layernorm_before"),
        qkv=tuple(look.linear(f"{path}.attention.attention.{name}") for name in names),
        proj=look.linear(f"{path}.attention.output.dense"),
        norm2=look.norm(f"{path}.layernorm_after"),
        fc1=look.linear(f"{path}.intermediate.dense"),
        fc2=look.linear(f"{path}.output.dense"),
        attention_dropout=look.dropout(f"{path}.attention.attention.dropout"),
        projection_dropout=look.dropout(f"{path}.attention.output.dropout"),
        mlp_dropout=look.dropout(f"{path}.output.dropout"),
    )
