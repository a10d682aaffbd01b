# SPDX-License-Identifier: Apache-2.0
"""Kornia's ``MobileViTBlock`` (kornia.models.vit_mobile; in older releases kornia.contrib), a variant of the network.

It has four heads of eight channels at any width, no qkv bias, batch norm and SiLU on the 1×1 convolution into the
transformer, no final LayerNorm, an additional dropout after SiLU, and the block's input last in the concatenation.
Kornia raises an error for maps that do not divide into whole patches, and still does when accelerated.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from .._utils.compiling import assume_constant_result
from ._block import BlockParts, LayerModules
from ._inspector import Inspector

NAME = "kornia"
PACKAGE = "kornia"
BLOCK = "MobileViTBlock"
CHILDREN = ("conv1", "conv2", "transformer", "conv3", "conv4")


def parts(block: nn.Module) -> BlockParts:
    """The parts of a Kornia block; raises `Refusal` with every reason against it."""
    look = Inspector(block, PACKAGE, BLOCK, bypassed=("transformer",))
    look.require(_release() >= (0, 6, 10), "Kornia unfolded maps wrongly before 0.6.10; upgrade it")
    look.own("transformer", "Transformer")
    depth = look.sequence("transformer.layers", nn.ModuleList)
    return look.parts(
        layers=[_layer(look, f"transformer.layers.{index}") for index in range(depth)],
        final_norm=None,
        before=(block.conv1, block.conv2),
        after=(block.conv3,),
        fusion=block.conv4,
        input_first=False,
        patch_size=(look.fact("", "ph"), look.fact("", "pw")),
    )


@assume_constant_result
def _release() -> tuple[int, ...]:
    """Kornia's version. A block exists, so the package has been imported."""
    numbers = sys.modules["kornia"].__version__.split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, number)) or 0) for number in numbers)


def takes(block: nn.Module, x: Tensor) -> bool:
    """Whether the map divides into whole patches; for others Kornia's own forward raises its error."""
    return x.shape[-2] % block.ph == 0 and x.shape[-1] % block.pw == 0


def _layer(look: Inspector, path: str) -> LayerModules:
    look.sequence(path, nn.ModuleList, 2)
    look.own(f"{path}.0", "PreNorm")
    look.own(f"{path}.0.fn", "Attention")
    look.softmax(f"{path}.0.fn.attend")
    look.sequence(f"{path}.0.fn.to_out", nn.Sequential, 2)
    look.own(f"{path}.1", "PreNorm")
    look.own(f"{path}.1.fn", "FeedForward")
    look.sequence(f"{path}.1.fn.net", nn.Sequential, 5)
    look.silu(f"{path}.1.fn.net.1")
    look.heads(f"{path}.0.fn", "heads", scale="scale")
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
