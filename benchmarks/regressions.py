# SPDX-License-Identifier: Apache-2.0
"""The CPU path under pytest-benchmark: ``make bench-regressions`` runs it and compares it with the previous run.

    python -m pytest benchmarks/regressions.py --benchmark-autosave --benchmark-compare

Run it by hand, before and after a change, on an otherwise idle machine; runs are saved in ``.benchmarks/``. Every call
is first checked against the tolerance rule. It uses one thread, so that scheduling does not affect the times.

Two of its tests need no previous run: a model in bfloat16 that is slower than in float32 is a failure.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from mvit_kernels import MobileViT, accelerate, backends, freeze, verify
from mvit_kernels.bench.suites import operators
from mvit_kernels.bench.suites.operands import OPERATORS, operands, stages
from mvit_kernels.bench.timing import interleave


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", stages(["s"], 256, 1), ids=lambda stage: f"stage{stage.index}")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark, operator, stage, dtype):
    """The C++ operator, forward, at every stage of S."""
    if why := backends.unavailable("cpu", "cpu"):
        pytest.skip(why[0])

    def draw(seed):
        return operands(operator, stage, seed=seed).to(dtype=dtype)

    case = draw(0)
    function = functools.partial(case.public, backend="cpu")
    with torch.no_grad():
        worst = operators.check(case, False, *operators.truth_of(case, False), function, draw)
        assert worst.ok, worst
        benchmark(function, *case.tensors)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ("transformer", "inverted_residual")])
def test_operator_with_backward(benchmark, operator):
    """The C++ operator, forward and backward, at stage 3 of S."""
    if why := backends.unavailable("cpu", "cpu"):
        pytest.skip(why[0])

    def draw(seed):
        return operands(operator, stages(["s"], 256, 1)[0], seed=seed)

    case = draw(0)
    function = functools.partial(case.public, backend="cpu")
    worst = operators.check(case, True, *operators.truth_of(case, True), function, draw)
    assert worst.ok, worst
    benchmark(operators.call_of(function, case.tensors, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["xxs", "s"])
def test_frozen_network(benchmark, variant, dtype):
    """A whole frozen network at batch 1 and 256 px."""
    torch.manual_seed(0)
    model = MobileViT(variant, num_classes=1000).eval()
    images = torch.rand(1, 3, 256, 256)
    fast = freeze(model, dtype=dtype)
    assert verify(fast, images, reference=model).ok
    images = images.to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        benchmark(fast, images)


NOISE = 1.02  # of medians of interleaved calls


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["xxs", "s"])
@pytest.mark.parametrize("form", ["frozen", "accelerated"])
def test_bfloat16_is_not_slower_than_float32(form, variant, batch):
    """The same model in both, in turns."""
    torch.manual_seed(0)
    model = MobileViT(variant, num_classes=1000).eval()
    images = torch.rand(batch, 3, 256, 256)
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        fast = freeze(model, dtype=dtype) if form == "frozen" else accelerate(copy.deepcopy(model).to(dtype))
        fast = fast.to(memory_format=torch.channels_last)
        calls[dtype] = functools.partial(fast, images.to(dtype, memory_format=torch.channels_last))
    with torch.inference_mode():
        times = interleave(calls, seconds=4)
    ratio = times[torch.bfloat16].median / times[torch.float32].median
    assert ratio <= NOISE, f"{form} {variant} at batch {batch}: bfloat16 takes {ratio:.2f} times float32's time"
