# SPDX-License-Identifier: Apache-2.0
"""timm's ``MobileVitBlock`` (timm.models.mobilevit), with its ViT ``Block`` layers."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, LayerModules
from ._inspector import Inspector

NAME = "timm"
PACKAGE = "timm"
BLOCK = "MobileVitBlock"
CHILDREN = ("conv_kxk", "conv_1x1", "transformer", "norm", "conv_proj")


def parts(block: nn.Module) -> BlockParts:
    """The parts of a timm block; raises `Refusal` with every reason against it."""
    look = Inspector(block, PACKAGE, BLOCK, bypassed=("transformer", "norm"))
    depth = look.sequence("transformer", nn.Sequential)
    return look.parts(
        layers=[_layer(look, f"transformer.{index}") for index in range(depth)],
        final_norm=look.norm("norm"),
        before=(block.conv_kxk, block.conv_1x1),
        after=(block.conv_proj,),
        fusion=block.conv_fusion,
        patch_size=look.fact("", "patch_size"),
    )


def _layer(look: Inspector, path: str) -> LayerModules:
    look.own(path, "Block")
    look.own(f"{path}.attn", "Attention")
    look.own(f"{path}.mlp", "Mlp")
    look.absent(path, "ls1")
    look.absent(path, "ls2")
    look.absent(f"{path}.mlp", "norm")
    for name in ("q_norm", "k_norm", "norm", "gate"):
        look.absent(f"{path}.attn", name)
    look.silu(f"{path}.mlp.act")
    look.heads(f"{path}.attn", head_dim="head_dim", scale="scale")
    return LayerModules(
        norm1=look.norm(f"{path}.norm1"),
        qkv=(look.linear(f"{path}.attn.qkv"),),
        proj=look.linear(f"{path}.attn.proj"),
        norm2=look.norm(f"{path}.norm2"),
        fc1=look.linear(f"{path}.mlp.fc1"),
        fc2=look.linear(f"{path}.mlp.fc2"),
        attention_dropout=look.dropout(f"{path}.attn.attn_drop"),
        projection_dropout=look.dropout(f"{path}.attn.proj_drop"),
        activation_dropout=look.dropout(f"{path}.mlp.drop1"),
        mlp_dropout=look.dropout(f"{path}.mlp.drop2"),
        path1=look.dropout(f"{path}.drop_path1", also="DropPath"),
        path2=look.dropout(f"{path}.drop_path2", also="DropPath"),
    )
