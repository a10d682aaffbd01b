# SPDX-License-Identifier: Apache-2.0
"""The MobileViT block (paper section 3.1, figure 1b) and its transformer layer, in plain PyTorch.

`mvit_kernels.accelerate` runs the block's transformer on the operators, as for other libraries' blocks; `MobileViT`
does so on construction. This file is the plain path, which `verify` compares with and `restore` returns to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import _checks as checks
from .layers import ConvNormAct, DropPath

__all__ = ["MobileViTBlock", "TransformerLayer"]


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer: `x = x + drop(proj(MHA(norm1(x))))`, then `x + drop(fc2(silu(fc1(norm2(x)))))`.

    Example:
        >>> TransformerLayer(64)(torch.rand(4, 256, 64)).shape
        torch.Size([4, 256, 64])

    Args:
        dim: width d of a token; a multiple of `num_heads`.
        num_heads: number of attention heads, each of width `dim // num_heads`.
        mlp_ratio: width of the MLP's hidden layer relative to `dim`.
        dropout: in training, the probability of dropping an element after `proj` and after `fc2`. Attention weights
            and the hidden layer have no dropout, as in every published configuration.
        eps: epsilon of both LayerNorms.
        drop_path: in training, the probability of dropping a whole residual branch of a sequence (`DropPath`).

    `qkv` maps d to 3d: all heads' queries, then all keys, then all values, each `num_heads x head_dim`. `forward` maps
    S sequences of N tokens, `(S, N, d)`, to the same shape; an accelerated block does not call it, and reads the
    parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `dropout` or `drop_path` is outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"TransformerLayer: dim={dim} does not divide into num_heads={num_heads}; "
                "take a width that is a multiple of the number of heads"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"TransformerLayer: dropout={dropout} is not a probability; give 0 <= dropout <= 1")
        hidden = int(dim * mlp_ratio)
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequences, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(sequences, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(sequences, tokens, dim)
        x = x + self.drop_path(self.dropout(self.proj(heads)))
        return x + self.drop_path(self.dropout(self.fc2(F.silu(self.fc1(self.norm2(x))))))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class MobileViTBlock(nn.Module):
    """The paper's block: convolutions for local features, a transformer for global ones.

    Example:
        >>> MobileViTBlock(48, dim=64, depth=2)(torch.rand(1, 48, 32, 32)).shape
        torch.Size([1, 48, 32, 32])

    `conv_local` (3x3) -> `conv_in` (1x1 to width d, without norm and activation) -> `transformer`, `depth` layers in
    which a pixel attends to the pixels at the same position of all patches -> `norm` -> `conv_out` (1x1 back to C
    channels) -> concatenation with the input, which comes first -> `conv_fusion` (3x3). A map that does not divide into
    patches is resized up to one that does (bilinear, `align_corners=False`) after `conv_in`, and back after `norm`, as
    in the published models.

    Args:
        channels: channels C of the input and of the output.
        dim: width d of the transformer.
        depth: number of transformer layers L, 1 or more.
        patch_size: (height, width) of a patch, or one int for both.
        num_heads, mlp_ratio, dropout, eps, drop_path: see `TransformerLayer`; `eps` also holds for the last norm.
        dilation: dilation of `conv_local`.

    Shapes: `(B, C, H, W)` to the same, any H, W >= 1; float32, float64, bfloat16 or float16.

    Raises:
        ValueError: `depth` is below 1, `patch_size` is not of positive ints, or as `TransformerLayer`.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim: int,
        depth: int,
        patch_size: int | tuple[int, int] = (2, 2),
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
        drop_path: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"MobileViTBlock: depth={depth}; a block has at least one transformer layer")
        self.patch_size = checks.patch("MobileViTBlock", patch_size)
        self.conv_local = ConvNormAct(channels, channels, 3, dilation=dilation)
        self.conv_in = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.ModuleList(
            TransformerLayer(
                dim, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, drop_path=drop_path
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.conv_out = ConvNormAct(dim, channels)
        self.conv_fusion = ConvNormAct(2 * channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._transform(self.conv_in(self.conv_local(x)))
        return self.conv_fusion(torch.cat([x, self.conv_out(y)], dim=1))

    def _transform(self, x: torch.Tensor) -> torch.Tensor:
        """Unfold into `(B * ph * pw, N, d)`, one sequence per position within the patch; layers; norm; fold."""
        batch, dim, height, width = x.shape
        ph, pw = self.patch_size
        rows, columns = (height + ph - 1) // ph, (width + pw - 1) // pw  # ONNX would round -height // ph towards 0
        resized = (rows * ph, columns * pw) != (height, width)
        if resized:
            x = F.interpolate(x, size=(rows * ph, columns * pw), mode="bilinear", align_corners=False)
        x = x.reshape(batch, dim, rows, ph, columns, pw).permute(0, 3, 5, 2, 4, 1)
        x = x.reshape(batch * ph * pw, rows * columns, dim)
        for layer in self.transformer:
            x = layer(x)
        x = self.norm(x).reshape(batch, ph, pw, rows, columns, dim).permute(0, 5, 3, 1, 4, 2)
        x = x.reshape(batch, dim, rows * ph, columns * pw)
        if resized:
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        return x

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"
