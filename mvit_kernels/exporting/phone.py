# SPDX-License-Identifier: Apache-2.0
"""The phone form: no tensor of more than four axes, for Core ML, ncnn, LiteRT and ExecuTorch.

A block in any library goes through tensors of five or six axes and transposes that phones' accelerators do not have:
ncnn does not load such a file, Core ML and LiteRT take the work away from the accelerator. Here the batch axis stays
where it is, and the tokens of a patch position are a sequence that is sliced out of the map. A layer's products,
norms and activations take all patch positions in one call, so a file has each weight once; attention takes one
position, and one head of it, after another.

In `PhoneBlock`, channels stay in front: linears are 1×1 convolutions on (B, d, P, N), LayerNorm reduces over channels,
and nothing is transposed but one operand of each product in attention, which is a flag of the product in Core ML. That
is what Apple asks for on its Neural Engine (Deploying Transformers on the Apple Neural Engine, 2022:
https://machinelearning.apple.com/research/neural-engine-transformers). In `PhoneRowsBlock`, channels are last, as in
everything in LiteRT.

LayerNorm's weight and bias, and attention's scale, are folded into the linear that reads them (in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.library import TransformerLayerWeights
from ..freezing.block import FrozenMobileViTBlock
from .forms import Block, in_form
from .plan import Plan

Mean = Literal["reduction", "convolution"]
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def phone_form(
    model: nn.Module, plan: Plan, *, one_head: bool = True, mean: Mean = "reduction", channels_last: bool = False
) -> nn.Module:
    """A float32 copy of `model` for inference in the phone form.

    Example:
        >>> network = phone_form(model, Plan(sizes=((256, 256),)))
        >>> torch.export.export(network, (torch.rand(1, 3, 256, 256),))

    Args:
        model: a MobileViT of any of the five kinds.
        plan: what it will be traced for; every size in it is fixed when it is traced.
        one_head: attend with one head at a time, as Apple asks for; False for all heads of a patch position at once,
            a quarter of the nodes where there are four. Channels last has one head at a time, of all positions.
        mean: LayerNorm's mean over channels as a "reduction", or as a 1×1 "convolution", for runtimes that reduce over
            no such axis.
        channels_last: `PhoneRowsBlock` instead of `PhoneBlock`.

    Raises:
        ValueError: `plan` has a dynamic size.
    """
    if plan.dynamic_size:
        raise ValueError("export: sizes is 'dynamic', and the phone form has fixed sizes; give one, as sizes=256")
    if channels_last:
        return in_form(model, plan, PhoneRowsBlock)
    return in_form(model, plan, lambda frozen, plan: PhoneBlock(frozen, plan, one_head=one_head, mean=mean))


class FixedBlock(Block):
    """A block in the phone form: its maps' sizes are known when it is traced.

    Raises:
        ValueError: when called with a map on which the library's own block computes something else, which needs more
            than four axes; Kornia's block raises its own error for a map that is not whole patches.
    """

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan) -> None:
        super().__init__(frozen, plan)
        # Not as a submodule: its weights would be part of what is traced.
        self.__dict__["fallback"] = self._modules.pop("fallback", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.fallback is not None and not self.takes(self.fallback, x):
            self.fallback(x)
            raise ValueError(
                f"export: a MobileViT block's map is {x.shape[2]} × {x.shape[3]} pixels, as many patches as it has "
                "channels, which cvnets' block normalizes over the patches; give another size, or a target with the "
                "plain form (onnx, openvino, torch)"
            )
        return super().forward(x)

    def layer_sizes(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """B, and (h, w) patches of (ph, pw) pixels."""
        ph, pw = self.patch_size
        return x.shape[0], x.shape[2] // ph, x.shape[3] // pw, ph, pw


class PhoneBlock(FixedBlock):
    """A block whose transformer works on (B, d, P, N): N tokens of each of P patch positions, channels in front."""

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan, *, one_head: bool = True, mean: Mean = "reduction"):
        super().__init__(frozen, plan)
        d = frozen.layers()[0].proj_weight.shape[0]
        self.layers = nn.ModuleList(
            ChannelsLayer(
                FoldedLayer(weights, frozen.num_heads), ChannelNorm(d, frozen.eps, mean, weights.fc1_weight), one_head
            )
            for weights in frozen.layers()
        )
        norm = frozen.final_norm()
        self.norm = None if norm is None else ChannelNorm(d, frozen.eps, mean, norm[0])
        self.register_buffer("weight", None if norm is None else norm[0].reshape(1, d, 1, 1))
        self.register_buffer("bias", None if norm is None else norm[1].reshape(1, d, 1, 1))

    def transformer(self, x: Tensor) -> Tensor:
        tokens = self.to_tokens(x)
        for layer in self.layers:
            tokens = layer(tokens)
        if self.norm is not None:
            tokens = self.norm(tokens) * self.weight + self.bias
        return self.to_map(tokens, x)

    def to_tokens(self, x: Tensor) -> Tensor:
        batch, h, w, ph, pw = self.layer_sizes(x)
        d = x.shape[1]
        if ph == pw > 1:  # `pixel_unshuffle` has square patches alone; accelerators have it
            return F.pixel_unshuffle(x, ph).reshape(batch, d, ph * pw, h * w)
        positions: list[Tensor] = []
        for row in _pieces(x.reshape(batch, d * h, ph, w * pw), 1, 2):
            pixels = _pieces(row.reshape(batch, d * h, w, pw), 1, 3)
            positions += [pixel.reshape(batch, d, 1, h * w) for pixel in pixels]
        return _joined(positions, 2)

    def to_map(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The inverse of `to_tokens`, in the shape of `x`."""
        batch, h, w, ph, pw = self.layer_sizes(x)
        d = x.shape[1]
        if ph == pw > 1:
            return F.pixel_shuffle(tokens.reshape(batch, d * ph * pw, h, w), ph)
        positions = [position.reshape(batch, d * h, w, 1) for position in _pieces(tokens, 1, 2)]
        rows = [_joined(positions[i * pw : (i + 1) * pw], 3).reshape(batch, d * h, 1, w * pw) for i in range(ph)]
        return _joined(rows, 2).reshape(x.shape)


