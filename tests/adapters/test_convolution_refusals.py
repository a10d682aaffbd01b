# SPDX-License-Identifier: Apache-2.0
"""Convolution layers in training that must not run on `batch_norm_activation`, or not all of them: other norms and
activations, hooks, what no kernel serves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from mvit_kernels import accelerate, report, restore
from mvit_kernels._utils.third_party import import_timm
from mvit_kernels.backends import use_backend
from support import models
from support.convolutions import OPERATOR, assert_trains_alike, stepped, training_block
from support.fake_backend import fake_backend
from support.models import assert_same, fused_norms

pytestmark = pytest.mark.usefixtures("fused_batch_norm")


def _set(**attributes):
    def change(layer):
        for name, value in attributes.items():
            setattr(layer.bn, name, value)

    return change


def _forward_on_the_instance(layer):
    layer.bn.forward = lambda x: 2 * nn.BatchNorm2d.forward(layer.bn, x)


class _Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class _Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def _subclass(layer):
    norm = _Doubled(layer.bn.num_features)
    norm.load_state_dict(layer.bn.state_dict())
    layer.bn = norm.double()


def _synchronised(layer):
    layer.bn = import_timm().layers.convert_sync_batchnorm(layer.bn)


def _not_affine(layer):
    layer.bn.weight = layer.bn.bias = None


REFUSALS = {
    "frozen": lambda layer: layer.bn.eval(),
    "cumulative average": _set(momentum=None),
    "no running statistics": _set(running_mean=None, running_var=None, track_running_stats=False),
    "statistics not tracked": _set(track_running_stats=False),
    "not affine": _not_affine,
    "another activation": lambda layer: setattr(layer.bn, "act", nn.ReLU()),
    "a dropout between": lambda layer: setattr(layer.bn, "drop", _Doubling()),
    "a forward of its own": _forward_on_the_instance,
    "a subclass": _subclass,
    "synchronised": _synchronised,
    "parametrized": lambda layer: parametrize.register_parametrization(layer.bn, "weight", _Doubling()),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_operator_would_compute_differently(kind, when):
    """The layer runs its own forward; the block's two others stay fast."""
    block, x = training_block()
    if when == "after":
        accelerate(block)
        stepped(block, x, steps=1)  # it has been looked at
    REFUSALS[kind](block.conv_kxk)
    plain = restore(copy.deepcopy(block)) if when == "after" and kind != "a forward of its own" else None
    if plain is None:
        plain, _ = training_block()
        if when == "after":
            stepped(plain, x, steps=1)
        REFUSALS[kind](plain.conv_kxk)
    accelerate(block)
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert fused == 2 * ["silu"] * 2


@pytest.mark.parametrize(
    ("inner", "register"),
    [
        ("bn", "register_forward_hook"),
        ("bn", "register_full_backward_hook"),
        ("bn.act", "register_forward_pre_hook"),
        ("bn.drop", "register_forward_hook"),
    ],
)
def test_hooks_on_what_is_bypassed(inner, register):
    """Called while they are there; hooks on the layer and on the convolution change nothing."""
    block, x = training_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    stepped(copy.deepcopy(block), x)
    seen = []
    block.conv_kxk.register_forward_hook(lambda *_: seen.append("layer"))
    block.conv_kxk.conv.register_forward_hook(lambda *_: seen.append("convolution"))
    handle = getattr(block.conv_kxk.get_submodule(inner), register)(lambda *_: seen.append(inner))
    assert "carries a hook" in report(block).convolutions[0].reasons[0]
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 4 and sorted(seen) == sorted(2 * ["layer", "convolution", inner])
    handle.remove()
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 6 and seen.count(inner) == 2


def test_hooks_on_all_modules():
    block, x = training_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with fused_norms() as fused:
            assert_same(block(x).detach(), plain(x).detach())
    finally:
        handle.remove()
    assert not fused and block.conv_kxk.bn in seen


def test_lora_on_a_convolution_is_called():
    """The convolution remains a module, so the layer stays fast."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.up = base, nn.Conv2d(base.in_channels, base.out_channels, 3, padding=1).double()

        def forward(self, x):
            return self.base_layer(x) + self.up(x)

    block, x = training_block()
    block.conv_kxk.conv = Adapted(block.conv_kxk.conv)
    plain = copy.deepcopy(block)
    accelerate(block)
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 6


def test_parts_of_a_sequential():
    """Kornia's inverted residuals: three convolutions in one; the frozen norm runs by itself, the others do not."""
    model = models.build("kornia").double().train()
    plain = copy.deepcopy(model)
    ours = models.accelerated(model)
    for candidate in (ours, plain):
        candidate.mv2[0].conv[1].eval()
    inverted, x = ours.mv2[0], torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with fused_norms() as fused:
        assert_trains_alike(inverted, plain.mv2[0], x)
    assert fused == 2 * ["silu", None]
    part = inverted.conv[3:6]  # Sequential makes it of its own class
    with fused_norms() as fused:
        y = torch.randn(2, 32, 8, 8, dtype=torch.float64)
        assert_trains_alike(part, plain.mv2[0].conv[3:6], y)
    assert fused == 2 * ["silu"]


def test_where_no_kernel_serves():
    """Requested backends and refused layouts: the original forward, without an error."""
    block, x = training_block()
    plain = copy.deepcopy(block)
    accelerate(block, backend=None)
    with use_backend("reference"), fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert not fused
    with fake_backend([OPERATOR], refuses=lambda call: ["no"] * (call.fact("layout") != "channels_last")):
        with fused_norms() as fused:
            assert_trains_alike(block.to(memory_format=torch.contiguous_format), plain, x.contiguous())
        assert not fused


def test_too_few_values():
    """PyTorch's own error."""
    block, _ = training_block()
    layer = accelerate(block).conv_kxk
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 48, 1, 1, dtype=torch.float64))
