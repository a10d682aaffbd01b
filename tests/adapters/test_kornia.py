# SPDX-License-Identifier: Apache-2.0
"""Kornia's MobileViT, which differs from the paper's: what the adapter accepts and declines, dropout, errors."""

import pytest
import torch
from kornia.models import vit_mobile
from torch import nn

from mvit_kernels import accelerate, report
from support import models
from support.declined import LoRA, assert_declined, evaluated, replaced
from support.models import accelerated, assert_same, blocks, fast_calls

X = models.images(1, 64, 64).double()
LAYER = "transformer.layers.0"


class _Swapped(vit_mobile.Transformer):
    def forward(self, x):
        for attention, mlp in self.layers:
            x = mlp(x) + x
            x = attention(x) + x
        return x


def _as(cls):
    def make(module):
        module.__class__ = cls
        return module

    return make


def _scale(block):
    block.transformer.layers[1][0].fn.scale = 0.5


def _linear(inputs, outputs):
    linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    nn.init.constant_(linear.weight, 0.01)
    return linear


DECLINED = {
    "LoRA": (replaced(f"{LAYER}.0.fn.to_qkv", LoRA), f"{LAYER}.0.fn.to_qkv is support.declined.LoRA"),
    "another scale": (_scale, "layer 1 scales its scores by 0.5"),
    "another activation": (replaced(f"{LAYER}.1.fn.net.1", lambda _: nn.GELU()), f"{LAYER}.1.fn.net.1", "only SiLU"),
    "softmax over queries": (replaced(f"{LAYER}.0.fn.attend", lambda _: nn.Softmax(dim=-2)), f"{LAYER}.0.fn.attend"),
    "another order": (replaced("transformer", _as(_Swapped)), "transformer is tests.adapters.test_kornia._Swapped"),
    "one more step": (lambda block: block.transformer.layers[0][1].fn.net.append(nn.Tanh()), "6 steps instead of 5"),
    "no bias": (replaced(f"{LAYER}.0.fn.to_out.0", lambda _: _linear(32, 64)), "a linear of layer 0 has no bias"),
    "norms differ": (lambda block: setattr(block.transformer.layers[0][0].norm, "eps", 0.1), "different eps"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    change, *words = DECLINED[case]
    assert_declined("kornia", change, *words)


@pytest.mark.parametrize(("heads", "bias"), [(2, False), (8, True)])
def test_other_heads_and_a_qkv_bias(heads, bias):
    """Kornia's 32 inner channels may be split into other heads; a bias, if there were one, would be used."""
    model = models.build("kornia").double()
    for attention, _ in blocks(model)[0].transformer.layers:
        attention.fn.heads, attention.fn.scale = heads, (32 // heads) ** -0.5
        if bias:
            attention.fn.to_qkv.bias = nn.Parameter(torch.linspace(-1, 1, 96, dtype=torch.float64))
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), X), evaluated(model, X))
    assert len(calls) == 3


@pytest.mark.parametrize("patch_size", [(2, 2), (4, 1), (1, 2)])
def test_other_patches(patch_size):
    model = models.build("kornia", patch_size=patch_size).double()
    x = models.images(2, 128, 64).double()
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), x), evaluated(model, x))
    assert len(calls) == 3


@pytest.mark.parametrize("size", [(96, 96), (64, 224)])
def test_maps_that_do_not_split_stay_kornias_error(size):
    model = models.build("kornia")
    errors = []
    for candidate in (model, accelerated(model)):
        with pytest.raises(RuntimeError, match="is invalid for input of size") as caught:
            candidate(models.images(1, *size))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_live_dropout_draws_what_kornia_draws(probability):
    """After the out-projection, after SiLU and after fc2."""
    model = models.build("kornia", dropout=probability).double()
    x = models.images(2, 64, 128).double()
    theirs = models.assert_same_draws(model, x)
    assert not torch.equal(model(x), theirs)


def test_dropout_left_on_in_evaluation():
    models.assert_dropout_left_on(models.build("kornia", dropout=0.2).double(), X)


def test_the_input_comes_last_in_the_concatenation():
    """The order matters to the last convolution: with the halves swapped, the block gives something else."""
    block = blocks(models.build("kornia"))[0].double()
    x = torch.randn(1, 48, 4, 4, dtype=torch.float64)
    expected = block(x).detach()
    seen = []
    block.conv4.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_same(accelerate(block, strict=True)(x).detach(), expected)
    assert torch.equal(seen[0][:, 48:], x)
    assert [part.library for part in report(block).blocks] == ["kornia"]


@pytest.mark.parametrize(("version", "accepted"), [("0.6.9", False), ("0.6.10", True), ("1.0rc1", True)])
def test_releases_that_unfolded_wrongly_are_declined(version, accepted, monkeypatch):
    monkeypatch.setattr("kornia.__version__", version)
    model = accelerate(models.build("kornia"))
    assert len(report(model).accelerated) == (3 if accepted else 0)
    assert accepted or "before 0.6.10" in str(report(model))