class PhoneRowsBlock(FixedBlock):
    """A block whose transformer works on (B, P · N, d): N tokens of each of P patch positions, channels last.

    Only in attention do positions have an axis of their own: litert_torch does not convert a linear of (B, P, 1, d).
    """

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan) -> None:
        super().__init__(frozen, plan)
        self.layers = nn.ModuleList(
            RowsLayer(FoldedLayer(weights, frozen.num_heads), frozen.eps, self.patch_size[0] * self.patch_size[1])
            for weights in frozen.layers()
        )
        weight, bias = frozen.final_norm() or (None, None)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def transformer(self, x: Tensor) -> Tensor:
        batch, h, w, ph, pw = self.layer_sizes(x)
        d, width = x.shape[1], w * pw
        rows = x.permute(0, 2, 3, 1).reshape(batch, h, ph * width, d)
        positions: list[Tensor] = []
        for row in _pieces(rows, width, 2):
            positions += _pieces(row.reshape(batch, 1, h * w, pw * d), d, 3)
        tokens = _joined(positions, 1).reshape(batch, ph * pw * h * w, d)
        for layer in self.layers:
            tokens = layer(tokens)
        if self.weight is not None:
            tokens = normalized(tokens, self.eps, axis=2) * self.weight + self.bias
        positions = _pieces(tokens.reshape(batch, ph * pw, h * w, d), 1, 1)
        rows_of = [_joined(positions[i * pw : (i + 1) * pw], 3).reshape(batch, h, width, d) for i in range(ph)]
        return _joined(rows_of, 2).reshape(batch, h * ph, width, d).permute(0, 3, 1, 2)


class FoldedLayer:
    """A layer's four linears, (weight, bias) each, behind norms without weight and bias, and attention without scale.

    The rows of `qkv` are the queries of every head, the keys, and the values.
    """

    def __init__(self, w: TransformerLayerWeights, num_heads: int) -> None:
        self.num_heads, self.head_dim = num_heads, w.qkv_weight.shape[0] // (3 * num_heads)
        weight, bias = _behind(w.norm1_weight, w.norm1_bias, w.qkv_weight, w.qkv_bias)
        scale = torch.ones_like(bias)
        scale[: num_heads * self.head_dim] = self.head_dim**-0.5  # the queries'
        dtype = w.qkv_weight.dtype
        self.qkv = (weight * scale[:, None]).to(dtype), (bias * scale).to(dtype)
        self.proj = w.proj_weight, w.proj_bias
        weight, bias = _behind(w.norm2_weight, w.norm2_bias, w.fc1_weight, w.fc1_bias)
        self.fc1 = weight.to(dtype), bias.to(dtype)
        self.fc2 = w.fc2_weight, w.fc2_bias


