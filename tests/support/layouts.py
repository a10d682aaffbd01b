# SPDX-License-Identifier: Apache-2.0
"""The strides that an operator's tensors can have."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "permuted", "transposed", "sliced", "strided", "offset", "expanded")


def lay_out(t: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """The values of `t` under other strides, and the buffer of 42s that they lie in, where there is one.

    ``permuted`` puts the channels before the rows, as an NCHW map has them; ``expanded`` repeats the first of the first
    axis with stride 0 (so the values change); ``strided`` leaves a gap between channels. ``channels_last``, which is
    not among `LAYOUTS`, is for (N, C, H, W) maps.
    """
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous(), None
    if layout == "permuted" and t.dim() > 1:
        return t.movedim(-1, t.dim() // 3).contiguous().movedim(t.dim() // 3, -1), None
    if layout == "transposed" and t.dim() > 1:
        axis = (t.dim() - 1) // 2
        return t.transpose(axis, axis + 1).contiguous().transpose(axis, axis + 1), None
    if layout == "expanded" and t.dim() > 0 and t.shape[0] > 0:
        return t[:1].clone().expand(t.shape), None
    if layout == "sliced":
        buffer = t.new_full([side + 3 for side in t.shape], 42.0)
        view = buffer[tuple(slice(1, 1 + side) for side in t.shape)]
    elif layout == "strided":
        buffer = t.new_full([*t.shape[:-1], 2 * t.shape[-1]], 42.0)
        view = buffer[..., ::2]
    elif layout == "offset":
        buffer = t.new_full([t.numel() + 6], 42.0)  # three elements in: no vector load is aligned
        view = buffer[3 : 3 + t.numel()].view(t.shape)
    else:
        return t.contiguous(), None
    view.copy_(t)
    return view, buffer


def lay_out_all(tensors: dict[str, Tensor | None], layout: str) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """`lay_out` of every tensor; only activations are expanded (weights with equal rows would test little)."""
    activations = ("x", "qkv", "residual")
    return {
        name: (None, None)
        if t is None
        else lay_out(t, "contiguous" if layout == "expanded" and name not in activations else layout)
        for name, t in tensors.items()
    }
