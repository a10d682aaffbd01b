# SPDX-License-Identifier: Apache-2.0
"""The projection with the MLP's first half in one Triton launch, held to PyTorch's operators by both errors against
float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mvit_kernels.backends.triton import projection_norm_linear
from support.tolerance import assert_close_as_pytorch


def composed(x, proj_weight, proj_bias, residual, norm_weight, norm_bias, weight, bias, activation="silu", middle=None):
    """By PyTorch's operators: the rows between, and what the second half reads; of `middle` if it is given."""
    made = residual + F.linear(x, proj_weight, proj_bias)
    norm = F.layer_norm(made if middle is None else middle, made.shape[-1:], norm_weight, norm_bias, 1e-5)
    y = F.linear(norm, weight, bias)
    return made, F.silu(y) if activation else y


def draw(rows, inner, d, hidden, dtype, norm=None):
    generator = torch.Generator().manual_seed(0)

    def of(*shape, std=1.0):
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    return [
        *(of(rows, inner), of(d, inner, std=inner**-0.5), of(d), of(rows, d)),
        *(v.to(norm or dtype) for v in (1 + of(d, std=0.1), of(d, std=0.1))),
        *(of(hidden, d, std=d**-0.5), of(hidden)),
    ]


def launched(tensors, activation="silu", beside=0):
    """The rows between and the result, which lies in the middle of a map with `beside` channels more on both sides."""
    x, *_, weight, _ = tensors
    middle, n = torch.full_like(tensors[3], torch.nan), weight.shape[0]
    joined = x.new_full((x.shape[0], n + 2 * beside), torch.nan)
    out = joined[:, beside : beside + n]
    projection_norm_linear.launch(*tensors, middle, out, 1e-5, activation).run()
    assert joined[:, :beside].isnan().all() and joined[:, beside + n :].isnan().all()
    return middle, out


def check(rows, inner, d, hidden, dtype, norm=None, change=None, activation="silu", bias=True, beside=0) -> None:
    tensors = draw(rows, inner, d, hidden, dtype, norm)
    if change is not None:
        change(tensors)
    if not bias:
        tensors[-1] = None
    middle, found = launched(tensors, activation, beside)
    low, exact = ([None if t is None else t.to(kind) for t in tensors] for kind in (dtype, torch.float64))
    assert_close_as_pytorch("middle", middle, composed(*low)[0], composed(*exact)[0])
    usual = composed(*low, activation, middle)[1]
    truth = composed(*exact, activation, middle.double())[1]  # of the rows as they were rounded
    assert_close_as_pytorch("out", found, usual, truth)
