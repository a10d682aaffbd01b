# SPDX-License-Identifier: Apache-2.0
"""The weights of ``transformer`` in the order in which its CUDA kernel reads them; plain PyTorch, on any device.

Example:
    >>> packed = pack_transformer(layers, (norm.weight, norm.bias), num_heads=4, dtype=torch.bfloat16)

``csrc/cuda/transformer.h`` defines chunks and their sizes, ``fragments.h`` defines fragments. Folded in, once and in
float64: LayerNorm's weight into the matrix behind it and its bias into that layer's bias, with column sums of the
rounded matrix to subtract the mean; the scale of the scores and log2(e) into the query; a factor of 1/2 into fc1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import TransformerLayerWeights
from .plans import HIDDEN_CHUNK, Layout

VERSION = 1  # of this order; kTransformerVersion in csrc/cuda/transformer.h must equal it
HEADS = 4


def columns_of(layout: Layout, device: torch.device) -> Tensor:
    """The column of a row at each place of the tiles; `width` where a place is padding.

    A lane has eight adjacent columns of two tiles side by side, or four of a single tile.
    """
    place = torch.arange(layout.padded, device=device)
    tile, of_lane, two = place // 16, place % 8 // 2, place // 8 % 2 * 2 + place % 2
    in_pair = tile // 2 * 2 + 1 < layout.tiles
    paired = tile // 2 * 32 + 8 * of_lane + tile % 2 * 4 + two
    return torch.where(in_pair, paired, 16 * tile + 4 * of_lane + two).clamp(max=layout.width)


def pack_transformer(
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """All weights of a stack as one uint8 tensor, on their device.

    Args:
        layers, final_norm: as in `mvit_kernels.transformer`, of any floating dtype; an absent qkv bias may also be a
            tensor without elements.
        num_heads: 4.
        dtype: bfloat16 or float16, of the rows and of the packed matrices.

    Returns:
        `Layout.packed_bytes` bytes.

    Raises:
        ValueError: `num_heads` is not 4.
    """
    if num_heads != HEADS:
        raise ValueError(f"pack_transformer: num_heads is {num_heads}; the kernel has {HEADS}")
    width, head_dim = layers[0].proj_weight.shape[0], layers[0].proj_weight.shape[1] // num_heads
    layout = Layout(width, head_dim)
    columns = columns_of(layout, layers[0].proj_weight.device)
    parts = [part for layer in layers for part in _layer(layer, layout, columns, dtype)]
    vectors = [layer.fc2_bias for layer in layers]
    vectors += final_norm or (layers[0].fc2_bias.new_zeros(width),) * 2
    parts += [_rows(vector.double(), columns).float() for vector in vectors]
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def _layer(layer: TransformerLayerWeights, layout: Layout, columns: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The chunks of a layer, in order."""
    doubles: list[Any] = [None if tensor is None else tensor.detach().double() for tensor in layer]
    wide = TransformerLayerWeights(*doubles)
    inner, hidden = wide.proj_weight.shape[1], wide.fc1_weight.shape[0]
    bias = (
        wide.qkv_bias if wide.qkv_bias is not None and wide.qkv_bias.numel() else wide.qkv_weight.new_zeros(3 * inner)
    )
    weight, bias = _behind_norm(wide.norm1_weight, wide.norm1_bias, wide.qkv_weight, bias)
    scale = weight.new_ones(3, 1, 1)
    scale[0] = layout.head_dim**-0.5 / math.log(2)
    weight = _heads(weight.view(3, inner, -1) * scale, layout).to(dtype)  # (3, heads, head, width)
    bias = _heads((bias.view(3, inner, 1) * scale), layout).squeeze(-1)

    parts = []
    for head in range(HEADS):
        kv = _columns(weight[1:, head].flatten(0, 1), columns)
        vectors = _vectors(kv, bias[1:, head].flatten())
        for part in kv.chunk(layout.kv_parts, 1):
            parts += [_by_step(part), vectors]
        query = _columns(weight[0, head], columns)
        parts += [_by_step(query), _vectors(query, bias[0, head])]

    # Out-projection: for each tile of 16 columns, the rows of all heads; the 8 left over in a head as half fragments.
    proj = _heads(wide.proj_weight.t(), layout).to(dtype)  # (heads, head, width)
    proj = _rows(proj.movedim(-1, 0), columns)  # (padded, heads, head)
    proj_bias = _rows(wide.proj_bias, columns).float()
    whole = layout.head // 16 * 16
    matrices = []  # (tiles, heads, …) each
    if whole:
        steps = fragments(proj[..., :whole].flatten(1)).unflatten(0, (-1, 2)).transpose(1, 2)
        matrices.append(joined(steps).unflatten(1, (HEADS, -1)).flatten(2))
    if whole < layout.head:
        matrices.append(half_fragments(proj[..., whole:].flatten(1)).unflatten(0, (-1, 2)).movedim(1, -2).flatten(2))
    matrix = torch.cat(matrices, 2).flatten(1)
    parts.append(torch.cat([matrix.view(torch.uint8), proj_bias.view(-1, 16).view(torch.uint8)], 1))

    weight, bias = _behind_norm(wide.norm2_weight, wide.norm2_bias, wide.fc1_weight, wide.fc1_bias)
    more = -hidden % HIDDEN_CHUNK
    fc1 = _columns(F.pad(weight / 2, (0, 0, 0, more)).to(dtype), columns)
    fc1_bias = F.pad(bias / 2, (0, more))
    fc2 = _rows(F.pad(wide.fc2_weight, (0, more)).to(dtype), columns)
    for at in range(0, hidden, HIDDEN_CHUNK):
        chunk = slice(at, at + HIDDEN_CHUNK)
        parts += [_by_step(fc1[chunk]), joined(fragments(fc2[:, chunk])), _vectors(fc1[chunk], fc1_bias[chunk])]
    return parts


