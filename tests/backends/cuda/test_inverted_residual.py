# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++: its kernel's own source, executed on the CPU, against float64, and what decides
about a call; test_inverted_residual_binding.py has the rest. What only a GPU shows (rounding inside tensor cores, time)
is not tested here; where there is one, the operators' own tests run on path ``cuda``."""

import functools

import pytest
import torch

from mvit_kernels.backends import cuda, gpu
from mvit_kernels.backends.cuda import inverted_residual_packing as packing
from mvit_kernels.backends.cuda import plans
from mvit_kernels.nn import MobileViT
from mvit_kernels.nn.layers import InvertedResidual
from mvit_kernels.ops.inverted_residual import inverted_residual_call
from support.cases import convert, make
from support.cuda import check_launch
from support.emulation import Driver, EmulationFault

OP = "inverted_residual"
DTYPES = (torch.bfloat16, torch.float16)
SMALL = ((64, 64, 1), (96, 128, 2), (128, 160, 2))  # shapes with a second, smaller tile


@pytest.fixture(scope="module")
def driver():
    return Driver(OP)


def sizes_of(channels, out, stride, shape=(1, 9, 19), hidden=None):
    """Two tiles, both ragged; hidden channels fill no whole number of chunks."""
    hidden = hidden or 2 * channels + 8
    residual = stride == 1 and channels == out
    return dict(shape=(*shape, channels), hidden=hidden, out=out, stride=stride, residual=residual)


