# SPDX-License-Identifier: Apache-2.0
"""Training with accelerated blocks loses what plain PyTorch loses, step by step, by the rule of examples/parity.py."""

from __future__ import annotations

import copy

import pytest
import torch

from mvit_kernels.adapters import _block
from support.examples import load
from support.models import accelerated, fast_calls

parity = load("parity")
STEPS, BATCH = 8, 8


@pytest.fixture(scope="module")
def data():
    """Noise of four colours, one a class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * BATCH) % 4
    colours = torch.rand(4, 3, 1, 1, generator=generator)
    images = (colours[labels] + 0.2 * torch.randn(len(labels), 3, 64, 64, generator=generator)).clamp(0, 1)
    return images, labels, parity.epochs(len(labels), BATCH, STEPS, seed=0)


@pytest.mark.parametrize("library", ["timm", "own"])
def test_losses_step_by_step(library, data):
    plain = parity.build(library, 4)
    with fast_calls() as calls:
        truth, allowed, ours = parity.drift(plain, accelerated(plain), *data, parity.SGD[library], runs=2)
    assert len(calls) == 3 * STEPS * 2  # the accelerated runs alone
    assert truth[-1] < truth[0] - 0.1, "nothing is learned, so nothing is compared"
    assert allowed[-1] > 0
    miss = parity.first_miss(truth, allowed, ours)
    assert miss is None, f"step {miss}: error {ours[miss]:.1e}, of plain PyTorch {allowed[miss]:.1e}"


def test_a_slightly_wrong_gradient_is_found(data, monkeypatch):
    """A thousandth of one transformer's gradient, which no user would see in the loss's curve."""
    original = _block.transformer_on_map

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.001

    monkeypatch.setattr(
        _block, "transformer_on_map", lambda x, *args, **kwargs: original(Off.apply(x), *args, **kwargs)
    )
    plain = parity.build("own", 4)
    truth, allowed, ours = parity.drift(plain, accelerated(plain), *data, parity.SGD["own"], runs=2)
    assert parity.first_miss(truth, allowed, ours) is not None


def test_the_rule():
    truth = [1.0, 1.0, 1.0]
    assert parity.envelope([[1.1, 1.0, 1.3], [1.0, 0.8, 1.0]], truth) == pytest.approx([0.1, 0.2, 0.3])
    assert parity.envelope([[1.0, float("nan"), 1.0]], truth)[1:] == [float("inf")] * 2
    assert parity.first_miss(truth, [0.1, 0.1, 0.2], [0.2, 0.2, 0.39]) is None
    assert parity.first_miss(truth, [0.1, 0.1, 0.2], [0.2, 0.201, 0.39]) == 1
    assert parity.first_miss(truth, [0.1, 0.1, 0.2], [0.2, 0.2, float("nan")]) == 2
    assert parity.first_miss(truth, [0.0] * 3, [1e-7, 2e-7, 3e-7]) == 2  # one rounding unit is left room for, twice


def test_batches():
    batches = parity.epochs(10, 4, 5, seed=1)
    assert [len(batch) for batch in batches] == [4] * 5
    assert len(set(torch.cat(batches[:2]).tolist())) == 8 and not torch.equal(batches[0], batches[2])
    again = parity.reordered(batches, 3)
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(batches, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert parity.reordered(batches, 0)[0] is batches[0]


def test_models_are_plain_until_accelerated():
    for library in ("timm", "own"):
        model = parity.build(library, 4)
        with fast_calls() as calls, torch.no_grad():
            first = model.eval()(torch.ones(1, 3, 64, 64))
        assert not calls
        assert torch.equal(first, copy.deepcopy(parity.build(library, 4)).eval()(torch.ones(1, 3, 64, 64)))
