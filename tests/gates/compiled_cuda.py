# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc compiles them for sm_80, executed: small sizes and one image of MobileViT-S by the tolerance
rule, under every check of the emulation (see support/ptx/compiled_cuda.py). `make test-compiled` runs it:

    python -m pytest tests/gates/compiled_cuda.py

tests/backends/cuda runs the source instead; there no address, predicate or loop of the compiler's exists.
"""

import functools
import re

import pytest
import torch

from backends.cuda import test_half_filter, test_mlp, test_patch_attention, test_rows, test_transformer
from backends.cuda.test_inverted_residual import sizes_of
from gates.cuda_gate import tool
from support.emulation import EmulationFault
from support.ptx.compiled_cuda import CompiledDriver

if tool("nvcc") is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
driver = functools.cache(CompiledDriver)


def driver_of(operator):
    return driver("mlp" if operator == "layer_norm_mlp" else "rows")


@pytest.mark.parametrize(
    "operator, sizes",
    [
        ("linear_residual", dict(shape=(33, 32), n=72, bias=False)),
        ("linear_residual", dict(shape=(35, 480), n=72)),  # weights in parts
        ("linear_residual", dict(shape=(1, 32, 32, 144), n=144)),
        ("layer_norm_linear", dict(shape=(33, 80), n=72, activation="silu", bias=False)),
        ("layer_norm_linear", dict(shape=(1, 32, 32, 144), n=432)),
        ("layer_norm_mlp", dict(shape=(65, 64), hidden=256)),
        ("layer_norm_mlp", dict(shape=(5, 200), hidden=40)),
        ("layer_norm_mlp", dict(shape=(1, 32, 32, 144), hidden=288)),
    ],
    ids=str,
)
def test_rows_in_bfloat16(operator, sizes):
    test_rows.check(driver_of(operator), operator, sizes, torch.bfloat16)


@pytest.mark.parametrize("width", [120, 240])
def test_rows_of_warps_with_32(width):
    sizes = dict(shape=(70, width), n=72)
    test_rows.check(driver("rows"), "layer_norm_linear", sizes, torch.bfloat16, gpu=test_rows.PAIRS)


@pytest.mark.parametrize("operator", ["linear_residual", "layer_norm_linear", "layer_norm_mlp"])
def test_rows_in_float16(operator):
    sizes = dict(shape=(2, 3, 5, 120), **({"hidden": 240} if "mlp" in operator else {"n": 120}))
    test_rows.check(driver_of(operator), operator, sizes, torch.float16)


@pytest.mark.parametrize(
    "sizes, gpu",
    [
        (dict(shape=(1, 32, 32, 144), hidden=288), test_mlp.STAY),
        (dict(shape=(150, 192), hidden=384), test_mlp.PASS),
        (dict(shape=(70, 64), hidden=200), test_mlp.TWO_SLOTS),
        (dict(shape=(40, 232), hidden=136), test_mlp.STAY),
    ],
    ids=str,
)
def test_the_mlp_of_many_rows(sizes, gpu):
    test_rows.check(driver("mlp"), "layer_norm_mlp", sizes, torch.bfloat16, gpu=gpu)


@pytest.mark.parametrize(
    "shape, heads, head_dim, patch",
    [
        ((2, 4, 4), 4, 8, (2, 2)),
        ((1, 3, 6), 2, 22, (1, 2)),
        ((1, 5, 13), 1, 36, (2, 2)),  # 65 tokens
        ((1, 16, 16), 4, 36, (2, 2)),  # stage 3
        ((1, 8, 8), 4, 48, (2, 2)),  # stage 4
        ((1, 4, 4), 4, 60, (2, 2)),  # stage 5
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_and_its_gradients(shape, heads, head_dim, patch, dtype):
    drawn = test_patch_attention.draw(shape, heads, head_dim, patch, dtype)
    test_patch_attention.check(driver("patch_attention"), *drawn, heads, patch)


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        (dict(shape=(1, 32, 32, 144), heads=4, patch=(2, 2), layers=2), torch.bfloat16),  # stage 3, two layers
        (dict(shape=(1, 16, 16, 192), heads=4, patch=(2, 2), layers=1), torch.bfloat16),
        (dict(shape=(1, 8, 8, 240), heads=4, patch=(2, 2), layers=1), torch.bfloat16),
        (dict(shape=(1, 14, 14, 80), heads=4, patch=(2, 2), layers=1), torch.float16),  # N = 49
        (dict(shape=(1, 4, 6, 64), heads=4, patch=(2, 2)), torch.float16),
    ],
    ids=str,
)
def test_transformer_in_one_launch(sizes, dtype):
    test_transformer.check(driver("transformer"), sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 2), (48, 48, 1)], ids=str)
def test_an_inverted_residual_that_filters_in_float16(shape, dtype):
    test_half_filter.check(driver("inverted_residual"), sizes_of(*shape), dtype)


@pytest.mark.parametrize(
    "pattern, by, says",
    [
        (r"bar\.sync\s+0;", "", "no barrier|nobody wrote it|in flight"),
        (r"cp\.async\.wait_group\s+\d;", "", "in flight|ends with copies"),
        (r"(st\.global\S+\s+\[%rd\d+)\]", r"\1+65536]", "a write of .* is outside of every buffer"),
        (r"selp\.b32\s+(%r\d+), (?:16, 0|0, 16), %p\d+;", r"mov.b32 \1, 16;", "a read .* is outside of every"),
    ],
    ids=["barriers", "waits", "stores", "copies past the end"],
)
def test_a_planted_fault_is_reported(pattern, by, says):
    """At every place that it fits."""
    faulty = CompiledDriver("rows", lambda text: re.sub(pattern, by, text))
    with pytest.raises(EmulationFault, match=says):
        test_rows.check(faulty, "linear_residual", dict(shape=(33, 32), n=72, bias=False), torch.bfloat16)
