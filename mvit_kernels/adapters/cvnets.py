# SPDX-License-Identifier: Apache-2.0
"""Apple's cvnets ``MobileViTBlock`` (cvnets.modules.mobilevit_block, 0.1 to 0.4).

Two things are left to the block itself, call by call:

- a tuple as input, which means video (temporal mode);
- from 0.3 on, maps with as many patches as channels (S at 192 px, XXS at 128 px): cvnets' LayerNorm takes a (rows, N, d)
  tensor with N = d for a channel-first one and normalises over the patches. It moves logits by 5e-2; it is what those
  models compute, so it is kept.
"""

from __future__ import annotations

from torch import Tensor, nn

from ._block import BlockParts, Inspector, LayerModules

NAME = "cvnets"
BLOCK = "MobileViTBlock"
CHILDREN = ("local_rep", "global_rep", "conv_proj")


class _Inspector(Inspector):
    """cvnets brings its own Linear (weights as nn.Linear keeps them) and its own LayerNorm."""

    def linear(self, path: str):
        module = self.get(path)
        if module is None or type(module) is nn.Linear:
            return module
        if type(module).__name__ == "LinearLayer" and not getattr(module, "channel_first", False):
            return module
        return super().linear(path)

    def norm(self, path: str, also: tuple[type, ...] = ()):
        module = self.get(path)
        if module is None:
            return None
        own = type(module).__name__ == "LayerNorm" and isinstance(module, nn.LayerNorm)
        return super().norm(path, (type(module),) if own else ())


def parts(block: nn.Module) -> BlockParts:
    """Where cvnets keeps what; raises `Refusal` with every reason against it."""
    look = _Inspector(block)
    layers, heads = [], set()
    num_layers = len(block.global_rep) - 1
    for index in range(num_layers):
        layers.append(_layer(look, f"global_rep.{index}", heads))
    final_norm = look.norm(f"global_rep.{num_layers}")
    bypassed = look.hooks(("global_rep",))
    look.require(len(heads) <= 1, f"its layers have different numbers of heads: {sorted(heads)}")
    eps = look.consistent(layers, final_norm, num_heads=next(iter(heads), 1))
    return BlockParts(
        downsampling=None,
        before=(block.local_rep,),
        layers=tuple(layers),
        final_norm=final_norm,
        after=(block.conv_proj,),
        fusion=getattr(block, "fusion", None),
        input_first=True,
        num_heads=heads.pop(),
        patch_size=(block.patch_h, block.patch_w),
        eps=eps,
        bypassed=bypassed,
    )


def takes(block: nn.Module, x: Tensor) -> bool:
    """Not the maps on which cvnets' own LayerNorm normalises over patches."""
    norm = block.global_rep[-1]
    if type(norm).forward is nn.LayerNorm.forward:
        return True
    return -(-x.shape[-2] // block.patch_h) * -(-x.shape[-1] // block.patch_w) != norm.normalized_shape[0]


def _layer(look: Inspector, path: str, heads: set[int]) -> LayerModules:
    attention = look.get(f"{path}.pre_norm_mha.1")
    if attention is not None:
        heads.add(getattr(attention, "num_heads", 0))
    look.silu(f"{path}.pre_norm_ffn.2")
    layer = look.get(path)
    path_dropout = None
    if layer is not None and hasattr(layer, "drop_path"):
        path_dropout = look.dropout(f"{path}.drop_path", also=("StochasticDepth",))
    return LayerModules(
        norm1=look.norm(f"{path}.pre_norm_mha.0"),
        qkv=(look.linear(f"{path}.pre_norm_mha.1.qkv_proj"),),
        proj=look.linear(f"{path}.pre_norm_mha.1.out_proj"),
        norm2=look.norm(f"{path}.pre_norm_ffn.0"),
        fc1=look.linear(f"{path}.pre_norm_ffn.1"),
        fc2=look.linear(f"{path}.pre_norm_ffn.4"),
        attention_dropout=look.dropout(f"{path}.pre_norm_mha.1.attn_dropout"),
        projection_dropout=look.dropout(f"{path}.pre_norm_mha.2"),
        activation_dropout=look.dropout(f"{path}.pre_norm_ffn.3"),
        mlp_dropout=look.dropout(f"{path}.pre_norm_ffn.5"),
        path1=path_dropout,
        path2=path_dropout,
    )
