# SPDX-License-Identifier: Apache-2.0
"""How many launches a frozen network is on an H200, by what is chosen there: nothing is launched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends import cuda, gpu, triton
from mvit_kernels.freezing import launched, program
from mvit_kernels.freezing.lowering import Lowering
from mvit_kernels.freezing.whole import whole_network
from support import models

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def h200(monkeypatch):
    for backend in (cuda.BACKEND, triton.BACKEND):
        monkeypatch.setattr(backend, "unavailable", lambda device_type: [])
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(132, 232_448))
    monkeypatch.setattr(backends, "_choices", {})


def lower(frozen, dtype, batch, side=256):
    """The lowering for images on a GPU, of weights on the CPU."""
    builder = program.build(whole_network(frozen).links, dtype, launched.LaunchedNetwork.backends)
    with torch.no_grad():
        weights = [launched._packed(builder, index) for index in range(len(builder.steps))]
    return Lowering(builder, weights, torch.device("cuda", 0), batch, (side, side))


LAYERS = 2 + 4 + 3
AROUND = {"convolution": 1 + 3 * 4 + 2, "inverted_residual": 7, "mean": 1}  # stem, blocks, last convolution, classifier
BY_OPERATOR = dict(
    AROUND,
    convolution=1 + 3 * 3 + 2,
    layer_norm_linear=LAYERS + 3,  # the stack's last norm is inside the 1 × 1 convolution behind it
    patch_attention=LAYERS,
    projection_norm_linear=LAYERS,  # with the MLP's first half, which few rows have divided
    linear_residual=LAYERS,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["own", "timm"])
@pytest.mark.parametrize("variant", ["xxs", "xs", "s"])
def test_launches(h200, variant, name, dtype):
    """At batch 1 stacks operator by operator, at batch 256 in one launch each; inverted residuals whole in both, three
    of them into a part of the map that a block's fusion reads."""
    frozen = mvit_kernels.freeze(models.build(name, variant), dtype=dtype)
    one, many = lower(frozen, dtype, 1), lower(frozen, dtype, 256)
    assert Counter(operation.name for operation in one.operations) == BY_OPERATOR
    assert len(one.operations) == 59
    assert Counter(operation.name for operation in many.operations) == {**AROUND, "transformer": 3}
    assert len(many.operations) == 26
