# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++: weights packed once for all calls (`kept`), and one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..library import LIBRARY
from .inverted_residual_packing import VERSION, pack_inverted_residual
from .kept import keep


def packed_weights(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """`pack_inverted_residual` of the raw operator's six weights, kept while these are the same tensors, unchanged."""
    return keep(weights, ("inverted_residual", dtype), lambda: pack_inverted_residual(*weights, dtype=dtype))


def forward(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    stride: int,
    dilation: int,
    residual: bool,
) -> Tensor:
    """The raw operator. Weights may be of any floating dtype.

    Raises:
        RuntimeError: there is no kernel for these shapes.
    """
    out_features = project_weight.shape[0]
    if dilation != 1:
        raise RuntimeError(f"inverted_residual.cuda: dilation is {dilation}; the kernel has 1")
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    _check_shapes(x.shape[-1], weights)
    b, h, w, _ = x.shape
    out = x.new_empty((b, (h - 1) // stride + 1, (w - 1) // stride + 1, out_features))
    prepared(packed_weights(weights, x.dtype), expand_weight.shape[0], stride, residual)(x, out)
    return out


def prepared(packed: Tensor, hidden: int, stride: int, residual: bool) -> Callable[[Tensor, Tensor], None]:
    """The call of one block, ``call(x, out)``, which writes the map that it is given.

    Example:
        >>> call = prepared(pack_inverted_residual(*weights, dtype=torch.bfloat16), 256, stride=2, residual=False)
        >>> call(x, joined[..., :96])      # part of a map that a concatenation would make

    Args:
        packed: what `pack_inverted_residual` made.
        hidden: expanded channels.
        stride, residual: as in `mvit_kernels.inverted_residual`.

    The call takes x, (B, H, W, C), and out, (B, ceil(H / stride), ceil(W / stride), out), of x's dtype and device:
    adjacent channels, pixels in the map's order that begin at multiples of 16 bytes, and none in x's memory. It raises
    RuntimeError for others, and where there is no kernel for these shapes.
    """
    settings = packed, VERSION, hidden, stride, residual
    launch = torch.ops.mvit_kernels.inverted_residual_packed.cuda
    return lambda x, out: launch(x, *settings, out)


def _check_shapes(channels: int, weights: Sequence[Tensor]) -> None:
    hidden, out = weights[0].shape[0], weights[4].shape[0]
    shapes = [tuple(tensor.shape) for tensor in weights]
    wanted = [(hidden, channels), (hidden,), (hidden, 1, 3, 3), (hidden,), (out, hidden), (out,)]
    if shapes != wanted or out % 8:
        raise RuntimeError(
            f"inverted_residual.cuda: weights of shapes {shapes}; {wanted} are wanted, out a multiple of 8"
        )


LIBRARY.impl("inverted_residual.cuda", forward, "CUDA")
