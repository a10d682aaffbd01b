# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Apple's cvnets, which is in no package registry: its module tree, names and behaviour, rewritten.

What the adapter and the checkpoint tables rely on is here: the classes' names and packages, the modules' names (so that
the state dict has cvnets' keys), the attributes that the adapter reads, a tuple as input for video, and what changed
with 0.3: the convolutional unit is called ``ConvLayer2d`` and consists of subclasses of PyTorch's layers that only
have an ``__init__`` of their own, and the LayerNorm treats any tensor whose axis 1 has the norm's width as
channel-first.
"""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _in_package(module: str):
    """Put a class where cvnets has it, so that its package is cvnets and it can be pickled."""

    def place(cls: type) -> type:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        cls.__module__ = module
        setattr(sys.modules[module], cls.__name__, cls)
        return cls

    return place


@_in_package("cvnets.layers.activation.swish")
class Swish(nn.SiLU):
    pass


@_in_package("cvnets.layers.dropout")
class Dropout(nn.Dropout):
    pass


@_in_package("cvnets.layers.identity")
class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@_in_package("cvnets.layers.stochastic_depth")
class StochasticDepth(nn.Module):
    """One draw for each row of the batch, as torchvision's, which cvnets derives from."""

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = torch.empty([x.shape[0]] + [1] * (x.dim() - 1), dtype=x.dtype).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


@_in_package("cvnets.layers.normalization.layer_norm")
class LayerNorm(nn.LayerNorm):
    """From 0.3 on: a tensor whose axis 1 has the norm's width is normalised over that axis."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2 and x.shape[1] == self.normalized_shape[0]:
            deviation, mean = torch.std_mean(x, dim=1, keepdim=True, correction=0)
            shape = [1, -1] + [1] * (x.dim() - 2)
            return (x - mean) / (deviation + self.eps) * self.weight.view(shape) + self.bias.view(shape)
        return super().forward(x)


def _plain_layer_norm() -> type[nn.LayerNorm]:
    @_in_package("cvnets.layers.normalization_layers")
    class LayerNorm(nn.LayerNorm):  # 0.1 and 0.2
        pass

    return LayerNorm


PlainLayerNorm = _plain_layer_norm()


@_in_package("cvnets.layers.linear_layer")
class LinearLayer(nn.Module):
    """Not an nn.Linear, but with a weight like one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.xavier_uniform_(self.weight)
        self.in_features, self.out_features, self.channel_first = in_features, out_features, False

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x, self.weight, self.bias)


@_in_package("cvnets.layers.conv_layer")
class Conv2d(nn.Conv2d):
    def __init__(self, *args, padding_mode: str = "zeros", **options) -> None:
        super().__init__(*args, padding_mode=padding_mode, **options)


@_in_package("cvnets.layers.normalization.batch_norm")
class BatchNorm2d(nn.BatchNorm2d):
    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)


