# SPDX-License-Identifier: Apache-2.0
"""The plain form: token rows, for runtimes with fast matrix products (ONNX Runtime, OpenVINO, PyTorch).

A block permutes its map to sequences once, and back once; linears multiply rows by weights that are already
transposed, so that no file has to; query, key and value are three slices of one product.
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
    """A float32 copy of `model` for inference in the plain form."""
    return in_form(model, plan, PlainBlock)


class PlainBlock(Block):
    """A block whose transformer works on rows (B · P, N, d): sequences of one pixel of every patch."""

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan) -> None:
        super().__init__(frozen, plan)
        self.layers = nn.ModuleList(
            TransformerLayer(weights, frozen.num_heads, frozen.eps) for weights in frozen.layers()
        )
        norm = frozen.final_norm()
        self.norm = None if norm is None else LayerNorm(*norm, frozen.eps)

    def transformer(self, x: Tensor) -> Tensor:
        batch, d, height, width = x.shape
        ph, pw = self.patch_size
        rows = x.reshape(batch, d, height // ph, ph, width // pw, pw).permute(0, 3, 5, 2, 4, 1)
        rows = rows.reshape(batch * ph * pw, (height // ph) * (width // pw), d)
        for layer in self.layers:
            rows = layer(rows)
        if self.norm is not None:
            rows = self.norm(rows)
        rows = rows.reshape(batch, ph, pw, height // ph, width // pw, d).permute(0, 5, 3, 1, 4, 2)
        return rows.reshape(batch, d, height, width)


class TransformerLayer(nn.Module):
    """Attention and MLP with pre-norm and residuals on rows (B, N, d)."""

    def __init__(self, weights: TransformerLayerWeights, num_heads: int, eps: float) -> None:
        super().__init__()
        w = weights
        self.num_heads = num_heads
        self.norm1, self.norm2 = (
            LayerNorm(w.norm1_weight, w.norm1_bias, eps),
            LayerNorm(w.norm2_weight, w.norm2_bias, eps),
        )
        self.qkv, self.proj = Linear(w.qkv_weight, w.qkv_bias), Linear(w.proj_weight, w.proj_bias)
        self.fc1, self.fc2 = Linear(w.fc1_weight, w.fc1_bias), Linear(w.fc2_weight, w.fc2_bias)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows + self.proj(self.attention(self.qkv(self.norm1(rows))))
        return rows + self.fc2(F.silu(self.fc1(self.norm2(rows))))

    def attention(self, qkv: Tensor) -> Tensor:
        batch, count, width = qkv.shape
        heads = self.num_heads
        qkv = qkv.reshape(batch, count, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return y.transpose(1, 2).reshape(batch, count, width // 3)


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
