# SPDX-License-Identifier: Apache-2.0
"""How exact the Triton kernels' float32 sums are, in Triton's interpreter, whose products are made chains of FMAs
like the compiled ones (`support.interpreter`). backends/triton/test_backend.py runs this file in a process of its own,
like interpreted.py:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_sums.py
"""

import importlib

import pytest
import torch
from torch import Tensor

from mvit_kernels.backends.triton.target import INTERPRETED
from support.cases import call, convert, evaluate, make, paths
from support.exactness import MOST, draws, ratios

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
gradients = importlib.import_module("mvit_kernels.backends.triton._weight_gradients")


def noise(value: Tensor, truth: Tensor) -> float:
    """The root mean square of the errors, relative to that of the values."""
    return ((value.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def noise_of_one_chain(terms: int) -> float:
    """The same for sums of so many products of normal numbers, added one after the other."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, terms, generator=generator) for _ in range(2))
    total = torch.zeros(2000)
    for k in range(terms):
        total = (a[:, k].double() * b[:, k].double() + total).float()  # an FMA
    return noise(total, (a.double() * b.double()).sum(1))


LONG = [  # the terms of the longest sum in a result
    ("linear_residual", dict(shape=(24, 1024), n=40), "out", 1024),
    ("linear_residual", dict(shape=(24, 40), n=1024), "gradient of x", 1024),
    ("linear_residual", dict(shape=(1024, 17), n=16), "gradient of weight", 1024),
    ("layer_norm_linear", dict(shape=(24, 240), n=40), "out", 240),
    ("layer_norm_linear", dict(shape=(16, 192), n=576), "gradient of x", 576),
    ("layer_norm_linear", dict(shape=(16, 40), n=720, activation="silu"), "gradient of x", 720),
    ("layer_norm_linear", dict(shape=(1024, 17), n=16), "gradient of weight", 1024),
    ("layer_norm_mlp", dict(shape=(16, 40), hidden=480), "gradient of x", 480),
    ("layer_norm_mlp", dict(shape=(1024, 17), hidden=16), "gradient of fc1_weight", 1024),
]


@pytest.mark.parametrize("operator, sizes, name, terms", LONG, ids=str)
def test_long_sums_are_of_several_chains(operator, sizes, name, terms, monkeypatch):
    """In blocks of √K terms errors are a third of one chain's at K = 500, and grow with K^(3/4). PyTorch's own products
    are summed in blocks too; on an H200, gradients of x by one chain missed the rule at widths 192 and 240."""
    monkeypatch.setattr(gradients, "_PROGRAMS", 1)  # all rows are one part
    gradients._schedule.cache_clear()
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, torch.float32)
    ours = evaluate(lambda t: call(operator, t, settings, "triton"), tensors, (name.removeprefix("gradient of "),))
    doubles = convert(tensors, torch.float64)
    truth = evaluate(lambda t: call(operator, t, settings, "oracle"), doubles, (name.removeprefix("gradient of "),))
    gradients._schedule.cache_clear()
    assert noise(ours[name], truth[name]) < 0.7 * noise_of_one_chain(terms)


def test_attention_makes_no_habit_of_errors():
    """With an exponential between two products, a single chain is not the measure. (Of 6 draws: 30,000 errors of a
    result, whose root mean square is known to a hundredth.)"""
    assert "triton" in paths("patch_attention")  # and loaded
    sizes = dict(shape=(1, 16, 8), heads=2, head_dim=20, patch=(2, 2))
    found = ratios(draws("patch_attention", sizes, "triton", most=6))
    assert len(found) == 2 and max(found.values()) <= MOST, found


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("d", [17, 144, 192, 300])
def test_statistics(d, mean):
    """The mean to half a unit (of the largest values where it is near 0), 1/σ to two, however far the mean is from
    0."""
    tensors, settings = make("layer_norm", dict(shape=(40, d), mean=mean))
    tensors = convert(tensors, torch.float32)
    kernels = importlib.import_module("mvit_kernels.backends.triton.layer_norm")
    _, means, rstds = kernels.forward(*tensors.values(), settings["eps"])
    x = tensors["x"].double()
    true_mean = x.mean(-1)
    true_rstd = 1 / torch.sqrt((x - true_mean[:, None]).square().mean(-1) + settings["eps"])
    unit = torch.finfo(torch.float32).eps
    assert ((means - true_mean).abs() <= 0.5 * unit * true_mean.abs().clamp(min=8.0)).all()
    assert ((rstds - true_rstd).abs() <= 2 * unit * true_rstd).all()
