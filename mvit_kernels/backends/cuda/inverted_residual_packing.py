# SPDX-License-Identifier: Apache-2.0
"""The weights of ``inverted_residual`` in the order in which its CUDA kernel reads them; plain PyTorch, on any device.

Example:
    >>> packed = pack_inverted_residual(*expand, *depthwise, *project, dtype=torch.bfloat16)  # each a (weight, bias)

``csrc/cuda/inverted_residual.h`` defines chunks and their sizes, ``fragments.h`` defines fragments. What precedes a
SiLU is halved, once and in float64: silu(2u) = u + u · tanh u.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import fragments, joined

VERSION = 1  # of this order; kInvertedResidualVersion in csrc/cuda/inverted_residual.h must equal it
CHUNK = 32  # expanded channels at a time
HALF_LIMIT = 65520.0  # from here on float16 rounds to infinity


def packed_bytes(channels: int, hidden: int, out: int) -> int:
    """The size in bytes of all packed weights."""
    chunk = padded_channels(channels) * CHUNK * 2 + CHUNK * 4 + out * CHUNK * 2 + 9 * CHUNK * 2 + CHUNK * 4
    return -(-hidden // CHUNK) * chunk + 4 * out


def padded_channels(channels: int) -> int:
    """Input channels as the kernel multiplies them, 16 at a time: 24 become 32."""
    return -(-channels // 16) * 16


def pack_inverted_residual(
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    dtype: torch.dtype,
    half_filter: bool = False,
) -> Tensor:
    """All weights of a block as one uint8 tensor, on their device.

    Args:
        expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias: as in
            `mvit_kernels.inverted_residual`, of any floating dtype.
        dtype: bfloat16 or float16, of the map and of the packed matrices and filters.
        half_filter: pack filters and `project_weight` in float16 whatever `dtype` is, for the kernels that store the
            expanded map and filter in float16.

    Returns:
        `packed_bytes` bytes.

    Raises:
        ValueError: with `half_filter`, a weight that float16 cannot hold.
    """
    narrow = torch.float16 if half_filter else dtype
    if half_filter:
        for name, weight in (
            ("depthwise_weight", depthwise_weight),
            ("depthwise_bias", depthwise_bias),
            ("project_weight", project_weight),
        ):
            largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
            if not largest < HALF_LIMIT:
                raise ValueError(
                    f"inverted_residual: {name} has values up to {largest:.3g}, and float16 ends at 65504; pack it "
                    "without half_filter"
                )
    hidden, channels = expand_weight.shape
    more = -hidden % CHUNK
    expand = F.pad(expand_weight.detach().double() / 2, (0, padded_channels(channels) - channels, 0, more)).to(dtype)
    biases = F.pad(torch.stack([expand_bias, depthwise_bias]).detach().double() / 2, (0, more)).float()
    filters = F.pad(depthwise_weight.detach().double().view(hidden, 9) / 2, (0, 0, 0, more)).to(narrow)
    project = F.pad(project_weight.detach(), (0, more)).to(narrow)[_output_columns(project_weight)]

    # Of a chunk: the expanded channel at each column of four tiles of eight, and at each row of two products' sixteen.
    place = torch.arange(CHUNK, device=expand.device)
    tile, lane, of_two = place // 8, place % 8 // 2, place % 2
    expanded = 8 * lane + 2 * tile + of_two
    filtered = 8 * lane + 4 * (tile // 2) + 2 * (tile % 2) + of_two
    lanes = place.view(4, 2, 4).transpose(0, 1)  # half, lane, the four channels that it filters

    parts = []
    for at in range(0, hidden, CHUNK):
        chunk = slice(at, at + CHUNK)
        first = expand[chunk][expanded]
        parts += [joined(fragments(first).transpose(0, 1)), biases[0, chunk][expanded]]
        parts += [joined(fragments(project[:, chunk][:, filtered]).transpose(0, 1))]
        parts += [filters[chunk][lanes].movedim(-1, 1), biases[1, chunk][lanes]]
    parts.append(project_bias.detach().float())
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def _output_columns(project_weight: Tensor) -> Tensor:
    """The output channel at each column: of four tiles of eight side by side a lane has eight adjacent channels, of the
    two or the one that are left at the end, four or two."""
    tiles = project_weight.shape[0] // 8
    columns, start = [], 0
    for group in (4,) * (tiles // 4) + (2,) * (tiles % 4 // 2) + (1,) * (tiles % 2):
        place = torch.arange(8 * group, device=project_weight.device)
        columns.append(start + place % 8 // 2 * 2 * group + place // 8 * 2 + place % 2)
        start += 8 * group
    return torch.cat(columns)