def _behind(gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float64 of a linear with its LayerNorm's weight and bias folded in."""
    exact = weight.double()
    folded = exact @ beta.double()
    return exact * gamma.double(), folded if bias is None else folded + bias.double()


def normalized(x: Tensor, eps: float, axis: int) -> Tensor:
    """LayerNorm over `axis`, without weight and bias, written out."""
    x = x - x.mean(axis, keepdim=True)
    return x * torch.rsqrt((x * x).mean(axis, keepdim=True) + eps)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, d, P, N), without weight and bias."""

    average: Tensor | None

    def __init__(self, d: int, eps: float, mean: Mean, like: Tensor) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("average", like.new_full((1, d, 1, 1), 1 / d) if mean == "convolution" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.average is None:
            return normalized(x, self.eps, axis=1)
        x = x - F.conv2d(x, self.average)
        return x * torch.rsqrt(F.conv2d(x * x, self.average) + self.eps)


class ChannelsLayer(nn.Module):
    """Attention and MLP with pre-norm and residuals on (B, d, P, N)."""

    def __init__(self, layer: FoldedLayer, norm: ChannelNorm, one_head: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = layer.num_heads, layer.head_dim
        self.together = 1 if one_head else layer.num_heads  # heads in a product
        self.norm = norm
        self.qkv, self.proj = _convolution(*layer.qkv), _convolution(*layer.proj)
        self.fc1, self.fc2 = _convolution(*layer.fc1), _convolution(*layer.fc2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.proj(self.attention(self.qkv(self.norm(tokens))))
        return tokens + self.fc2(F.silu(self.fc1(self.norm(tokens))))

    def attention(self, qkv: Tensor) -> Tensor:
        batch, _, _, count = qkv.shape
        heads, step = self.num_heads, self.together
        attended = []
        for of_position in _pieces(qkv, 1, 2):
            qkv_p = of_position.reshape(batch, 3 * heads, self.head_dim, count)
            parts, of_heads = qkv_p.split(step, 1), []
            for q, k, v in zip(*_thirds(parts), strict=True):
                shares = (q.transpose(2, 3) @ k).softmax(-1)
                of_heads.append(v @ shares.transpose(2, 3))
            attended.append(_joined(of_heads, 1).reshape(batch, heads * self.head_dim, 1, count))
        return _joined(attended, 2)


class RowsLayer(nn.Module):
    """Attention and MLP with pre-norm and residuals on (B, P · N, d)."""

    def __init__(self, layer: FoldedLayer, eps: float, positions: int) -> None:
        super().__init__()
        self.head_dim, self.eps, self.positions = layer.head_dim, eps, positions
        self.qkv, self.proj = _linear(*layer.qkv), _linear(*layer.proj)
        self.fc1, self.fc2 = _linear(*layer.fc1), _linear(*layer.fc2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.proj(self.attention(self.qkv(normalized(tokens, self.eps, axis=2))))
        return tokens + self.fc2(F.silu(self.fc1(normalized(tokens, self.eps, axis=2))))

    def attention(self, qkv: Tensor) -> Tensor:
        batch, rows, width = qkv.shape
        parts = qkv.reshape(batch, self.positions, rows // self.positions, width).split(self.head_dim, 3)
        heads = [(q @ k.transpose(2, 3)).softmax(-1) @ v for q, k, v in zip(*_thirds(parts), strict=True)]
        return _joined(heads, 3).reshape(batch, rows, width // 3)


def _pieces(x: Tensor, size: int, axis: int) -> Sequence[Tensor]:
    """`x` in pieces along an axis; a single piece is `x`, whose alias in a program coremltools does not know."""
    return (x,) if x.shape[axis] == size else x.split(size, axis)


def _joined(pieces: Sequence[Tensor], axis: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), axis)


def _thirds(parts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Queries, keys and values, of parts in that order."""
    count = len(parts) // 3
    return parts[:count], parts[count : 2 * count], parts[2 * count :]


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A linear layer as a 1×1 convolution."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    return _with(conv, weight[:, :, None, None], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _with(linear, weight, bias)


def _with(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
