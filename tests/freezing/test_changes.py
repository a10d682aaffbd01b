# SPDX-License-Identifier: Apache-2.0
"""What changes in frozen modules after a call, when their native call is known to be right and only looks whether
anything was noted (`mvit_kernels.freezing.changes`)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mvit_kernels.freezing import changes, whole
from mvit_kernels.freezing.modules import FrozenSequential
from support.native import skip_without_a_compiler
from support.networks import Draw, composed, native
from support.whole import frozen_network, tensors

skip_without_a_compiler()

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

WHOLE_IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair() -> FrozenSequential:
    """Two convolutions, called twice: from the second call on nothing inside is looked at."""
    draw = Draw(0)
    module = FrozenSequential(draw.conv(3, 8, 3), draw.conv(8, 8))
    native(module, IMAGES)
    native(module, IMAGES)
    assert module._network._seen is changes.last
    return module


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 0.01 * b.abs().max().item()


@torch.inference_mode()
def test_weights_in_place_of_others_serve_one_call(pair):
    before = pair(IMAGES)
    other = torch.func.functional_call(pair, {"1.weight": 3 * pair[1].weight}, (IMAGES,))
    assert differs(other, before)
    assert torch.equal(pair(IMAGES), before)
    assert not differs(torch.func.functional_call(pair, {"1.weight": 3 * pair[1].weight}, (IMAGES,)), other)


@pytest.fixture
def frozen():
    """A whole network, called until nothing inside is looked at."""
    model = copy.deepcopy(frozen_network("timm"))
    with torch.inference_mode():
        for _ in range(3):
            model(WHOLE_IMAGES)
    call = vars(model)[whole._CALL]
    assert call.seen is call.network._seen is changes.last
    return model


@torch.inference_mode()
def test_of_a_whole_network(frozen):
    before, images = tensors(frozen(WHOLE_IMAGES))[0], WHOLE_IMAGES
    name, weight = next((name, value) for name, value in frozen.named_buffers() if value.dim() == 4)
    assert differs(tensors(torch.func.functional_call(frozen, {name: 3 * weight}, (images,)))[0], before)
    assert torch.equal(tensors(frozen(images))[0], before)


@torch.no_grad()
def test_another_module_inside_of_a_whole_network(frozen):
    before = tensors(frozen(WHOLE_IMAGES))[0]
    chain = next(part for part in frozen.modules() if type(part) is FrozenSequential)
    chain[0] = other = copy.deepcopy(chain[0])
    for value in other.buffers():
        value.mul_(3)
    assert differs(tensors(frozen(WHOLE_IMAGES))[0], before)


def replaced(pair: FrozenSequential) -> None:
    pair[1].weight = 3 * pair[1].weight


def replaced_in_the_dict(pair: FrozenSequential) -> None:
    pair[1]._buffers["weight"] = 3 * pair[1].weight


def replaced_with_others(pair: FrozenSequential) -> None:
    pair[1]._buffers.update(weight=3 * pair[1].weight)


def replaced_by_a_union(pair: FrozenSequential) -> None:
    pair[1]._buffers |= {"weight": 3 * pair[1].weight}


def popped(pair: FrozenSequential) -> None:
    weight = pair[1]._buffers.pop("weight")
    assert pair[1]._buffers.setdefault("weight", 3 * weight) is not weight


def deleted(pair: FrozenSequential) -> None:
    weight = pair[1].weight
    del pair[1].weight
    pair[1].register_buffer("weight", 3 * weight)


def another_module(pair: FrozenSequential) -> None:
    pair[1] = Draw(7).conv(8, 8)


def loaded(pair: FrozenSequential) -> None:
    pair.load_state_dict({key: 3 * value for key, value in pair.state_dict().items()}, assign=True)


CHANGES = (
    replaced,
    replaced_in_the_dict,
    replaced_with_others,
    replaced_by_a_union,
    popped,
    deleted,
    another_module,
    loaded,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["itself", "deepcopy", "pickle"])  # fmt: skip
def test_a_change_is_noted(pair, change, copied):
    module = copied(pair)
    before = native(module, IMAGES)
    native(module, IMAGES)
    with torch.inference_mode():
        change(module)
        after = module(IMAGES)
        assert differs(after, before)
        assert torch.allclose(after, composed(module, IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", ["clear", "popitem"])
def test_buffers_that_are_gone(pair, empty):
    seen = changes.last
    getattr(pair[1]._buffers, empty)()
    assert changes.last is not seen


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.inference_mode()
def test_hooks_are_called_while_they_are_there(pair, register):
    seen = []
    handle = getattr(pair[1], register)(lambda *_: seen.append(1))
    pair(IMAGES)
    pair(IMAGES)
    handle.remove()
    pair(IMAGES)
    pair(IMAGES)
    assert len(seen) == 2 and pair._network._seen is changes.last
    handle = getattr(pair[1], register)(lambda *_: seen.append(1))
    pair(IMAGES)
    assert len(seen) == 3


def test_no_file_names_the_dict(pair):
    assert b"NotedDict" not in pickle.dumps(pair) and type(copy.deepcopy(pair)[1]._buffers) is changes.NotedDict