class _Unit(nn.Module):
    conv_class: type[nn.Conv2d]
    norm_class: type[nn.BatchNorm2d]

    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1, norm=True, act=True) -> None:
        super().__init__()
        self.block = nn.Sequential()
        conv = self.conv_class(inp, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.block.add_module("conv", conv)
        if norm:
            self.block.add_module("norm", self.norm_class(out))
        if act:
            self.block.add_module("act", Swish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@_in_package("cvnets.layers.conv_layer")
class ConvLayer(_Unit):  # 0.1 and 0.2
    conv_class, norm_class = nn.Conv2d, nn.BatchNorm2d


@_in_package("cvnets.layers.conv_layer")
class ConvLayer2d(_Unit):  # from 0.3 on
    conv_class, norm_class = Conv2d, BatchNorm2d


@_in_package("cvnets.modules.mobilenetv2")
class InvertedResidual(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, expand_ratio: float, unit=ConvLayer2d) -> None:
        super().__init__()
        hidden = int(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == out
        self.block = nn.Sequential()
        self.block.add_module("exp_1x1", unit(inp, hidden, 1))
        self.block.add_module("conv_3x3", unit(hidden, hidden, 3, stride, hidden))
        self.block.add_module("red_1x1", unit(hidden, out, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.use_res_connect else self.block(x)


@_in_package("cvnets.layers.multi_head_attention")
class MultiHeadAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, attn_dropout: float) -> None:
        super().__init__()
        self.qkv_proj = LinearLayer(embed_dim, 3 * embed_dim)
        self.attn_dropout = Dropout(attn_dropout)
        self.out_proj = LinearLayer(embed_dim, embed_dim)
        self.softmax = nn.Softmax(dim=-1)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5

    def forward(self, x_q: Tensor, x_kv: Tensor | None = None) -> Tensor:
        """Self-attention, or attention to `x_kv`, both (S, N, d)."""
        q, k, v = self.qkv_proj(x_q).chunk(3, dim=-1)
        if x_kv is not None:
            _, k, v = self.qkv_proj(x_kv).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        scores = (self.scaling * q) @ k.transpose(-1, -2)
        probabilities = self.attn_dropout(self.softmax(scores))
        return self.out_proj((probabilities @ v).transpose(1, 2).flatten(2))


@_in_package("cvnets.modules.transformer")
class TransformerEncoder(nn.Module):
    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        dropout: float,
        ffn_dropout: float,
        attn_dropout: float,
        path: float,
        norm,
    ) -> None:
        super().__init__()
        attention = MultiHeadAttention(dim, heads, attn_dropout)
        self.pre_norm_mha = nn.Sequential(norm(dim), attention, Dropout(dropout))
        self.pre_norm_ffn = nn.Sequential(
            norm(dim),
            LinearLayer(dim, ffn_dim),
            Swish(),
            Dropout(ffn_dropout),
            LinearLayer(ffn_dim, dim),
            Dropout(dropout),
        )
        self.drop_path = StochasticDepth(path) if path else Identity()

    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        norm, attention, dropout = self.pre_norm_mha
        x = x + self.drop_path(dropout(attention(norm(x), x_prev)))
        return x + self.drop_path(self.pre_norm_ffn(x))


@_in_package("cvnets.modules.mobilevit_block")
class MobileViTBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        dim: int,
        depth: int,
        norm,
        fusion: bool = True,
        heads: int = 4,
        unit=ConvLayer2d,
        **dropouts,
    ) -> None:
        super().__init__()
        rates = {"dropout": 0.0, "ffn_dropout": 0.0, "attn_dropout": 0.0, "path": 0.0} | dropouts
        self.local_rep = nn.Sequential()
        self.local_rep.add_module("conv_3x3", unit(channels, channels, 3))
        self.local_rep.add_module("conv_1x1", unit(channels, dim, 1, norm=False, act=False))
        layers = [TransformerEncoder(dim, 2 * dim, heads, norm=norm, **rates) for _ in range(depth)]
        self.global_rep = nn.Sequential(*layers, norm(dim))
        self.conv_proj = unit(dim, channels, 1)
        self.fusion = unit(2 * channels, channels, 3) if fusion else None
        self.patch_h = self.patch_w = 2

    def _unfold(self, x: Tensor) -> Tensor:
        """(B, d, H, W) -> (B·P, N, d), of a map of whole patches."""
        ph, pw = self.patch_h, self.patch_w
        columns = F.unfold(x, (ph, pw), stride=(ph, pw)).unflatten(1, (x.shape[1], ph * pw))  # (B, d, P, N)
        return columns.permute(0, 2, 3, 1).flatten(0, 1)

    def _fold(self, patches: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
        patch = (self.patch_h, self.patch_w)
        columns = patches.unflatten(0, (batch, -1)).permute(0, 3, 1, 2).flatten(1, 2)
        return F.fold(columns, size, patch, stride=patch)

    def forward(self, x, *args, **kwargs):
        if isinstance(x, tuple):  # a video's frame and the patches of the one before
            return self._frame(x[0], x[1])
        return self._frame(x, None)[0]

    def _frame(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.local_rep(x)
        size = (y.shape[2], y.shape[3])
        whole = (-(-size[0] // self.patch_h) * self.patch_h, -(-size[1] // self.patch_w) * self.patch_w)
        if whole != size:
            y = F.interpolate(y, whole, mode="bilinear", align_corners=False)
        patches = self._unfold(y)
        for layer in self.global_rep:
            patches = layer(patches, previous) if isinstance(layer, TransformerEncoder) else layer(patches)
        y = self._fold(patches, x.shape[0], whole)
        if whole != size:
            y = F.interpolate(y, size, mode="bilinear", align_corners=False)
        y = self.conv_proj(y)
        return (y if self.fusion is None else self.fusion(torch.cat((x, y), dim=1))), patches


@_in_package("cvnets.layers.global_pool")
class GlobalPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


VARIANTS = {  # channels of layers 1 to 5, transformer widths, channels out, expansion
    "xxs": ((16, 24, 48, 64, 80), (64, 80, 96), 320, 2),
    "xs": ((32, 48, 64, 80, 96), (96, 120, 144), 384, 4),
    "s": ((32, 64, 96, 128, 160), (144, 192, 240), 640, 4),
}


@_in_package("cvnets.models.classification.mobilevit")
class MobileViT(nn.Module):
    """MobileViT as cvnets has it, with its keys.

    Args:
        variant: "xxs", "xs" or "s".
        num_classes: of the classifier.
        norm: `LayerNorm` (0.3 and later) or `PlainLayerNorm`.
        unit: `ConvLayer2d` (0.3 and later) or `ConvLayer`.
        dropouts: dropout, ffn_dropout, attn_dropout and path of the transformers.
    """

    def __init__(self, variant: str, num_classes: int = 1000, norm=LayerNorm, unit=ConvLayer2d, **dropouts) -> None:
        super().__init__()
        channels, dims, features, ratio = VARIANTS[variant]
        self.conv_1 = unit(3, 16, 3, 2)
        inp = 16
        for index, out in enumerate(channels):
            stride = 1 if index == 0 else 2
            layer = [InvertedResidual(inp, out, stride, ratio, unit)]
            if index == 1:
                layer += [InvertedResidual(out, out, 1, ratio, unit) for _ in range(2)]
            elif index > 1:
                layer.append(MobileViTBlock(out, dims[index - 2], (2, 4, 3)[index - 2], norm, unit=unit, **dropouts))
            self.add_module(f"layer_{index + 1}", nn.Sequential(*layer))
            inp = out
        self.conv_1x1_exp = unit(inp, features, 1)
        self.classifier = nn.Sequential()
        self.classifier.add_module("global_pool", GlobalPool())
        self.classifier.add_module("fc", nn.Linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv_1, self.layer_1, self.layer_2, self.layer_3, self.layer_4, self.layer_5):
            x = layer(x)
        return self.classifier(self.conv_1x1_exp(x))
