# SPDX-License-Identifier: Apache-2.0
"""A frozen classifier as one native call: when it is one, when it is not, and that nobody can tell but by the time."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

import mvit_kernels
from mvit_kernels.backends import cpu
from mvit_kernels.freezing import network
from mvit_kernels.nn import MobileViT
from support.native import skip_without_a_compiler
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()

KINDS = ("timm", "timm avg", "own")


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "own":
        return MobileViT("xxs", num_classes=7).eval()
    pooling = {"global_pool": "avg"} if kind == "timm avg" else {}
    return timm.create_model("mobilevit_xxs", num_classes=7, **pooling).eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def frozen(model):
    return mvit_kernels.freeze(model)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """The native calls that were made."""
    made, call = [], network.Network.__call__
    monkeypatch.setattr(network.Network, "__call__", lambda self, x: made.append(self) or call(self, x))
    return made


def part_by_part(frozen: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(frozen).__mro__[1].forward(frozen, x)


def linear_of(frozen: nn.Module) -> nn.Linear:
    return frozen.head.fc if hasattr(frozen, "head") else frozen.classifier


@torch.inference_mode()
def test_it_is_one_call_with_the_logits_of_its_parts(model, frozen, images, calls):
    logits = frozen(images)
    assert len(calls) == 1
    assert logits.shape == (2, 7) and logits.is_contiguous()
    exact = copy.deepcopy(model).double()(images.double())
    assert_close_as_pytorch("logits", logits, model(images), exact)
    assert torch.equal(frozen(images[:1]), logits[:1])  # whatever the batch
    part_by_part(frozen, images)
    assert len(calls) == 5  # stem, stages, last convolution


@torch.no_grad()
def test_bfloat16(model, images, calls):
    frozen = mvit_kernels.freeze(model, dtype=torch.bfloat16)
    logits = frozen(images)
    assert calls[0].program[1] == cpu.bf16_products()  # seven classes do not keep it from products of pairs
    assert len(calls) == 1 and logits.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()(images.double())
    assert_close_as_pytorch("logits", logits, copy.deepcopy(model).bfloat16()(images.bfloat16()), exact)


def test_the_model_looks_as_before(model):
    frozen = mvit_kernels.freeze(model)
    assert isinstance(frozen, type(model)) and type(frozen).__name__ == type(model).__name__
    assert {name.split(".")[0] for name in frozen.state_dict()} == {name.split(".")[0] for name in model.state_dict()}
    assert type(linear_of(frozen)) is nn.Linear and repr(frozen).startswith(type(model).__name__ + "(")
    packed = [part for part in frozen.modules() if getattr(part, "_network", None) is not None]
    assert not packed  # weights are not packed twice


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))])
def test_copies_are_one_call_too(frozen, images, copied, calls):
    with torch.no_grad():
        wanted = frozen(images)
        again = copied(frozen)
        assert torch.equal(again(images), wanted) and len(calls) == 2
        buffer = io.BytesIO()
        torch.save(again.state_dict(), buffer)
        buffer.seek(0)
        linear_of(again).weight.mul_(0)
        again.load_state_dict(torch.load(buffer))
        assert torch.equal(again(images), wanted) and len(calls) == 3


def test_changes_of_the_classifier_are_seen(frozen, images, calls):
    again = copy.deepcopy(frozen)
    linear = linear_of(again)
    with torch.no_grad():
        before = again(images)
        linear.weight.mul_(2)
        linear.bias.mul_(2)
        torch.testing.assert_close(again(images), 2 * before)
        linear.bias = nn.Parameter(torch.zeros(7))
        torch.testing.assert_close(again(images), part_by_part(again, images))
        (again.head if hasattr(again, "head") else again).add_module(
            "fc" if hasattr(again, "head") else "classifier", nn.Linear(linear.in_features, 3)
        )
        calls.clear()
        assert again(images).shape == (2, 3) and len(calls) == 1


def test_what_one_call_cannot_serve_goes_part_by_part(frozen, images, calls):
    again = copy.deepcopy(frozen)
    with torch.no_grad():
        wanted = part_by_part(again, images)
        for module in (again.stem, linear_of(again), again.stages[2][0], getattr(again, "head", linear_of(again))):
            seen, calls[:] = [], []
            hook = module.register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
            assert torch.equal(again(images), wanted) and seen == [1] and len(calls) >= 3
            hook.remove()
        calls.clear()
        assert torch.equal(again.to(torch.float64)(images).float().isfinite().all(), torch.tensor(True))
        assert not calls  # float64 has no kernels
    gradient = frozen(images.clone().requires_grad_())
    assert gradient.requires_grad


def test_dropout_that_was_set_to_train_drops(images):
    frozen = mvit_kernels.freeze(timm.create_model("mobilevit_xxs", num_classes=7, drop_rate=0.9).eval())
    frozen.head.drop.train()
    with torch.no_grad():
        assert not torch.equal(frozen(images), frozen(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.head, "fc", nn.Sequential(nn.Linear(320, 5))),
        lambda model: setattr(model.head, "drop", nn.Softmax(1)),
        lambda model: model.head.reset(5, "max"),
        lambda model: model.head.reset(0, ""),
        lambda model: setattr(model, "head", nn.Flatten()),
        lambda model: setattr(model.head, "fc", nn.utils.parametrizations.weight_norm(nn.Linear(320, 5))),
    ],
    ids=["another classifier", "another layer", "maximum", "no pooling", "no head", "parametrized"],
)
def test_other_heads_run_as_they_are(images, change, calls):
    model = build("timm")
    change(model)
    changed_before, changed_after = mvit_kernels.freeze(model), mvit_kernels.freeze(build("timm"))
    change(changed_after)
    changed_after.eval().head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        wanted = model.eval()(images)
        for frozen in (changed_before, changed_after):
            calls.clear()
            torch.testing.assert_close(frozen(images), wanted, rtol=1e-3, atol=1e-4)
            assert len(calls) == 3


def test_wrong_images_raise_as_part_by_part(frozen):
    for x in (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 4, 64, 64), torch.zeros(3, 64), "image"):
        with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)) as one_call:
            frozen(x)
        with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)) as parts:
            part_by_part(frozen, x)
        assert str(one_call.value) == str(parts.value)
