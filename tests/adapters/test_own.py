# SPDX-License-Identifier: Apache-2.0
"""Our own MobileViT: born accelerated, and treated by the adapter as any other library's."""

import pytest
import torch
from torch import nn

from mvit_kernels import accelerate, report, restore
from mvit_kernels.backends import use_backend
from mvit_kernels.nn import MobileViT, MobileViTBlock, TransformerLayer
from support import models
from support.declined import LoRA, assert_declined, classes, evaluated, replaced
from support.models import assert_same, blocks, fast_calls

X = models.images(1, 64, 64).double()


def test_models_are_born_accelerated():
    model = MobileViT("xxs", num_classes=3)
    assert [block.library for block in report(model).accelerated] == ["own"] * 3
    with fast_calls() as calls:
        model(X.float())
    assert len(calls) == 3
    assert [type(block) for block in blocks(restore(model))] == [MobileViTBlock] * 3
    with fast_calls() as calls:
        model(X.float())
    assert not calls


def test_blocks_by_themselves_are_plain_until_accelerated():
    torch.manual_seed(0)
    block = MobileViTBlock(8, dim=16, depth=2, patch_size=(2, 3), num_heads=2, mlp_ratio=3.0).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    with fast_calls() as calls:
        expected = block(x).detach()
    assert not calls
    with fast_calls() as calls:
        assert_same(accelerate(block, strict=True)(x).detach(), expected)
    assert calls == [(2, 16, 5, 7)]
    assert classes(restore(block))[0] is MobileViTBlock


class _Parallel(TransformerLayer):
    """Attention and MLP side by side."""

    def forward(self, x):
        return super().forward(x) + self.fc2(nn.functional.silu(self.fc1(self.norm2(x))))


def _parallel(layer):
    layer.__class__ = _Parallel
    return layer


def _fewer_heads(block):
    block.transformer[0].num_heads = 2


DECLINED = {
    "LoRA": (replaced("transformer.1.qkv", LoRA), "transformer.1.qkv is support.declined.LoRA"),
    "another layer": (replaced("transformer.0", _parallel), "transformer.0 is tests.adapters.test_own._Parallel"),
    "other heads in one layer": (_fewer_heads, "its layers differ in their heads"),
    "another norm": (
        replaced("norm", lambda _: nn.RMSNorm(64).double()),
        "norm is torch.nn.modules.normalization.RMSNorm",
    ),
    "norms differ": (lambda block: setattr(block.norm, "eps", 0.1), "different eps"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    change, *words = DECLINED[case]
    assert_declined("own", change, *words)


@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_live_dropout_draws_what_the_textbook_path_draws(size):
    """A layer's projection and MLP share one dropout module; each has its own draw."""
    model = models.build("own", dropout=0.3).double()
    x = models.images(2, *size).double()
    theirs = models.assert_same_draws(model, x)
    assert not torch.equal(model(x), theirs)


@pytest.mark.parametrize("accelerated", [True, False])
def test_gradient_checkpointing(accelerated):
    model = models.build("own", dropout=0.1).double()
    x = models.images(2, 64, 96).double()
    if accelerated:
        accelerate(model)
    results = []
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        seen = []
        handles = [b.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m)) for b in blocks(model)]
        torch.manual_seed(5)
        with use_backend("reference"), fast_calls() as calls:
            results.append(models.differentiated(model, x))
        assert len(seen) == (6 if checkpointing else 3)
        assert len(calls) == (len(seen) if accelerated else 0)
        for handle in handles:
            handle.remove()
    (ours, our_gradients), (expected, gradients) = results
    assert_same(ours, expected)
    models.assert_gradients_as_pytorch(our_gradients, gradients, gradients, unit=1e-9)


def test_feature_maps_and_another_classifier():
    plain = models.build("own").double()
    ours = models.accelerated(plain)
    for value, expected in zip(ours.feature_maps(X), plain.feature_maps(X), strict=True):
        assert_same(value.detach(), expected.detach())
    ours.reset_classifier(7)
    assert evaluated(ours, X).shape == (1, 7) and len(report(ours).accelerated) == 3


@pytest.mark.parametrize("patch_size", [(2, 2), (1, 2), (3, 4)])
def test_other_patches(patch_size):
    model = models.build("own", patch_size=patch_size).double()
    with fast_calls() as calls:
        assert_same(evaluated(models.accelerated(model), X), evaluated(model, X))
    assert len(calls) == 3
