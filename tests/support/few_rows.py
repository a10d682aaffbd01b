# SPDX-License-Identifier: Apache-2.0
"""The projection with the MLP's first half in one Triton launch, held to PyTorch's operators by both errors against
float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mvit_kernels.backends.triton import projection_norm_linear
from support.tolerance import assert_close_as_pytorch


def composed(x, proj_weight, proj_bias, residual, norm_weight, norm_bias, weight, bias, middle=None):
    """By PyTorch's operators: the rows between, and what the second half reads; of `middle` if it is given."""
    made = residual + F.linear(x, proj_weight, proj_bias)
    norm = F.layer_norm(made if middle is None else middle, made.shape[-1:], norm_weight, norm_bias, 1e-5)
    return made, F.silu(F.linear(norm, weight, bias))


def draw(rows, inner, d, hidden, dtype, norm=None):
    generator = torch.Generator().manual_seed(0)

    def of(*shape, std=1.0):
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    return [
        *(of(rows, inner), of(d, inner, std=inner**-0.5), of(d), of(rows, d)),
        *(v.to(norm or dtype) for v in (1 + of(d, std=0.1), of(d, std=0.1))),
        *(of(hidden, d, std=d**-0.5), of(hidden)),
    ]


def launched(tensors):
    x, *_, weight, _ = tensors
    middle, hidden = torch.full_like(tensors[3], torch.nan), x.new_full((x.shape[0], weight.shape[0]), torch.nan)
    projection_norm_linear.launch(*tensors, middle, hidden, 1e-5).run()
    return middle, hidden


def check(rows, inner, d, hidden, dtype, norm=None, change=None) -> None:
    tensors = draw(rows, inner, d, hidden, dtype, norm)
    if change is not None:
        change(tensors)
    middle, found = launched(tensors)
    low, exact = [tensor.to(dtype) for tensor in tensors], [tensor.double() for tensor in tensors]
    assert_close_as_pytorch("middle", middle, composed(*low)[0], composed(*exact)[0])
    usual, truth = composed(*low, middle)[1], composed(*exact, middle.double())[1]  # of the rows as they were rounded
    assert_close_as_pytorch("hidden", found, usual, truth)
