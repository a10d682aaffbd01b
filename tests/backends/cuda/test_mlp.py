# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_mlp`` in CUDA C++: the sources of its two kernels, run on the CPU with a race check on, against float64.

What a GPU has, and how many rows are few, decides which kernel is launched and with how many warps and slots; FORMS has
a launch of each kind, at sizes that are quick.
"""

import pytest
import torch

from backends.cuda.test_rows import DTYPES, H100, RACE, SMALL, WIDTHS, WRONG, check, launch
from support.cases import convert, make
from support.emulation import Driver

OP = "layer_norm_mlp"
FEW = H100  # as many as there are in a test
STAY, PASS = (1, H100[1], 0), (1, SMALL[1], 0)  # one block, whose weights stay, or pass at widths from 120 on
# Bytes with which a block has, at width 64, two warps and two slots (of 8,256 bytes), and all 16 warps and four slots.
TWO_SLOTS, FOUR_SLOTS = (1, 24000, 0), (1, 83000, 0)


@pytest.fixture(scope="module")
def driver():
    return Driver("mlp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_published_widths(driver, width, dtype):
    sizes = dict(shape=(19, width), hidden=2 * width)
    check(driver, OP, sizes, dtype, (0, 1), FEW)
    check(driver, OP, sizes, dtype, (0,), STAY)
    if width in (144, 240):
        check(driver, OP, sizes, dtype, (1,), PASS)


@pytest.mark.parametrize("gpu", [FEW, STAY], ids=["few", "many"])
@pytest.mark.parametrize("width", [8, 16, 24, 72, 136, 200, 256])
def test_other_widths(driver, width, gpu):
    check(driver, OP, dict(shape=(5, width), hidden=40), torch.bfloat16, gpu=gpu)


@pytest.mark.parametrize("gpu", [FEW, STAY, TWO_SLOTS, FOUR_SLOTS], ids=str)
@pytest.mark.parametrize("rows, hidden", [(1, 8), (16, 200), (33, 32), (70, 200), (530, 40)])
def test_tiles_chunks_and_slots(driver, rows, hidden, gpu):
    """Fewer tiles than warps, several tiles a warp; one chunk of hidden units and many, the last not whole."""
    check(driver, OP, dict(shape=(rows, 64), hidden=hidden), torch.bfloat16, (0, 1), gpu)


def test_the_same_bits_on_every_gpu(driver):
    """Whatever the number of multiprocessors, warps and slots."""
    tensors, settings = make(OP, dict(shape=(300, 64), hidden=200))
    tensors = convert(tensors, torch.bfloat16)
    first, *others = (
        launch(driver, OP, tensors, settings, 0, gpu)["out"]
        for gpu in (STAY, TWO_SLOTS, FOUR_SLOTS, (3, H100[1], 0), (132, H100[1], 0))
    )
    assert first.isfinite().all() and all(torch.equal(first, each) for each in others)
    first, other = (launch(driver, OP, tensors, settings, 0, gpu)["out"] for gpu in (H100, SMALL))
    assert torch.equal(first, other)


def test_rows_of_the_same_values_have_the_same_bits(driver):
    """Wherever a row lies, in the first tile of a warp or in a later one."""
    for gpu in (FEW, TWO_SLOTS):
        tensors, settings = make(OP, dict(shape=(90, 64), hidden=104))
        tensors = convert(tensors, torch.bfloat16)
        tensors["x"] = tensors["x"][:1].expand(90, 64).contiguous()
        out = launch(driver, OP, tensors, settings, 0, gpu)["out"]
        assert torch.equal(out, out[:1].expand(90, 64)) and out.isfinite().all()


@pytest.mark.parametrize("gpu", [FEW, STAY], ids=["few", "many"])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_norm_in_float_and_large_means(driver, mean, gpu):
    sizes = dict(shape=(9, 120), mean=mean, hidden=48)
    check(driver, OP, sizes, torch.bfloat16, gpu=gpu, norm_dtype=torch.float32)
    check(driver, OP, dict(shape=(9, 144), mean=mean, hidden=48), torch.float16, gpu=gpu)


@pytest.mark.parametrize("gpu", [FEW, TWO_SLOTS], ids=["few", "many"])
def test_nothing_is_written_beside_the_result(driver, gpu):
    """The memory before and after it belongs to others; and the emulation reports every store outside the tensor."""
    tensors, settings = make(OP, dict(shape=(37, 24), hidden=48))
    tensors = convert(tensors, torch.bfloat16)
    buffer = torch.full((40, 24), 42.0, dtype=torch.bfloat16)
    launch(driver, OP, tensors, settings, 0, gpu, out=buffer[1:38])
    assert torch.equal(buffer[1:38], launch(driver, OP, tensors, settings, 0, gpu)["out"])
    assert (buffer[:1] == 42).all() and (buffer[38:] == 42).all()


# ------------------------------------------------------------------------------------------------------ planted faults

MANY, FEW_ROWS, ROWS, LANES = "layer_norm_mlp_kernel.cu", "few_rows_mlp_kernel.cu", "mlp_rows.h", "lane_rows.h"
PLAN, OUTSIDE = "layer_norm_mlp.h", "outside of every buffer"
GROUP = "commit_copies();\n        wait_copies<0>();\n        sync_threads();  // the group"
# The kernels that the faults are planted in: for 4 and 5 tiles, and for few rows 6.
FEWER = (PLAN, "{4, 5, 6, 8, 9, 12, 15}, kFewMlpTiles[] = {6, 9, 12, 16}", "{4, 5}, kFewMlpTiles[] = {6}")
FAULTS = [
    (MANY, "sync_threads();  // the group", "//", RACE),
    (MANY, "asked < group + 2 * plan.group && ", "", RACE),  # a slot is filled that is still read
    (MANY, GROUP, "wait_copies<0>();\n        commit_copies();\n        sync_threads();  // the group", RACE),
    (MANY, "sync_warp();  // all lanes have read", "//", RACE),
    (MANY, "sync_warp();  // the slice has", "//", RACE),
    (MANY, "first += at_once, tile += at_once", "first += at_once, tile += at_once - 1", f"{WRONG}|{RACE}|isfinite"),
    (MANY, "row < left && 8 * lane < args.channels", "true", OUTSIDE),
    (FEW_ROWS, "sync_threads();  // the normalised", "//", RACE),
    (FEW_ROWS, "sync_threads();  // and read", "//", RACE),
    (ROWS, "if (!fc2_exists || row >= channels)", "if (!fc2_exists)", OUTSIDE),
    (
        ROWS,
        "kFc1 + line_bytes(16 * (TILES - 1), kMlpChunk / 8) + lane_place<1, 2>",
        "kFc1 + line_bytes(16 * (TILES - 1), kMlpChunk / 8) + lane_place<2, 2>",
        f"{WRONG}|{RACE}|out of the block",
    ),
    (LANES, "if (row >= valid_rows) continue;", "", OUTSIDE),
]


def run_all(driver, seed):
    check(driver, OP, dict(shape=(70, 64), hidden=200), torch.bfloat16, (seed,), TWO_SLOTS)
    check(driver, OP, dict(shape=(70, 64), hidden=200), torch.bfloat16, (seed,), FOUR_SLOTS)
    check(driver, OP, dict(shape=(530, 64), hidden=32), torch.bfloat16, (seed,), STAY)  # three tiles for a warp
    check(driver, OP, dict(shape=(40, 72), hidden=136), torch.bfloat16, (seed,), STAY)
    check(driver, OP, dict(shape=(20, 80), hidden=168), torch.bfloat16, (seed,), FEW)


@pytest.mark.parametrize("header, text, other, says", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found(header, text, other, says):
    driver = Driver("mlp", [FEWER, (header, text, other)], ["MVIT_ONLY_BFLOAT16"])
    with pytest.raises(AssertionError, match=says):
        for seed in range(3):
            run_all(driver, seed)


def test_without_a_fault_the_same_is_right():
    run_all(Driver("mlp", [FEWER], ["MVIT_ONLY_BFLOAT16"]), 0)