def launched(driver, sizes, dtype, tensors=None, seed=0, small=False, beside=0, half_filter=False):
    """What the binding would launch, into memory full of NaN; `beside`: into the middle of a map that has so many
    channels more on both sides."""
    made, settings = make(OP, sizes)
    low = convert(tensors or made, dtype)
    x, *weights = low.values()
    packed = packing.pack_inverted_residual(*weights, dtype=dtype, half_filter=half_filter)
    b, h, w, c = x.shape
    hidden, out, stride = weights[0].shape[0], weights[4].shape[0], settings["stride"]
    assert packed.numel() == packing.packed_bytes(c, hidden, out)
    joined = torch.full((b, (h - 1) // stride + 1, (w - 1) // stride + 1, out + 2 * beside), torch.nan, dtype=dtype)
    y = joined[..., beside : beside + out]
    numbers = (b, h, w, c, hidden, out, stride, settings["residual"], small, y.stride(2))
    driver.forward(seed, x.contiguous(), y, packed, dtype == torch.float16, half_filter, *numbers, writes=[y])
    assert joined[..., :beside].isnan().all() and joined[..., beside + out :].isnan().all()
    return y


check = functools.partial(check_launch, OP, launched)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", plans.INVERTED_RESIDUALS)
def test_every_shape(driver, shape, dtype):
    check(driver, sizes_of(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
def test_smaller_tiles(driver, shape, dtype):
    check(driver, sizes_of(*shape), dtype, small=True)


@pytest.mark.parametrize("shape", [(16, 16, 1), (24, 48, 2), (48, 48, 1), (48, 64, 2)])
@pytest.mark.parametrize("side", [(1, 1), (2, 1), (3, 34), (16, 16), (17, 16)], ids=str)
def test_maps(driver, shape, side):
    """One pixel, whole tiles, one row more, and two images."""
    check(driver, sizes_of(*shape, (2, *side), 40), torch.bfloat16)


@pytest.mark.parametrize("hidden", [1, 32, 33, 64, 160])
@pytest.mark.parametrize("shape", [(48, 48, 1), (48, 64, 2)])  # with two wide buffers, and with one
def test_chunks(driver, shape, hidden):
    check(driver, sizes_of(*shape, (1, 5, 9), hidden), torch.float16)


@pytest.mark.parametrize("sizes", [sizes_of(128, 160, 2, (1, 16, 16), 512), sizes_of(16, 16, 1, (1, 40, 40), 32)])
def test_the_network_s_own_sizes(driver, sizes):
    check(driver, sizes, torch.bfloat16)


def large_biases(tensors):
    """The border is zero after SiLU, not before: what a window reads there must not be silu(bias)."""
    tensors["expand_bias"] += 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 1), (16, 24, 2), (48, 48, 1)])
def test_padding_is_of_the_expanded_map(driver, shape, dtype):
    check(driver, sizes_of(*shape, (1, 6, 7)), dtype, large_biases)


def test_large_values(driver):
    """bfloat16 values beyond float16's range, all through the wide buffer."""
    sizes = sizes_of(48, 48, 1, (1, 5, 9))

    def change(tensors):
        tensors["x"] *= 1e20
        tensors["project_weight"] *= 1e-15

    check(driver, sizes, torch.bfloat16, change)


@pytest.mark.parametrize("shape", SMALL)
def test_both_tiles_give_the_same_bits(driver, shape):
    """Into maps of their own, and between the channels of others, which stay as they are."""
    sizes = sizes_of(*shape, (1, 9, 19), 64)
    large = launched(driver, sizes, torch.bfloat16)
    assert torch.equal(launched(driver, sizes, torch.bfloat16, small=True), large)
    for small in (False, True):
        assert torch.equal(launched(driver, sizes, torch.bfloat16, small=small, beside=8), large)


def test_without_the_residual(driver):
    check(driver, {**sizes_of(16, 16, 1), "residual": False}, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- properties


def test_no_bank_conflicts(driver):
    """Of the loads of x; those of other shared memory are arithmetic (csrc/cuda/inverted_residual_block.h)."""
    before = driver.matrix_conflicts()
    for shape in plans.INVERTED_RESIDUALS:
        launched(driver, sizes_of(*shape, (1, 4, 4), 32), torch.bfloat16)
    assert driver.matrix_conflicts() == before


@pytest.mark.parametrize("shape", [(16, 32, 1), (48, 48, 1), (48, 64, 2)])
def test_same_bits_in_any_order_of_threads(driver, shape):
    sizes = sizes_of(*shape, (1, 9, 19), 96)
    first = launched(driver, sizes, torch.bfloat16)
    for seed in range(1, 5):
        assert torch.equal(launched(driver, sizes, torch.bfloat16, seed=seed), first)


@pytest.mark.parametrize("shape", [(16, 16, 1), (16, 24, 2)])
def test_a_pixel_changes_its_neighbours_only(driver, shape):
    """NaN too: what is beside the map, and what only fills up a tile, multiplies nothing."""
    stride = shape[2]
    sizes = sizes_of(*shape, (2, 18, 33))
    tensors, _ = make(OP, sizes)
    before = launched(driver, sizes, torch.bfloat16)
    for row, column in ((0, 0), (15, 16), (17, 32)):
        changed = {**tensors, "x": tensors["x"].clone()}
        changed["x"][1, row, column] = torch.nan
        after = launched(driver, sizes, torch.bfloat16, tensors=changed)
        seen = torch.zeros(2, 18, 33, dtype=torch.bool)
        seen[1, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
        seen = seen[:, ::stride, ::stride]
        assert torch.equal(after.isnan().all(-1), seen) and torch.equal(after[~seen], before[~seen])


# -------------------------------------------------------------------------------------------------------------- faults

# Two wide buffers, one share; and one buffer, two shares. Three chunks, so that every slot is filled again.
DOUBLE = "launch_inverted_residual<BFloat16, 48, 48, 1, false>", sizes_of(48, 48, 1, (1, 9, 17), 96)
SHARED = "launch_inverted_residual<BFloat16, 48, 64, 2, false>", sizes_of(48, 64, 2, (1, 19, 17), 96)
KERNEL, BLOCK, LAYOUT = "inverted_residual_kernel.cu", "inverted_residual_block.h", "inverted_residual.h"
WAIT = "      wait_copies<0>();\n      sync_threads();  // copies and"

REPORTED = {
    "the chunk's barrier": (DOUBLE, KERNEL, WAIT, "      wait_copies<0>();  // copies and"),
    "the wait for copies": (DOUBLE, KERNEL, WAIT, "      sync_threads();  // copies and"),
    "a barrier within the chunk": (SHARED, KERNEL, "        sync_threads();  // the wide buffer is there\n", ""),
    "cells beside the map": (DOUBLE, BLOCK, "if (!inside && pixel < EXPANDED_PIXELS)", "if (false)"),
    "a halo of one row": (DOUBLE, LAYOUT, "return (tile.rows - 1) * stride + 3", "return (tile.rows - 1) * stride + 2"),
    "the first barrier of the shares": (
        SHARED,
        BLOCK,
        "    sync_threads();\n    const Shared at",
        "    const Shared at",
    ),
}
WRONG = {
    "padding of x": (DOUBLE, BLOCK, "inside ? place : -1", "pixel < EXPANDED_PIXELS ? place : -1"),
    "the residual's pixel": (DOUBLE, BLOCK, "EXPANDED_COLUMNS + column + 1)", "EXPANDED_COLUMNS + column)"),
    "the second tap row": (DOUBLE, KERNEL, "const int tap_row = row - patch_row * STRIDE;", "const int tap_row = 0;"),
    "a bias in both shares": (SHARED, BLOCK, "warp % SHARES == 0 ? load_constant", "true ? load_constant"),
}


def planted(what):
    (kernel, sizes), *fault = what
    return Driver(OP, [tuple(fault)], macros=[f"MVIT_ONLY_ONE={kernel}"]), sizes


@pytest.mark.parametrize("name", REPORTED)
def test_planted_races_are_reported(name):
    faulty, sizes = planted(REPORTED[name])
    for seed in range(3):
        with pytest.raises(EmulationFault):
            launched(faulty, sizes, torch.bfloat16, seed=seed)


@pytest.mark.parametrize("name", WRONG)
def test_planted_errors_are_out_of_tolerance(name):
    faulty, sizes = planted(WRONG[name])
    with pytest.raises(AssertionError, match="is over"):
        check(faulty, sizes, torch.bfloat16, large_biases)


@pytest.mark.parametrize("sizes", [DOUBLE[1], SHARED[1]])
def test_without_the_fault(driver, sizes):
    check(driver, sizes, torch.bfloat16, large_biases)


# ------------------------------------------------------------------------------------------------------------ decisions


def test_sizes_are_those_of_the_kernel(driver):
    out = torch.zeros(4, dtype=torch.int64)
    for (channels, wide, stride), least in plans.INVERTED_RESIDUALS.items():
        small = (channels, wide, stride) in SMALL
        for hidden in (32, 2 * channels + 8):
            driver.on_host("sizes", out, channels, wide, stride, small, hidden)
            half_filter = (channels, wide, stride) in plans.HALF_FILTERS
            packed = packing.packed_bytes(channels, hidden, wide)
            assert out.tolist() == [least, packed, packing.VERSION, half_filter]
        assert least <= 99 << 10  # every GPU of 8.0 and up
        driver.on_host("sizes", out, channels, wide, stride, True, 32)
        assert (out[0] > 0) == small


def test_every_inverted_residual_of_the_models_has_a_kernel():
    found = set()
    for mode in ("xxs", "xs", "s"):
        for module in MobileViT(mode, device="meta").modules():
            if isinstance(module, InvertedResidual):
                convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
                found.add((convolutions[0].in_channels, convolutions[2].out_channels, convolutions[1].stride[0]))
    assert found == set(plans.INVERTED_RESIDUALS)


def ask(shape=(2, 8, 8, 64), hidden=256, out=96, stride=2, dilation=1, dtype=torch.bfloat16, rows=True):
    x, expand, project = (torch.empty(s, device="meta", dtype=dtype) for s in (shape, (hidden, 64), (out, hidden)))
    x = x if rows else x.mT
    call = inverted_residual_call(x, expand, project, (x,), stride, dilation, False)
    return cuda.BACKEND.supports[OP](call._replace(device_type="cuda"))


@pytest.mark.parametrize(
    "case, says",
    [
        (dict(dtype=torch.float32), "torch.float32 is not supported in CUDA C++; bfloat16 and float16 are"),
        (dict(dilation=2), "dilation 2 is not supported; 1 is"),
        (dict(out=97), "64 channels to 97 with stride 2 are not supported; 16 to 16 with 1, 16 to 32 with 1, "),
        (dict(stride=1), "64 channels to 96 with stride 1 are not supported"),
        (dict(hidden=0), "0 hidden channels; 1 to 1048575 are supported"),
        (dict(shape=(2**20, 64, 64, 64)), "4294967296 pixels; at most 2147483647 are supported"),
        (dict(shape=(2, 8, 64, 64), rows=False), "the channels of x are not adjacent in memory"),
    ],
    ids=str,
)
def test_refuses(case, says):
    assert ask() == []
    assert says in "; ".join(ask(**case))


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(58, 64 << 10))
    assert ask() == ["a block needs 86720 bytes of shared memory; this GPU has 65536 per block"]
