# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_linear`` and ``linear_residual`` in CUDA C++: their own source, run on the CPU with a race check on,
against float64. (And what test_mlp.py has of it.)"""

import itertools
import math

import pytest
import torch

from mvit_kernels.backends.cuda import operators
from support.cases import call, convert, make
from support.emulation import Driver
from support.tolerance import assert_close_as_pytorch

WIDTHS = (64, 80, 96, 120, 144, 192, 240)  # of xxs, xs and s
DTYPES = (torch.bfloat16, torch.float16)
H100, SMALL = (132, 232448), (4, 101376)  # multiprocessors, and bytes of shared memory that a block may have
# Or a plan of a row product: row tiles of a warp, warps, blocks along the rows, groups of 32 columns of a block. In the
# first, warps have two turns or one of 70 rows; in the second, one or none; the third is for rows in parts.
ODD, PAIRS, DEEP = (1, 2, 2, 1), (2, 2, 2, 2), (1, 2, 1, 1)


@pytest.fixture(scope="module")
def driver():
    return Driver("rows")


def launch(driver, operator, tensors, settings, seed, gpu, out=None):
    """The raw operator's results, by emulation. `gpu`: two numbers, or a plan's four."""
    if len(gpu) == 4:
        driver.set_row_product_plan(0, *gpu)
        gpu = (0, -1)
    x = tensors["x"]
    count, half, in_float = x.numel() // x.shape[-1], x.dtype == torch.float16, False
    features = x.shape[-1] if operator == "layer_norm_mlp" else tensors["weight"].shape[0]
    out = x.new_full((*x.shape[:-1], features), torch.nan) if out is None else out
    if operator == "linear_residual":
        driver.linear_residual(seed, *tensors.values(), out, count, x.shape[-1], features, *gpu, half, writes=[out])
        return {"out": out}
    in_float = tensors["norm_weight"].dtype == torch.float32
    mean, rstd = (torch.full(x.shape[:-1], torch.nan) for _ in range(2))
    if operator == "layer_norm_linear":
        rest = (features, settings["eps"], settings["activation"] is not None, in_float, *gpu, half)
    else:
        few_rows = gpu[2] if len(gpu) > 2 else -1
        rest = (tensors["fc1_weight"].shape[0], settings["eps"], in_float, *gpu[:2], few_rows, half)
    run = getattr(driver, operator)
    run(seed, *tensors.values(), out, mean, rstd, count, x.shape[-1], *rest, writes=[out, mean, rstd])
    return {"out": out, "mean": mean, "rstd": rstd}


def statistics(x, eps):
    """Mean and 1 / σ of the rows, in x's dtype."""
    mean = x.mean(-1)
    return mean, 1 / ((x - mean[..., None]).square().mean(-1) + eps).sqrt()


def check(driver, operator, sizes, dtype, seeds=(0,), gpu=H100, norm_dtype=None):
    """Every result by the tolerance rule; the same bits whatever the schedule."""
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, dtype, norm_dtype)
    ours = launch(driver, operator, tensors, settings, seeds[0], gpu)
    for seed in seeds[1:]:
        for name, again in launch(driver, operator, tensors, settings, seed, gpu).items():
            assert torch.equal(ours[name], again), f"{name} with seed {seed}"
    exact = convert(tensors, torch.float64)
    usual, truth = call(operator, tensors, settings, "usual"), call(operator, exact, settings, "oracle")
    assert_close_as_pytorch("out", ours["out"], usual, truth)
    if "eps" in settings:
        x, eps = tensors["x"], settings["eps"]
        for name, pytorch, true in zip(
            ("mean", "rstd"), statistics(x.float(), eps), statistics(x.double(), eps), strict=True
        ):
            assert_close_as_pytorch(name, ours[name], pytorch, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_linear(driver, width, dtype):
    check(driver, "layer_norm_linear", dict(shape=(2, 3, 5, width), n=3 * width), dtype, (0, 1, 2))
    check(driver, "layer_norm_linear", dict(shape=(33, width), n=72, activation="silu", bias=False), dtype)
    check(driver, "layer_norm_linear", dict(shape=(70, width), n=72, activation="silu"), dtype, gpu=(2, 1, 2, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_residual(driver, width, dtype):
    check(driver, "linear_residual", dict(shape=(2, 3, 5, width), n=width), dtype, (0, 1, 2))
    check(driver, "linear_residual", dict(shape=(33, 32), n=width, bias=False), dtype)


@pytest.mark.parametrize("width", [8, 16, 24, 200, 256])
def test_other_widths(driver, width):
    check(driver, "layer_norm_linear", dict(shape=(5, width), n=8), torch.bfloat16)
    check(driver, "linear_residual", dict(shape=(5, width), n=136), torch.bfloat16)


@pytest.mark.parametrize("width", [264, 480, 960])
def test_linear_residual_of_wide_rows(driver, width):
    """They pass through registers in parts."""
    check(driver, "linear_residual", dict(shape=(35, width), n=72), torch.bfloat16, (0, 1))
    check(driver, "linear_residual", dict(shape=(35, width), n=72), torch.bfloat16, gpu=DEEP)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 63, 64, 65, 129])
def test_rows(driver, rows):
    check(driver, "layer_norm_linear", dict(shape=(rows, 80), n=80), torch.bfloat16, gpu=PAIRS)
    check(driver, "linear_residual", dict(shape=(rows, 80), n=80), torch.bfloat16, gpu=ODD)


def plan_of(driver, count, channels, out_channels, normed, gpu):
    """The launch of a row product: row tiles of a warp, warps, blocks along the rows; groups of 32 columns of a block,
    blocks along them; tiles of 16 channels, bytes of shared memory."""
    numbers = torch.zeros(7, dtype=torch.int64)
    driver.on_host("planned_row_product", numbers, count, channels, out_channels, normed, *gpu)
    return numbers.tolist()


@pytest.mark.parametrize("operator", ["layer_norm_linear", "linear_residual"])
def test_plans(driver, operator):
    """16 rows a warp and 32; many turns of a warp, one and none; columns of one block and of many: the same bits."""
    sizes = dict(shape=(150, 120), n=200)
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, torch.bfloat16)
    check(driver, operator, sizes, torch.bfloat16)
    plain = launch(driver, operator, tensors, settings, 0, H100)
    plans = [(1, 1, 1, 7), (1, 16, 1, 4), (1, 2, 3, 1)]
    if operator == "layer_norm_linear":
        plans += [(2, 1, 2, 3), (2, 8, 1, 7), PAIRS]
    for seed, plan in enumerate(plans):
        for name, value in launch(driver, operator, tensors, settings, seed, plan).items():
            assert torch.equal(value, plain[name]), f"{name} with {plan}"


