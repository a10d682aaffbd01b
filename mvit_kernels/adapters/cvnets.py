# SPDX-License-Identifier: Apache-2.0
"""Apple's cvnets ``MobileViTBlock`` (cvnets.modules.mobilevit_block, 0.1 to 0.4).

Two kinds of input are left to the block's own forward, call by call:

- a tuple, which means video (temporal mode);
- from 0.3 on, maps with as many patches as channels (S at 192 px, XXS at 128 px). cvnets' LayerNorm mistakes a
  (rows, N, d) tensor with N = d for a channel-first one and normalizes over the patches. This moves logits by 5e-2,
  but it is what those models compute, so it is preserved.

The code is copied more often than the package is installed, typically into a ``model.py`` with a ``transformer.py``
beside it. A copy is recognized by its class name and children, and is then tested: on two random maps, in float64, it
must compute what the fast path does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils.plain import alike, copy_of
from . import _block
from ._block import BlockParts, LayerModules, Refusal, original_class
from ._inspector import Inspector

NAME = "cvnets"
PACKAGE = "cvnets"
BLOCK = "MobileViTBlock"
CHILDREN = ("local_rep", "global_rep", "conv_proj")
_tried: dict[tuple[type, ...], bool] = {}  # classes of a copy's block and of all modules below its transformer


def parts(block: nn.Module) -> BlockParts:
    """The parts of a cvnets block; raises `Refusal` with every reason against it."""
    if PACKAGE in original_class(block).__module__.split("."):
        return _read(block, PACKAGE)
    found = _read(block, "")
    # A traced block was tested when it was accelerated.
    if not torch.compiler.is_compiling() and not _is_cvnets(block, found):
        reason = (
            f"it is a {BLOCK} of {original_class(block).__module__}, which computes something different from cvnets'"
        )
        raise Refusal([reason], found.seen)
    return found


def may_be(block: nn.Module) -> bool:
    """Whether `block` may be a copy of cvnets' block in another package, by class name and children."""
    classes = [cls.__name__ for cls in type(block).__mro__]
    return (
        BLOCK in classes
        and all(block._modules.get(child) is not None for child in CHILDREN)
        and hasattr(block.global_rep, "0")
        and {"pre_norm_mha", "pre_norm_ffn"} <= getattr(block.global_rep, "0")._modules.keys()
    )


def _is_cvnets(block: nn.Module, found: BlockParts) -> bool:
    classes = (original_class(block), *(type(module) for module in found.seen.modules[1:]))
    if classes not in _tried:
        copied = copy_of(block)
        copied.__class__ = original_class(block)  # not accelerated
        channels = next(conv.in_channels for conv in copied.local_rep.modules() if hasattr(conv, "in_channels"))
        ph, pw = found.patch_size
        # 15 patches, and 6 after a resize: no block has that few channels
        _tried[classes] = alike(_Fast(copied), copied, channels, ((3 * ph, 5 * pw), (2 * ph + 1, pw + 1)))
    return _tried[classes]


class _Fast(nn.Module):
    """A copy of cvnets' block, run through the fast path."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return _block.forward(_read(self.block, ""), x, "reference")


def _read(block: nn.Module, package: str) -> BlockParts:
    look = Inspector(block, package, BLOCK, bypassed=("global_rep",))
    depth = max(look.sequence("global_rep", nn.Sequential) - 1, 0)
    return look.parts(
        layers=[_layer(look, f"global_rep.{index}") for index in range(depth)],
        final_norm=look.norm(f"global_rep.{depth}"),
        before=(block.local_rep,),
        after=(block.conv_proj,),
        fusion=getattr(block, "fusion", None),
        patch_size=(look.fact("", "patch_h"), look.fact("", "patch_w")),
    )


def takes(block: nn.Module, x: Tensor) -> bool:
    """False for maps on which cvnets' own LayerNorm would normalize over the patches."""
    norm = block.global_rep[-1]
    if type(norm).forward is nn.LayerNorm.forward:
        return True
    return -(-x.shape[-2] // block.patch_h) * -(-x.shape[-1] // block.patch_w) != norm.normalized_shape[0]


def _layer(look: Inspector, path: str) -> LayerModules:
    layer = look.own(path, "TransformerEncoder")
    look.sequence(f"{path}.pre_norm_mha", nn.Sequential, 3)
    look.own(f"{path}.pre_norm_mha.1", "MultiHeadAttention")
    look.softmax(f"{path}.pre_norm_mha.1.softmax")
    look.sequence(f"{path}.pre_norm_ffn", nn.Sequential, 6)
    look.silu(f"{path}.pre_norm_ffn.2")
    look.heads(f"{path}.pre_norm_mha.1", head_dim="head_dim", scale="scaling")
    path_dropout = None
    if hasattr(layer, "drop_path"):  # from 0.4 on
        path_dropout = look.dropout(f"{path}.drop_path", also="StochasticDepth")
    return LayerModules(
        norm1=look.norm(f"{path}.pre_norm_mha.0"),
        qkv=(_linear(look, f"{path}.pre_norm_mha.1.qkv_proj"),),
        proj=_linear(look, f"{path}.pre_norm_mha.1.out_proj"),
        norm2=look.norm(f"{path}.pre_norm_ffn.0"),
        fc1=_linear(look, f"{path}.pre_norm_ffn.1"),
        fc2=_linear(look, f"{path}.pre_norm_ffn.4"),
        attention_dropout=look.dropout(f"{path}.pre_norm_mha.1.attn_dropout"),
        projection_dropout=look.dropout(f"{path}.pre_norm_mha.2"),
        activation_dropout=look.dropout(f"{path}.pre_norm_ffn.3"),
        mlp_dropout=look.dropout(f"{path}.pre_norm_ffn.5"),
        path1=path_dropout,
        path2=path_dropout,
    )


def _linear(look: Inspector, path: str) -> nn.Module | None:
    """nn.Linear or cvnets' LinearLayer, which stores its weight alike unless it works on channel-first tensors."""
    if type(look.get(path)) is nn.Linear:
        return look.linear(path)
    linear = look.own(path, "LinearLayer")
    if linear is not None:
        look.require(not look.fact(path, "channel_first"), f"{path} is channel-first")
    return linear
