# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++: weights packed once for all calls (`kept`), and one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..library import LIBRARY
from .inverted_residual_packing import VERSION, pack_inverted_residual
from .kept import keep


def packed_weights(weights: tuple[Tensor, ...], dtype: torch.dtype, half_filter: bool = False) -> Tensor:
    """`pack_inverted_residual` of the raw operator's six weights, kept while these are the same tensors, unchanged."""

    def pack() -> Tensor:
        return pack_inverted_residual(*weights, dtype=dtype, half_filter=half_filter)

    return keep(weights, ("inverted_residual", dtype, half_filter), pack)


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
    half_filter: bool = False,
) -> Tensor:
    """The raw operator. Weights may be of any floating dtype.

    `half_filter` stores the expanded map, filters and projects in float16, whatever x's dtype is, for the shapes of
    `plans.HALF_FILTERS`: faster, and for bfloat16 maps more exact, where nothing is beyond float16's range, which
    ``freeze(model, example=images)`` verifies. What is beyond becomes infinite or NaN.

    Raises:
        RuntimeError: there is no kernel for these shapes.
        ValueError: with `half_filter`, float16 cannot hold a weight.
    """
    out_features = project_weight.shape[0]
    if dilation != 1:
        raise RuntimeError(f"inverted_residual.cuda: dilation is {dilation}; the kernel has 1")
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    _check_shapes(x.shape[-1], weights)
    b, h, w, _ = x.shape
    out = x.new_empty((b, (h - 1) // stride + 1, (w - 1) // stride + 1, out_features))
    packed = packed_weights(weights, x.dtype, half_filter)
    prepared(packed, expand_weight.shape[0], stride, residual, half_filter)(x, out)
    return out


def prepared(
    packed: Tensor, hidden: int, stride: int, residual: bool, half_filter: bool = False
) -> Callable[[Tensor, Tensor], None]:
    """The call of one block, ``call(x, out)``, which writes the map that it is given.

    Example:
        >>> call = prepared(pack_inverted_residual(*weights, dtype=torch.bfloat16), 256, stride=2, residual=False)
        >>> call(x, joined[..., :96])      # part of a map that a concatenation would make

    Args:
        packed: what `pack_inverted_residual` made.
        hidden: expanded channels.
        stride, residual: as in `mvit_kernels.inverted_residual`.
        half_filter: as they were packed.

    The call takes x, (B, H, W, C), and out, (B, ceil(H / stride), ceil(W / stride), out), of x's dtype and device:
    adjacent channels, pixels in the map's order that begin at multiples of 16 bytes, and none in x's memory. It raises
    RuntimeError for others, and where there is no kernel for these shapes.
    """
    settings = packed, VERSION, hidden, stride, residual, half_filter
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
