# SPDX-License-Identifier: Apache-2.0
"""Our own ``MobileViTBlock`` (mvit_kernels.nn). `MobileViT` accelerates its blocks on construction."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, LayerModules
from ._inspector import Inspector

NAME = "own"
PACKAGE = "mvit_kernels"
BLOCK = "MobileViTBlock"
CHILDREN = ("conv_local", "conv_in", "transformer", "norm", "conv_out", "conv_fusion")


def parts(block: nn.Module) -> BlockParts:
    """The parts of our block; raises `Refusal` with every reason against it."""
    look = Inspector(block, PACKAGE, BLOCK, bypassed=("transformer", "norm"))
    depth = look.sequence("transformer", nn.ModuleList)
    return look.parts(
        layers=[_layer(look, f"transformer.{index}") for index in range(depth)],
        final_norm=look.norm("norm"),
        before=(block.conv_local, block.conv_in),
        after=(block.conv_out,),
        fusion=block.conv_fusion,
        patch_size=look.fact("", "patch_size"),
    )


def _layer(look: Inspector, path: str) -> LayerModules:
    look.own(path, "TransformerLayer")
    look.heads(path)
    return LayerModules(
        norm1=look.norm(f"{path}.norm1"),
        qkv=(look.linear(f"{path}.qkv"),),
        proj=look.linear(f"{path}.proj"),
        norm2=look.norm(f"{path}.norm2"),
        fc1=look.linear(f"{path}.fc1"),
        fc2=look.linear(f"{path}.fc2"),
        projection_dropout=look.dropout(f"{path}.dropout"),
        mlp_dropout=look.dropout(f"{path}.dropout"),
        path1=look.dropout(f"{path}.drop_path", also="DropPath"),
        path2=look.dropout(f"{path}.drop_path", also="DropPath"),
    )
