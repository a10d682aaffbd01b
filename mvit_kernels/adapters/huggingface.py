# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's ``MobileViTLayer`` (transformers.models.mobilevit): a stride-2 inverted residual and the block."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, LayerModules
from ._inspector import Inspector

NAME = "huggingface"
PACKAGE = "transformers"
BLOCK = "MobileViTLayer"
CHILDREN = ("conv_kxk", "conv_1x1", "transformer", "layernorm", "conv_projection", "fusion")


def parts(block: nn.Module) -> BlockParts:
    """The parts of a transformers block; raises `Refusal` with every reason against it."""
    look = Inspector(block, PACKAGE, BLOCK, bypassed=("transformer", "layernorm"))
    look.own("transformer", "MobileViTTransformer")
    depth = look.sequence("transformer.layer", nn.ModuleList)
    return look.parts(
        downsampling=block.downsampling_layer,
        layers=[_layer(look, f"transformer.layer.{index}") for index in range(depth)],
        final_norm=look.norm("layernorm"),
        before=(block.conv_kxk, block.conv_1x1),
        after=(block.conv_projection,),
        fusion=block.fusion,
        patch_size=(look.fact("", "patch_height"), look.fact("", "patch_width")),
    )


def _layer(look: Inspector, path: str) -> LayerModules:
    look.own(path, "MobileViTTransformerLayer")
    look.own(f"{path}.attention", "MobileViTAttention")
    look.own(f"{path}.attention.attention", "MobileViTSelfAttention")
    look.own(f"{path}.attention.output", "MobileViTSelfOutput")
    look.own(f"{path}.intermediate", "MobileViTIntermediate")
    look.own(f"{path}.output", "MobileViTOutput")
    look.silu(f"{path}.intermediate.intermediate_act_fn")
    look.heads(f"{path}.attention.attention", "num_attention_heads", head_dim="attention_head_size")
    return LayerModules(
        norm1=look.norm(f"{path}.layernorm_before"),
        qkv=tuple(look.linear(f"{path}.attention.attention.{name}") for name in ("query", "key", "value")),
        proj=look.linear(f"{path}.attention.output.dense"),
        norm2=look.norm(f"{path}.layernorm_after"),
        fc1=look.linear(f"{path}.intermediate.dense"),
        fc2=look.linear(f"{path}.output.dense"),
        attention_dropout=look.dropout(f"{path}.attention.attention.dropout"),
        projection_dropout=look.dropout(f"{path}.attention.output.dropout"),
        mlp_dropout=look.dropout(f"{path}.output.dropout"),
    )
