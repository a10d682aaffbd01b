# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++: weights packed once for all calls (`kept`), and one launch."""

from __future__ import annotations

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
    hidden, out = expand_weight.shape[0], project_weight.shape[0]
    if dilation != 1:
        raise RuntimeError(f"inverted_residual.cuda: dilation is {dilation}; the kernel has 1")
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    shapes = [tuple(tensor.shape) for tensor in weights]
    wanted = [(hidden, x.shape[-1]), (hidden,), (hidden, 1, 3, 3), (hidden,), (out, hidden), (out,)]
    if shapes != wanted or out % 8:
        raise RuntimeError(
            f"inverted_residual.cuda: weights of shapes {shapes}; {wanted} are wanted, out a multiple of 8"
        )
    packed = packed_weights(weights, x.dtype)
    return torch.ops.mvit_kernels.inverted_residual_packed.cuda(x, packed, VERSION, hidden, out, stride, residual)


LIBRARY.impl("inverted_residual.cuda", forward, "CUDA")
