# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++, stored and filtered in float16: the kernel's own source, executed on the CPU, by
the tolerance rule of the map's own dtype; range, packing, faults. Which blocks of a network take it:
tests/freezing/test_half_range.py."""

import functools

import pytest
import torch

from mvit_kernels.backends.cuda import inverted_residual, plans
from mvit_kernels.backends.cuda import inverted_residual_packing as packing
from support.cases import call, convert, make
from support.cuda import check_launch, preferred
from support.emulation import Driver
from support.tolerance import assert_close_as_pytorch

from .test_inverted_residual import DTYPES, KERNEL, OP, large_biases, launched, sizes_of

FILTER = "inverted_residual_filter.h"
SHAPES = sorted(plans.HALF_FILTERS)

check = functools.partial(check_launch, OP, launched, half_filter=True)


@pytest.fixture(scope="module")
def driver():
    return Driver(OP)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(driver, shape, dtype):
    check(driver, sizes_of(*shape), dtype)


@pytest.mark.parametrize("shape", [(16, 16, 1), (24, 48, 2), (48, 48, 1)], ids=str)
@pytest.mark.parametrize("side", [(1, 1), (2, 1), (3, 34), (17, 16)], ids=str)
def test_maps(driver, shape, side):
    """One pixel, whole tiles, one row more, and two images."""
    check(driver, sizes_of(*shape, (2, *side), 40), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 24, 2), (48, 48, 1)], ids=str)
def test_padding_is_of_the_expanded_map(driver, shape, dtype):
    check(driver, sizes_of(*shape, (1, 6, 7)), dtype, large_biases)


@pytest.mark.parametrize(
    "sizes", [sizes_of(64, 64, 1, (1, 32, 32), 256), sizes_of(32, 64, 2, (1, 48, 48), 128)], ids=["64", "32"]
)
def test_the_network_s_own_widths_and_more_exact_than_bfloat16(driver, sizes):
    """Several whole tiles. By the mean, since the largest error is that of the result's own rounding."""
    tensors, settings = make(OP, sizes)
    low = convert(tensors, torch.bfloat16)
    truth = call(OP, convert(low, torch.float64), settings, "oracle")
    mean = [
        (launched(driver, sizes, torch.bfloat16, half_filter=half).double() - truth).abs().mean() for half in (0, 1)
    ]
    check(driver, sizes, torch.bfloat16)
    assert mean[1] < 0.9 * mean[0]


def test_both_tiles_give_the_same_bits(driver):
    sizes = sizes_of(64, 64, 1, (1, 9, 19), 64)
    large = launched(driver, sizes, torch.bfloat16, half_filter=True)
    assert torch.equal(launched(driver, sizes, torch.bfloat16, small=True, half_filter=True), large)
    for seed in range(1, 3):
        assert torch.equal(launched(driver, sizes, torch.bfloat16, seed=seed, half_filter=True), large)


def test_what_is_beyond_the_range_is_not_finite(driver):
    """Expanded values above 65504: never a wrong number."""
    sizes = sizes_of(48, 48, 1, (1, 9, 19))
    tensors, settings = make(OP, sizes)
    tensors["x"][:, 4:] *= 1e5  # half of the map
    tensors["project_weight"] *= 1e-3
    low = convert(tensors, torch.bfloat16)
    truth = call(OP, convert(low, torch.float64), settings, "oracle")
    ours = launched(driver, sizes, torch.bfloat16, tensors=tensors, half_filter=True)
    finite = ours.isfinite()
    assert truth.isfinite().all() and finite[:, :3].all() and not finite[:, 4:].all()
    usual = call(OP, low, settings, "usual")
    assert_close_as_pytorch("what is finite", ours[:, :3], usual[:, :3], truth[:, :3])
    close = (ours.double() - truth).abs() <= 2**-6 * truth.abs().amax(-1, keepdim=True)
    assert (close | ~finite).all()


# -------------------------------------------------------------------------------------------- packing and the operator


@pytest.mark.parametrize("name", ["depthwise_weight", "depthwise_bias", "project_weight"])
def test_weights_that_float16_cannot_hold_are_refused(name):
    tensors, _ = make(OP, sizes_of(16, 16, 1))
    _, *weights = convert(tensors, torch.bfloat16).items()
    for value in (7e4, torch.inf, torch.nan):
        changed = {key: weight.clone() for key, weight in weights}
        changed[name].view(-1)[-1] = value
        packing.pack_inverted_residual(*changed.values(), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"inverted_residual: {name} has values up to .* float16 ends at 65504"):
            packing.pack_inverted_residual(*changed.values(), dtype=torch.bfloat16, half_filter=True)


def test_the_operator(monkeypatch):
    """Both forms of one block's weights are kept side by side; shapes without a kernel are refused."""
    tensors, _ = make(OP, sizes_of(16, 24, 2, (1, 5, 6)))
    low = convert(tensors, torch.bfloat16)
    with preferred(monkeypatch, OP, inverted_residual.forward):
        plain, half, again = (
            inverted_residual.forward(*low.values(), 2, 1, False, half_filter=half) for half in (False, True, False)
        )
        assert torch.equal(plain, again) and not torch.equal(plain, half)
        truth = call(OP, convert(low, torch.float64), dict(stride=2, dilation=1, residual=False), "oracle")
        usual = call(OP, low, dict(stride=2, dilation=1, residual=False), "usual")
        assert_close_as_pytorch("in float16", half, usual, truth)
        tensors, _ = make(OP, sizes_of(48, 64, 2, (1, 5, 6)))
        with pytest.raises(RuntimeError, match="no kernel that filters in float16 for 48 channels in and 64 out"):
            inverted_residual.forward(*convert(tensors, torch.bfloat16).values(), 2, 1, False, half_filter=True)


# -------------------------------------------------------------------------------------------------------------- faults

SIZES = sizes_of(48, 48, 1, (1, 9, 17), 96)
ONE = ["MVIT_ONLY_ONE=launch_inverted_residual<BFloat16, 48, 48, 1, false, true>"]


@pytest.mark.parametrize(
    "fault",
    [
        (KERNEL, "taps[3 * tap_row + tap_column]", "taps[3 * tap_column + tap_row]"),
        (FILTER, "return {words.x, words.y}; }", "return {words.y, words.x}; }"),
        (KERNEL, "mma<Wide>(sums[m][n + i]", "mma<T>(sums[m][n + i]"),
    ],
    ids=["the taps' order", "the halves' order", "the type of the projection"],
)
def test_planted_errors_are_out_of_tolerance(fault):
    with pytest.raises(AssertionError, match="is over"):
        check(Driver(OP, [fault], macros=ONE), SIZES, torch.bfloat16, large_biases)