def _behind_norm(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and bias that act on (x − mean) / σ, with LayerNorm's weight and bias folded in."""
    return weight * norm_weight, bias + weight @ norm_bias


def _heads(rows: Tensor, layout: Layout) -> Tensor:
    """(…, inner, k) -> (…, heads, head, k), padded with zeros."""
    return F.pad(rows.unflatten(-2, (HEADS, layout.head_dim)), (0, 0, 0, layout.head - layout.head_dim))


def _rows(tensor: Tensor, columns: Tensor) -> Tensor:
    """The rows of `tensor` in the order of `columns`, zeros where a place is padding."""
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])[columns]


def _columns(weight: Tensor, columns: Tensor) -> Tensor:
    """The columns of (n, width) in the order of `columns`."""
    return _rows(weight.t(), columns).t()


def fragments(weight: Tensor) -> Tensor:
    """(n, k) -> (n / 8, k / 16, 32, 4): what each lane holds of the 16 × 8 blocks of b, where b = weightᵀ."""
    blocks = weight.unflatten(0, (-1, 8)).unflatten(2, (-1, 2, 4, 2))  # n, g, k, of eight, t, of two
    return blocks.permute(0, 2, 1, 4, 3, 5).reshape(*blocks.shape[:3:2], 32, 4)


def half_fragments(weight: Tensor) -> Tensor:
    """(n, k) -> (n / 8, k / 8, 32, 2): the same for 8 × 8 blocks."""
    blocks = weight.unflatten(0, (-1, 8)).unflatten(2, (-1, 4, 2))
    return blocks.permute(0, 2, 1, 3, 4).reshape(*blocks.shape[:3:2], 32, 2)


def joined(group: Tensor) -> Tensor:
    """(…, count, 32, 4) -> (…, count · 128): fragments that are read together, two side by side in each lane."""
    even = group.shape[-3] // 2 * 2
    pairs = group[..., :even, :, :].unflatten(-3, (-1, 2)).transpose(-3, -2)
    return torch.cat([pairs.flatten(-4), group[..., even:, :, :].flatten(-3)], -1)


def _by_step(weight: Tensor) -> Tensor:
    """(n, k) -> for each 16 of k, the fragments of all n."""
    return joined(fragments(weight).transpose(0, 1))


def _vectors(weight: Tensor, bias: Tensor) -> Tensor:
    """For each eight columns of the product and each t: two column sums of the rounded matrix, and two biases."""
    sums = weight.double().sum(1)
    return torch.cat([sums.view(-1, 4, 2), bias.view(-1, 4, 2)], 2).float()
