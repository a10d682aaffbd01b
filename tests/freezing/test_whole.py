# SPDX-License-Identifier: Apache-2.0
"""A frozen network as one native call: when it is one, when it is not, and that nobody can tell but by the time."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels.backends import cpu
from mvit_kernels.freezing import network
from support import models
from support.native import skip_without_a_compiler
from support.tolerance import assert_close_as_pytorch
from support.whole import CLASSIFIERS, NETWORKS, frozen_network, tensors
from support.whole import network as built

skip_without_a_compiler()

IMAGES = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))  # whole patches, as Kornia wants them


@pytest.fixture
def calls(monkeypatch):
    """The native calls that were made."""
    made, call = [], network.Network.rows
    monkeypatch.setattr(network.Network, "rows", lambda self, *of: made.append(self) or call(self, *of))
    return made


def part_by_part(frozen: nn.Module, x: torch.Tensor):
    return type(frozen).__mro__[1].forward(frozen, x)


def classifier_of(name: str, frozen: nn.Module) -> nn.Module:
    return frozen.get_submodule(NETWORKS[name][1])


def bits(output) -> list[tuple]:
    return [(y.stride(), y.dtype, y.flatten().tolist()) for y in tensors(output)]


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_it_is_one_call_with_the_result_of_its_parts(name, calls):
    model, frozen = built(name), frozen_network(name)
    output = frozen(IMAGES)
    assert len(calls) == 1
    stock, parts = model(IMAGES), part_by_part(frozen, IMAGES)
    assert len(calls) >= 4  # stem, stages, last convolution, where they are Sequentials
    assert type(output) is type(stock) is type(parts)
    exact = tensors(copy.deepcopy(model).double()(IMAGES.double()))
    for ours, of_parts, theirs, truth in zip(*map(tensors, (output, parts, stock)), exact, strict=True):
        assert (ours.shape, ours.stride()) == (of_parts.shape, of_parts.stride())
        assert_close_as_pytorch("result", ours, theirs, truth)
        if ours.dim() == 4:
            assert torch.equal(ours, of_parts)  # pooling and the linear layer alone are computed otherwise
    alone = frozen(IMAGES[:1].clone(memory_format=torch.channels_last))
    assert [torch.equal(a, b[:1]) for a, b in zip(tensors(alone), tensors(output), strict=True)]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bfloat16(name, calls):
    model, frozen = built(name), mvit_kernels.freeze(built(name), dtype=torch.bfloat16)
    output = tensors(frozen(IMAGES))
    assert calls[0].program[1] == cpu.bf16_products()  # odd numbers of classes do not keep it from products of pairs
    assert len(calls) == 1 and all(y.dtype == torch.bfloat16 for y in output)
    exact = tensors(copy.deepcopy(model).double()(IMAGES.double()))
    stock = tensors(copy.deepcopy(model).bfloat16()(IMAGES.bfloat16()))
    for ours, theirs, truth in zip(output, stock, exact, strict=True):
        assert_close_as_pytorch("result", ours, theirs, truth)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_looks_as_before(name):
    model, frozen = built(name), mvit_kernels.freeze(built(name))
    assert isinstance(frozen, type(model)) and type(frozen).__name__ == type(model).__name__
    assert {key.split(".")[0] for key in frozen.state_dict()} == {key.split(".")[0] for key in model.state_dict()}
    assert repr(frozen).startswith(type(model).__name__ + "(")
    if name in CLASSIFIERS:
        assert type(classifier_of(name, frozen)) is nn.Linear
    packed = [part for part in frozen.modules() if getattr(part, "_network", None) is not None]
    assert not packed  # weights are not packed twice


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_copies_are_one_call_too(name, copied, calls):
    wanted = bits(frozen_network(name)(IMAGES))
    again = copied(frozen_network(name))
    assert bits(again(IMAGES)) == wanted and len(calls) == 2
    buffer = io.BytesIO()
    torch.save(again.state_dict(), buffer)
    buffer.seek(0)
    for value in (*again.parameters(), *list(again.buffers())[-2:]):
        value.mul_(0)
    again.load_state_dict(torch.load(buffer))
    assert bits(again(IMAGES)) == wanted and len(calls) == 3


@pytest.mark.parametrize("name", [name for name, (_, classifier) in NETWORKS.items() if classifier])
@torch.no_grad()
def test_changes_of_the_classifier_are_seen(name, calls):
    again = copy.deepcopy(frozen_network(name))
    before, classifier = models.output(again(IMAGES)), classifier_of(name, again)
    for value in (classifier.weight, classifier.bias):
        value.mul_(2)
    torch.testing.assert_close(models.output(again(IMAGES)), 2 * before)
    parameters = isinstance(classifier, nn.Linear)
    zeros = torch.zeros_like(classifier.bias)
    classifier.bias = nn.Parameter(zeros) if parameters else zeros
    torch.testing.assert_close(models.output(again(IMAGES)), models.output(part_by_part(again, IMAGES)))
    if parameters:
        owner, _, last = NETWORKS[name][1].rpartition(".")
        again.get_submodule(owner).add_module(last, nn.Linear(classifier.in_features, 3))
        calls.clear()
        assert models.output(again(IMAGES)).shape == (2, 3) and len(calls) == 1


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_hooks_are_called_and_other_dtypes_served(name, calls):
    again = copy.deepcopy(frozen_network(name))
    wanted = bits(part_by_part(again, IMAGES))
    inner = [
        part
        for part in again.modules()
        if part is not again and not any(isinstance(part, kind) for kind in (nn.ModuleList, nn.Identity))
    ]
    frozen = [part for part in inner if hasattr(part, "generation")]
    passed = [part for part in inner if part not in [deep for one in frozen for deep in one.modules()]]
    for module in (frozen[0], frozen[-1], *passed):
        seen, calls[:] = [], []
        hook = module.register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        assert bits(again(IMAGES)) == wanted and seen == [1] and len(calls) >= 3, module
        hook.remove()
    for dtype, count in ((torch.float64, 0), (torch.float32, 1), (torch.bfloat16, 1)):
        calls.clear()
        y = tensors(again.to(dtype)(IMAGES))[0]
        assert y.isfinite().all() and y.dtype == dtype and len(calls) == count  # float64 has no kernels


@pytest.mark.parametrize("name", ["timm", "huggingface", "cvnets", "kornia"])
def test_gradients_of_the_images_go_part_by_part(name, calls):
    assert models.output(frozen_network(name)(IMAGES.clone().requires_grad_())).requires_grad and not calls


@pytest.mark.parametrize(
    "name, path", [("timm", "head.drop"), ("huggingface", "dropout"), ("cvnets", "classifier.drop")]
)
@torch.no_grad()
def test_dropout_that_was_set_to_train_drops(name, path, calls):
    model = copy.deepcopy(built(name))
    owner, _, last = path.rpartition(".")
    if name == "cvnets":  # between the pooling and the linear layer
        pool, linear = model.classifier
        model.classifier = nn.Sequential()
        for key, part in (("global_pool", pool), ("drop", nn.Dropout(0.9)), ("fc", linear)):
            model.classifier.add_module(key, part)
    else:
        setattr(model.get_submodule(owner), last, nn.Dropout(0.9))
    frozen = mvit_kernels.freeze(model)
    assert torch.equal(*(models.output(frozen(IMAGES)) for _ in range(2))) and len(calls) == 2
    frozen.get_submodule(path).train()
    assert not torch.equal(*(models.output(frozen(IMAGES)) for _ in range(2)))


def test_dropout_of_a_model_that_was_left_in_training_drops():
    frozen = mvit_kernels.freeze(mvit_kernels.MobileViT("xxs", num_classes=7, classifier_dropout=0.9))
    with pytest.raises(RuntimeError, match="frozen for inference"):
        frozen.train()
    with torch.no_grad():
        assert frozen.training and not torch.equal(frozen(IMAGES), frozen(IMAGES))


@pytest.mark.parametrize("name", ["timm", "own", "huggingface"])
@torch.no_grad()
def test_a_forward_that_was_patched_is_called(name, calls):
    again, seen = copy.deepcopy(frozen_network(name)), []
    classifier = classifier_of(name, again)
    again(IMAGES)
    calls.clear()
    classifier.forward = lambda x: seen.append(x) or type(classifier).forward(classifier, x)
    assert len(tensors(again(IMAGES))) == len(seen) == 1 and len(calls) >= 3


@pytest.mark.parametrize(
    "change, count",
    [
        (lambda model: setattr(model.head, "fc", nn.Sequential(nn.Linear(320, 5))), 3),
        (lambda model: setattr(model.head, "drop", nn.Softmax(1)), 3),
        (lambda model: model.head.reset(5, "max"), 3),
        (lambda model: setattr(model, "head", nn.Flatten()), 3),
        (lambda model: setattr(model.head, "fc", nn.utils.parametrizations.weight_norm(nn.Linear(320, 5))), 3),
        (lambda model: model.head.reset(0, ""), 1),
        (lambda model: model.head.reset(0), 1),
        (lambda model: model.head.reset(4), 1),
    ],
    ids="another classifier, another layer, maximum, no head, parametrized, no pooling, no classes, four".split(", "),
)
@torch.no_grad()
def test_other_heads(change, count, calls):
    model = copy.deepcopy(built("timm"))
    change(model)
    changed_before, changed_after = mvit_kernels.freeze(model), mvit_kernels.freeze(built("timm"))
    change(changed_after)
    changed_after.eval().head.load_state_dict(model.head.state_dict())
    wanted = model.eval()(IMAGES)
    for frozen in (changed_before, changed_after):
        calls.clear()
        torch.testing.assert_close(frozen(IMAGES), wanted, rtol=1e-3, atol=1e-4)
        assert len(calls) == count


@torch.no_grad()
def test_a_head_that_is_put_back_is_seen(calls):
    """Also deep inside, where the model's own children stay the same."""
    again = copy.deepcopy(frozen_network("timm"))
    wanted, linear = again(IMAGES), again.head.fc
    again.head.fc = nn.Sequential(linear)
    calls.clear()
    torch.testing.assert_close(again(IMAGES), wanted)
    assert len(calls) == 3
    again.head.fc = linear
    calls.clear()
    assert torch.equal(again(IMAGES), wanted) and len(calls) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_images_raise_as_part_by_part(name):
    frozen = frozen_network(name)
    for x in (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 4, 64, 64), torch.zeros(3, 64), "image"):
        with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)) as one_call:
            frozen(x)
        with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)) as parts:
            part_by_part(frozen, x)
        assert str(one_call.value) == str(parts.value)
