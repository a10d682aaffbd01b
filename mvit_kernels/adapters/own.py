# SPDX-License-Identifier: Apache-2.0
"""Our own ``MobileViTBlock`` (mvit_kernels.nn): born on the operators; `restore` gives it the textbook path."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, Inspector, LayerModules

NAME = "own"
BLOCK = "MobileViTBlock"
CHILDREN = ("conv_local", "conv_in", "transformer", "norm", "conv_out", "conv_fusion")


def parts(block: nn.Module) -> BlockParts:
    """Where our block keeps what; raises `Refusal` with every reason against it."""
    look = Inspector(block)
    layers, heads = [], set()
    for index, layer in enumerate(block.transformer):
        path = f"transformer.{index}"
        heads.add(layer.num_heads)
        layers.append(
            LayerModules(
                norm1=look.norm(f"{path}.norm1"),
                qkv=(look.linear(f"{path}.qkv"),),
                proj=look.linear(f"{path}.proj"),
                norm2=look.norm(f"{path}.norm2"),
                fc1=look.linear(f"{path}.fc1"),
                fc2=look.linear(f"{path}.fc2"),
                projection_dropout=look.dropout(f"{path}.dropout"),
                mlp_dropout=look.dropout(f"{path}.dropout"),
            )
        )
    final_norm = look.norm("norm")
    bypassed = look.hooks(("transformer", "norm"))
    look.require(len(heads) <= 1, f"its layers have different numbers of heads: {sorted(heads)}")
    eps = look.consistent(layers, final_norm, num_heads=next(iter(heads), 1))
    return BlockParts(
        downsampling=None,
        before=(block.conv_local, block.conv_in),
        layers=tuple(layers),
        final_norm=final_norm,
        after=(block.conv_out,),
        fusion=block.conv_fusion,
        input_first=True,
        num_heads=heads.pop(),
        patch_size=tuple(block.patch_size),
        eps=eps,
        bypassed=bypassed,
    )