@pytest.mark.parametrize("gpu", [H100, (108, 166912), (84, 101376), (1, 101376)], ids=str)
def test_plans_of_the_published_models(driver, gpu):
    """They fit, every row and column has one warp, and there are no more blocks than multiprocessors."""
    multiprocessors, shared = gpu
    for width, images, tokens in itertools.product(WIDTHS, (1, 16, 256), (64, 256, 1024)):
        rows = images * tokens
        for normed, features in ((True, 3 * width), (True, 2 * width), (False, width)):
            plan = plan_of(driver, rows, width, features, normed, gpu)
            row_tiles, warps, blocks_x, groups, blocks_y, depth, used = plan
            assert used <= shared and 1 <= warps <= 16 // row_tiles and depth == math.ceil(width / 16)
            assert groups * (blocks_y - 1) < math.ceil(features / 32) <= groups * blocks_y
            assert warps * (blocks_x - 1) < math.ceil(rows / (16 * row_tiles))
            assert blocks_x * blocks_y <= max(multiprocessors, blocks_y)
            if gpu == H100:  # many rows: warps that hide latency; few: work for many multiprocessors
                assert rows < 65536 or (row_tiles == 1 + normed and row_tiles * warps * blocks_x * blocks_y >= 1440)
                assert rows > 1024 or blocks_x * blocks_y >= min(60, math.ceil(features / 32))


def test_the_least_shared_memory_is_what_python_says(driver):
    driver.set_row_product_plan(0, 1, 1, 1, 1)
    for width, normed in itertools.product((*range(8, 264, 8), 960, 1032, 2400), (True, False)):
        needed = operators.product_bytes(width, normed)
        assert plan_of(driver, 1000, width, 72, normed, (0, -1))[-1] == needed
        assert plan_of(driver, 1000, width, 72, normed, (132, needed))[-1] <= needed
        assert plan_of(driver, 1000, width, 72, normed, (132, needed - 1))[-1] == needed  # and it is refused


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_norm_in_float_and_large_means(driver, mean):
    sizes = dict(shape=(9, 120), mean=mean, n=48)
    check(driver, "layer_norm_linear", sizes, torch.bfloat16, norm_dtype=torch.float32)
    check(driver, "layer_norm_linear", dict(shape=(9, 144), mean=mean, n=48), torch.float16)


def of_equal_values(driver, width):
    """layer_norm_linear's x, its results, and its results for rows of zeros."""
    tensors, settings = make("layer_norm_linear", dict(shape=(7, width), n=48))
    low = convert(tensors | {"x": 0 * tensors["x"]}, DTYPES[0])
    zeros = launch(driver, "layer_norm_linear", low, settings, 0, H100)
    for value in (7.1, -123.456, 1e4 + 0.37):
        tensors["x"] = (value * (1 + torch.arange(7) / 8)).double()[:, None].expand(7, width).contiguous()
        low = convert(tensors, DTYPES[0])
        yield low["x"], launch(driver, "layer_norm_linear", low, settings, 0, H100), zeros


