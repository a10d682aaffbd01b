# SPDX-License-Identifier: Apache-2.0
"""The plain form: token rows, for runtimes with fast matrix products (ONNX Runtime, OpenVINO, PyTorch).

Linears multiply rows by weights that are transposed once, here; query, key and value are thirds of one product's heads;
no tensor has more than four axes. Compared with timm's own graph on one core of an Intel Xeon (AVX-512), 256 px,
batch 1, CPU time, candidates taking turns:

- The map becomes channels-last, then sequences by two permutes that move rows of d or 2·d channels whole, and back
  alike. One permute of six axes moves single numbers: 4 to 5 % of XXS in both runtimes, although it is fewer nodes.
- Attention as ONNX's operator (opset 23) takes rows as they are: 3 transposes a layer less, and 2 to 3 % in ONNX
  Runtime; nothing in OpenVINO. `targets.onnx` says why it is not the default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.library import TransformerLayerWeights
from ..freezing.block import FrozenMobileViTBlock
from .forms import Block, in_form
from .plan import Plan


def plain_form(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` for inference in the plain form; see `forms.in_form`."""
    return in_form(model, plan, PlainBlock)


class PlainBlock(Block):
    """A block whose transformer works on rows (B · P, N, d): sequences of one pixel of every patch."""

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan) -> None:
        super().__init__(frozen, plan)
        self.layers = nn.ModuleList(
            TransformerLayer(weights, frozen.num_heads, frozen.eps, plan.attention) for weights in frozen.layers()
        )
        norm = frozen.final_norm()
        self.norm = None if norm is None else LayerNorm(*norm, frozen.eps)

    def transformer(self, x: Tensor) -> Tensor:
        batch, d, height, width = x.shape
        ph, pw = self.patch_size
        down, across = height // ph, width // pw  # patches
        rows = x.permute(0, 2, 3, 1).reshape(batch * down, ph, across, pw * d).transpose(1, 2)
        rows = rows.reshape(batch, down * across, ph * pw, d).transpose(1, 2)
        rows = rows.reshape(batch * ph * pw, down * across, d)
        for layer in self.layers:
            rows = layer(rows)
        if self.norm is not None:
            rows = self.norm(rows)
        rows = rows.reshape(batch, ph * pw, down * across, d).transpose(1, 2)
        rows = rows.reshape(batch * down, across, ph, pw * d).transpose(1, 2)
        return rows.reshape(batch, height, width, d).permute(0, 3, 1, 2)


class TransformerLayer(nn.Module):
    """Attention and MLP with pre-norm and residuals on rows (B, N, d); `attention` is the name of one of its ways."""

    def __init__(self, weights: TransformerLayerWeights, num_heads: int, eps: float, attention: str) -> None:
        super().__init__()
        w = weights
        self.num_heads, self.way = num_heads, attention
        self.norm1, self.norm2 = (
            LayerNorm(w.norm1_weight, w.norm1_bias, eps),
            LayerNorm(w.norm2_weight, w.norm2_bias, eps),
        )
        self.qkv, self.proj = Linear(w.qkv_weight, w.qkv_bias), Linear(w.proj_weight, w.proj_bias)
        self.fc1, self.fc2 = Linear(w.fc1_weight, w.fc1_bias), Linear(w.fc2_weight, w.fc2_bias)

    def forward(self, rows: Tensor) -> Tensor:
        attended = getattr(self, self.way)(self.qkv(self.norm1(rows)))
        rows = rows + self.proj(attended)
        return rows + self.fc2(F.silu(self.fc1(self.norm2(rows))))

    def products(self, qkv: Tensor) -> Tensor:
        """Attention as two products and a softmax, (B, N, 3 · inner) to (B, N, inner)."""
        q, k, v = self._heads(qkv)
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        return self._rows(torch.matmul(scores.softmax(-1), v))

    def pytorch(self, qkv: Tensor) -> Tensor:
        """Attention as PyTorch's operator."""
        return self._rows(F.scaled_dot_product_attention(*self._heads(qkv)))

    def onnx(self, qkv: Tensor) -> Tensor:
        """Attention as ONNX's operator, which takes rows, with the heads side by side."""
        q, k, v = qkv.chunk(3, -1)
        return torch.onnx.ops.attention(q, k, v, q_num_heads=self.num_heads, kv_num_heads=self.num_heads)[0]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, heads, N, head_dim)."""
        batch, count, width = qkv.shape
        q, k, v = (
            qkv.reshape(batch, count, 3 * self.num_heads, width // (3 * self.num_heads)).transpose(1, 2).chunk(3, 1)
        )
        return q, k, v

    def _rows(self, heads: Tensor) -> Tensor:
        batch, num_heads, count, width = heads.shape
        return heads.transpose(1, 2).reshape(batch, count, num_heads * width)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(nn.Module):
    """A linear layer whose weight (in, out) is transposed once, here."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor) -> Tensor:
        y = torch.matmul(rows, self.weight)
        return y if self.bias is None else y + self.bias
