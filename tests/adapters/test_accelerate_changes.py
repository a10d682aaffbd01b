# SPDX-License-Identifier: Apache-2.0
"""Accelerated models that change after the first call: weights, attributes, submodules and layers, LoRA."""

import copy

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import report, restore
from support import models
from support.declined import LoRA, assert_declined, evaluated, replaced
from support.models import BYPASSED, LIBRARIES, accelerated, assert_same, blocks, double, fast_calls

X = models.images(1, 64, 64).double()


@pytest.mark.parametrize("library", LIBRARIES)
def test_changed_weights_are_seen_by_the_next_call(library):
    model = accelerated(double(library))
    evaluated(model, X)
    name, parameter = [(n, p) for n, p in blocks(model)[0].named_parameters() if p.dim() == 2][0]
    owner, _, leaf = name.rpartition(".")
    owner = blocks(model)[0].get_submodule(owner)

    def assert_seen():
        with fast_calls() as calls:
            ours = evaluated(model, X)
        assert len(calls) == 3
        expected = evaluated(restore(copy.deepcopy(model)), X)
        assert_same(ours, expected)
        return expected

    outputs = [assert_seen()]
    with torch.no_grad():
        parameter.mul_(1.5)
    outputs.append(assert_seen())
    setattr(owner, leaf, nn.Parameter(parameter.detach() * 1.5))
    outputs.append(assert_seen())
    model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})
    outputs.append(assert_seen())
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()}, assign=True)
    outputs.append(assert_seen())
    assert all(not torch.equal(a, b) for a, b in zip(outputs, outputs[1:], strict=False))


def assert_as_restored(model):
    """The fast path, taken in all three blocks, gives what the restored model gives. Leaves the model restored."""
    with fast_calls() as calls:
        ours = evaluated(model, X)
    assert len(calls) == 3
    assert_same(ours, evaluated(restore(model), X))


def test_a_replaced_submodule_is_seen():
    model = accelerated(double())
    evaluated(model, X)
    layer = blocks(model)[0].transformer[0]
    layer.mlp.fc1 = nn.Linear(64, 256).double()  # even of another width
    layer.mlp.fc2 = nn.Linear(256, 64).double()
    blocks(model)[1].conv_1x1 = nn.Conv2d(64, 80, 1, bias=True).double()
    assert_as_restored(model)


def test_changed_attributes_are_seen():
    """eps in all norms, and another number of heads, after the first call."""
    model = accelerated(double())
    evaluated(model, X)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    for layer in blocks(model)[0].transformer:
        layer.attn.num_heads, layer.attn.head_dim, layer.attn.scale = 2, 32, 32**-0.5
    assert_as_restored(model)


def test_layers_added_and_taken_away_are_seen():
    model = accelerated(double())
    evaluated(model, X)
    first, second = blocks(model)[:2]
    first.transformer.append(copy.deepcopy(first.transformer[0]))
    del second.transformer[1]
    assert_as_restored(model)


def test_frozen_parameters_get_no_gradient():
    model = accelerated(models.build("timm"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn" not in name)
    model.train()(X.float()).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("attn" in name), name


def test_lora_comes_and_goes():
    model = accelerated(double())
    plain = evaluated(model, X)
    attention = blocks(model)[0].transformer[0].attn
    linear = attention.qkv
    attention.qkv = LoRA(linear)
    with fast_calls() as calls:
        adapted = evaluated(model, X)
    assert len(calls) == 2 and not torch.equal(adapted, plain)
    assert_same(adapted, evaluated(restore(copy.deepcopy(model)), X))
    attention.qkv = linear
    with fast_calls() as calls:
        assert_same(evaluated(model, X), plain)
    assert len(calls) == 3


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_replaced_transformer_is_declined(library):
    path = BYPASSED[library][0].partition(".")[0]
    assert_declined(library, replaced(path, lambda _: nn.Identity()), path, runs=library in ("timm", "kornia"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_unknown_modules_inside_are_declined(library):
    """An adapter layer that a user added, and that a patched class may call."""

    def change(block):
        block.get_submodule(BYPASSED[library][1]).adapter = nn.Linear(1, 1).double()

    assert_declined(library, change, "adapter", "is not part of this library's block", runs=False)


def test_frozen_copies_leave_the_model_accelerated():
    model = accelerated(models.build("timm"))
    frozen = mvit_kernels.freeze(model)
    assert len(report(model).accelerated) == 3
    assert all(block.library == "frozen" for block in report(frozen).blocks)
