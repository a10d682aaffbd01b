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
from support.networks import Draw

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def h200(monkeypatch):
    for backend in (cuda.BACKEND, triton.BACKEND):
        monkeypatch.setattr(backend, "unavailable", lambda device_type: [])
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(132, 232_448))
    monkeypatch.setattr(backends, "_choices", {})


def lower(frozen, dtype, batch, side=256):
    """The lowering for images on a GPU, of weights on the CPU."""
    return lowered(program.build(whole_network(frozen).links, dtype, launched.LaunchedNetwork.backends), batch, side)


def lowered(builder, batch, side):
    with torch.no_grad():
        weights = [launched._packed(builder, index) for index in range(len(builder.steps))]
    return Lowering(builder, weights, torch.device("cuda", 0), batch, (side, side))


LAYERS = 2 + 4 + 3
AROUND = {"convolution": 1 + 3 * 4 + 2, "inverted_residual": 7, "mean": 1}  # stem, blocks, last convolution, classifier
BY_OPERATOR = dict(
    AROUND,
    convolution=1 + 3 * 3 + 2,
    layer_norm_linear=3,
    patch_attention=LAYERS,
    # The projection with the MLP's first half; its second half with the next layer's beginning, or with the stack's
    # last norm and the 1 × 1 convolution behind it.
    projection_norm_linear=2 * LAYERS,
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
    assert len(one.operations) == 50
    assert Counter(operation.name for operation in many.operations) == {**AROUND, "transformer": 3}
    assert len(many.operations) == 26


def stack(block, dtype, final_norm=True):
    """A builder with a block up to its stack, and the rows behind that."""
    builder = program.Builder(24, dtype, ("triton",))
    rows = builder.chain(program.links_of(block.before), program.Place(0, 0, 24))
    norm = block.final_norm() if final_norm else None
    return builder, builder.transformer(rows, block.layers(), norm, 4, (2, 2), 1e-5)


@pytest.mark.parametrize(
    "kernel, act, times, fused",
    [(1, "silu", 1, True), (1, False, 1, True), (1, "relu", 1, False), (3, "silu", 1, False), (1, "silu", 2, False)],
    ids=["1 x 1", "linear", "ReLU", "3 x 3", "two readers"],
)
@pytest.mark.parametrize("side, divided", [(32, True), (34, False)])
def test_the_end_of_a_stack_is_inside_the_convolution_that_alone_reads_it(
    h200, side, divided, kernel, act, times, fused
):
    """Its last norm, and before that the second half of an MLP that is divided, which is a launch of its own else."""
    draw = Draw(9)
    builder, rows = stack(draw.block(24, 64, layers=1), torch.bfloat16)
    for _ in range(times):
        builder.convolution(draw.conv(64, 24, kernel, act=act), rows, None)
    count = [operation.name for operation in lowered(builder, 1, side).operations].count
    assert count("layer_norm") == (not fused) and count("convolution") == 2 + times - fused
    assert count("layer_norm_linear") == 1 + (fused and not divided)
    assert count("linear_residual") == (not fused or not divided) and count("layer_norm_mlp") == (not divided)
    assert count("projection_norm_linear") == (1 + fused) * divided


@pytest.mark.parametrize(
    "side, dtype, divided",
    [(32, torch.bfloat16, True), (34, torch.float16, False), (32, torch.float32, False)],
    ids=str,
)
def test_which_mlps_are_divided(h200, side, dtype, divided):
    """Those of few rows, in 16 bits: up to 1024."""
    builder, _ = stack(Draw(10).block(24, 64, layers=2), dtype, final_norm=False)
    count = [operation.name for operation in lowered(builder, 1, side).operations].count
    assert count("projection_norm_linear") == 3 * divided and count("layer_norm_mlp") == 2 * (not divided)
    assert count("linear_residual") == (1 if divided else 2)


@pytest.mark.parametrize("others, whole", [((8, 8), True), ((8, 4), False), ((4, 4), False)], ids=str)
def test_an_inverted_residual_is_whole_where_pixels_are_whole_units(h200, others, whole):
    """Of 16 bytes, which CUDA C++ reads and writes at a time: in a map of 8 + 24 + 4 channels they are not, and in one
    of 4 + 24 + 4 its part begins between two."""
    draw = Draw(11)
    builder = program.Builder(3, torch.bfloat16, ("triton",))
    first = builder.convolution(draw.conv(3, 16, 3, stride=2), program.Place(0, 0, 3), None)
    before, target, behind = builder.side_by_side(others[0], 24, others[1])
    builder.inverted_residual(draw.inverted(16, 32, 24, stride=2), first, target)
    for part in (before, behind):
        builder.convolution(draw.conv(16, part.channels, 3, stride=2), first, part)
    builder.convolution(draw.conv(24 + sum(others), 16), builder.whole(target), None)
    names = [operation.name for operation in lowered(builder, 1, 32).operations]
    assert names.count("inverted_residual") == whole and names.count("depthwise_convolution") == (not whole)
