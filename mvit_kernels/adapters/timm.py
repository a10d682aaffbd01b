# SPDX-License-Identifier: Apache-2.0
"""timm's ``MobileVitBlock`` (timm.models.mobilevit), with its ViT ``Block`` layers."""

from __future__ import annotations

from torch import nn

from ._block import BlockParts, Inspector, LayerModules

NAME = "timm"
BLOCK = "MobileVitBlock"
CHILDREN = ("conv_kxk", "conv_1x1", "transformer", "norm", "conv_proj")


def parts(block: nn.Module) -> BlockParts:
    """Where timm keeps what; raises `Refusal` with every reason against it."""
    look = Inspector(block)
    norms = _norm_types()
    layers, heads = [], set()
    for index in range(len(block.transformer)):
        layers.append(_layer(look, f"transformer.{index}", norms, heads))
    final_norm = look.norm("norm", norms)
    bypassed = look.hooks(("transformer", "norm"))
    look.require(len(heads) <= 1, f"its layers have different numbers of heads: {sorted(heads)}")
    eps = look.consistent(layers, final_norm, num_heads=next(iter(heads), 1))
    return BlockParts(
        downsampling=None,
        before=(block.conv_kxk, block.conv_1x1),
        layers=tuple(layers),
        final_norm=final_norm,
        after=(block.conv_proj,),
        fusion=block.conv_fusion,
        input_first=True,
        num_heads=heads.pop(),
        patch_size=tuple(block.patch_size),
        eps=eps,
        bypassed=bypassed,
    )


def _layer(look: Inspector, path: str, norms: tuple[type, ...], heads: set[int]) -> LayerModules:
    for name in ("attn.q_norm", "attn.k_norm", "attn.norm", "ls1", "ls2", "mlp.norm"):
        look.identity(f"{path}.{name}")
    look.silu(f"{path}.mlp.act")
    attn = look.get(f"{path}.attn")
    if attn is not None:
        look.require(getattr(attn, "gate", None) is None, f"{path}.attn has a gate")
        head_dim = getattr(attn, "head_dim", None)
        look.require(
            head_dim is not None and getattr(attn, "scale", None) == head_dim**-0.5,
            f"{path}.attn has another scale than head_dim ** -0.5",
        )
        heads.add(getattr(attn, "num_heads", 0))
    return LayerModules(
        norm1=look.norm(f"{path}.norm1", norms),
        qkv=(look.linear(f"{path}.attn.qkv"),),
        proj=look.linear(f"{path}.attn.proj"),
        norm2=look.norm(f"{path}.norm2", norms),
        fc1=look.linear(f"{path}.mlp.fc1"),
        fc2=look.linear(f"{path}.mlp.fc2"),
        attention_dropout=look.dropout(f"{path}.attn.attn_drop"),
        projection_dropout=look.dropout(f"{path}.attn.proj_drop"),
        activation_dropout=look.dropout(f"{path}.mlp.drop1"),
        mlp_dropout=look.dropout(f"{path}.mlp.drop2"),
        path1=look.dropout(f"{path}.drop_path1", also=("DropPath",)),
        path2=look.dropout(f"{path}.drop_path2", also=("DropPath",)),
    )


def _norm_types() -> tuple[type, ...]:
    """timm's own LayerNorm is nn.LayerNorm with a switch for apex's kernel."""
    import timm.layers

    return (timm.layers.LayerNorm,)


def registered(accelerated: type[nn.Module]) -> None:
    """timm traces models with FX for ``features_only``, and its block is a leaf there: so is ours."""
    from timm.layers import register_notrace_module

    register_notrace_module(accelerated)
