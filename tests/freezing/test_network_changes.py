# SPDX-License-Identifier: Apache-2.0
"""What a frozen chain's native call leaves to the modules one by one, that it sees changes of the modules, and the maps
inside a chain."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels.freezing import network
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenSequential
from support.native import skip_without_a_compiler
from support.networks import Draw, chain, composed, native

skip_without_a_compiler()


def test_what_has_no_steps_runs_module_by_module():
    draw = Draw(0)
    for odd_one in (
        draw.conv(8, 8, 5),
        draw.conv(8, 8, 3, groups=2),
        FrozenConv2d(draw(8, 8, 3, 3), draw(8), padding=(0, 0)),
        FrozenConv2d(draw(8, 8, 3, 1), draw(8), padding=(1, 0)),
        FrozenConv2d(draw(8, 8, 1, 1), draw(8), stride=(2, 2)),
        FrozenConv2d(draw(8, 8, 3, 3), draw(8), padding=(1, 1), stride=(3, 3)),
        FrozenConv2d(draw(8, 8, 3, 3), draw(8), padding=(1, 1), stride=(2, 1)),
    ):
        module, x = FrozenSequential(draw.conv(3, 8, 3), odd_one), draw(1, 3, 12, 12)
        with torch.inference_mode():
            y = module(x)
        assert isinstance(module._network, network.NotNative) and "kernel_size" in str(module._network)
        assert isinstance(module[0]._network, network.Network)  # what can be native is
        torch.testing.assert_close(y, composed(module, x), rtol=1e-4, atol=1e-5)


def test_where_a_network_may_not_be_called():
    module, draw = chain()
    x = draw(1, 3, 32, 32)
    expected = native(module, x)
    calls = []
    module.composed = lambda x: calls.append(1) or FrozenSequential.composed(module, x)
    with mvit_kernels.use_backend("reference"):
        module(x)
    module(x.clone().requires_grad_())
    assert module(x[:0]).shape == (0, *expected.shape[1:])
    assert len(calls) == 3
    with mvit_kernels.use_backend("cpu"):
        assert torch.equal(module(x), expected)
    assert len(calls) == 3


def test_hooks_inside_are_called():
    module, draw = chain()
    x, seen = draw(1, 3, 32, 32), []
    expected = native(module, x)
    handles = [
        part.register_forward_hook(lambda m, *_: seen.append(m)) for part in (module[3].fusion, module[1].expand)
    ]
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    assert torch.equal(native(module, x), expected)
    assert len(seen) == 2
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with torch.inference_mode():
            module(x)
    finally:
        handle.remove()
    assert len(seen) > 20


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({name: value * 1.01 for name, value in m.state_dict().items()}),
        lambda m: m[3].load_state_dict({name: value * 1.01 for name, value in m[3].state_dict().items()}),
        lambda m: m[1].expand.load_state_dict({name: value * 2 for name, value in m[1].expand.state_dict().items()}),
        lambda m: m.__setitem__(2, nn.Identity()),
        lambda m: setattr(m[0], "bias", m[0].bias + 1),
        lambda m: m.append(Draw(9).conv(64, 64)),
        lambda m: m.__delitem__(2),
        lambda m: setattr(m[3], "fusion", Draw(9).conv(48, 24, 3)),
        lambda m: m[7].load_state_dict({name: value * 2 for name, value in m[7].state_dict().items()}),
        lambda m: setattr(m[8], "pool", Draw(9).conv(64, 16)),
        lambda m: m[8].branches.__setitem__(0, Draw(9).conv(64, 16)),
        lambda m: m[8].branches[2].load_state_dict(Draw(9).conv(64, 16, 3).state_dict()),
    ],
)
def test_changes_are_seen(change):
    module, draw = chain()
    x = draw(1, 3, 32, 32)
    before = native(module, x)
    change(module)
    after = native(module, x)
    assert after.shape != before.shape or not torch.equal(after, before)
    torch.testing.assert_close(after, composed(module, x), rtol=1e-3, atol=1e-4)


def maps_one_by_one(module: FrozenSequential, x: Tensor, indices: list[int]) -> list[Tensor]:
    found = []
    with torch.inference_mode():
        for part in module:
            found.append(x := part(x))
    return [found[index] for index in indices]


@pytest.mark.parametrize("indices", [[0], [8], [2, 3], [0, 1, 6], [1, 4, 8], []], ids=str)
def test_maps_inside_a_chain(indices):
    module, draw = chain()
    x = draw(2, 3, 40, 36)
    for _ in range(2):
        assert all(map(torch.equal, module.maps(x, indices), maps_one_by_one(module, x, indices)))
    assert list(module.state_dict()) == list(chain()[0].state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.__setitem__(2, nn.Identity()) or m,
        lambda m: m[1].expand.load_state_dict({k: 2 * v for k, v in m[1].expand.state_dict().items()}) and m,
        lambda m: m.load_state_dict({k: 1.01 * v for k, v in m.state_dict().items()}) and m,
        lambda m: m.double(),
    ],
)
def test_maps_after_a_change(change):
    module, draw = chain()
    x = draw(2, 3, 40, 36)
    module.maps(x, [3, 8])
    module = change(module)
    x = x.to(module[0].weight.dtype)
    assert all(map(torch.equal, module.maps(x, [3, 8]), maps_one_by_one(module, x, [3, 8])))


def test_maps_call_hooks_inside():
    module, draw = chain()
    x, seen = draw(1, 3, 40, 36), []
    for watched in (module[1], module[3], module[5].fusion):
        watched.register_forward_hook(lambda m, *_: seen.append(m))
    module.maps(x, [3, 6])
    assert seen == [module[1], module[3], module[5].fusion]