@pytest.mark.parametrize("width", [56, 112, *WIDTHS])
def test_the_mean_of_equal_values_is_that_value(driver, width):
    """And LayerNorm's result is its bias, to the last bit."""
    for x, ours, zeros in of_equal_values(driver, width):
        assert torch.equal(ours["mean"], x[:, 0].float())
        assert torch.equal(ours["out"], zeros["out"])


def test_squares_beyond_float32(driver):
    """1 / σ is then 0, as in PyTorch, and nothing is NaN."""
    tensors, settings = make("layer_norm_linear", dict(shape=(7, 120), n=48))
    low = convert(tensors | {"x": 1e25 * tensors["x"]}, torch.bfloat16)
    ours = launch(driver, "layer_norm_linear", low, settings, 0, H100)
    assert (ours["rstd"] == 0).all() and ours["mean"].isfinite().all() and ours["out"].isfinite().all()


@pytest.mark.parametrize("operator", ["layer_norm_linear", "linear_residual"])
def test_nothing_is_written_beside_the_result(driver, operator):
    """The memory before and after it belongs to others; and the emulation reports every store outside the tensor."""
    tensors, settings = make(operator, dict(shape=(37, 24), n=24))
    tensors = convert(tensors, torch.bfloat16)
    buffer = torch.full((40, 24), 42.0, dtype=torch.bfloat16)
    launch(driver, operator, tensors, settings, 0, H100, out=buffer[1:38])
    assert torch.equal(buffer[1:38], launch(driver, operator, tensors, settings, 0, H100)["out"])
    assert (buffer[:1] == 42).all() and (buffer[38:] == 42).all()


def test_matrices_lie_in_different_banks(driver):
    """In all launches that this file has made so far."""
    assert driver.matrix_conflicts() == 0


# ------------------------------------------------------------------------------------------------------ planted faults

RACE = "no barrier after|nobody wrote it|in flight"
WRONG = "error .* is over"
OUTSIDE = "outside of every buffer"
PRODUCT, FRAGMENTS = "row_product_kernel.cu", "row_fragments.h"
FAULTS = [
    (PRODUCT, "sync_warp();  // all lanes' copies are in the slice", "", RACE),
    (PRODUCT, "sync_warp();  // all lanes have read the slice", "", RACE),
    (PRODUCT, "sync_warp();  // all lanes are done with the slice", "", RACE),
    (PRODUCT, "sync_threads();  // LayerNorm's parameters are there", "", RACE),
    (PRODUCT, "sync_threads();  // weights and biases are there", "", RACE),
    (PRODUCT, "wait_copies<1>();\n      sync_threads();", "sync_threads();", "in flight"),
    (PRODUCT, "wait_copies<0>();", "wait_copies<1>();", "in flight"),
    (PRODUCT, "int64_t{plan.blocks_x} * plan.warps * kRows;", "plan.warps * kRows;", RACE),
    (PRODUCT, "block_index_y() * plan.groups * kColumnGroup", "block_index_y() * kColumnGroup", RACE),
    (PRODUCT, "row / 2 % 4 * 8 + row / 8 % 4 * 2", "row / 8 % 4 * 8 + row / 2 % 4 * 2", WRONG),
    (PRODUCT, "column < columns && row", "row", f"{OUTSIDE}|{RACE}"),
    (PRODUCT, "&& row + 8 * i < args.count; }", "; }", OUTSIDE),
    (PRODUCT, "of_group + 32 * k", "of_group", WRONG),
    (FRAGMENTS, "const bool valid = unit < valid_units", "const bool valid = true", f"{OUTSIDE}|{WRONG}"),
    (FRAGMENTS, "k + 1 < TILES && k + 1 < tiles", "k + 1 < TILES && k + 2 < tiles", WRONG),
]


@pytest.mark.parametrize("header, text, other, says", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found(header, text, other, says):
    driver = Driver("rows", [(header, text, other)], ["MVIT_ONLY_BFLOAT16"])
    for seed in range(5 if says in (RACE, "in flight") else 2):  # without a race, any order has the same values
        with pytest.raises(AssertionError, match=says):
            run_all(driver, seed)


def test_a_mean_by_the_reciprocal_alone_is_found():
    """1 / 120 is rounded, and a sum of 120 equal values times it is not always the value."""
    text = "fmaf(fmaf(-mean, count, sum), one_of, mean)"
    driver = Driver("rows", [("fragments.h", text, "mean")], ["MVIT_ONLY_BFLOAT16"])
    assert any(not torch.equal(ours["mean"], x[:, 0].float()) for x, ours, _ in of_equal_values(driver, 120))


def test_without_a_fault_the_same_is_right(driver):
    run_all(driver, 0)


def run_all(driver, seed):
    check(driver, "layer_norm_linear", dict(shape=(70, 120), n=200), torch.bfloat16, (seed,), ODD)
    check(driver, "layer_norm_linear", dict(shape=(70, 120), n=200), torch.bfloat16, (seed,), PAIRS)
    check(driver, "linear_residual", dict(shape=(40, 264), n=72), torch.bfloat16, (seed,), DEEP)
