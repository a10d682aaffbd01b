# SPDX-License-Identifier: Apache-2.0
"""`freeze` on networks for detection and segmentation: their heads are native too, and their methods stay."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mvit_kernels
from mvit_kernels import MobileViTDeepLabV3, MobileViTSSDLite
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenMean, FrozenSequential
from mvit_kernels.freezing.network import Network
from mvit_kernels.freezing.pyramid import FrozenASPP
from support import models
from support.native import skip_without_a_compiler
from support.networks import called, composed

skip_without_a_compiler()

NETWORKS = {
    "ssdlite": lambda: MobileViTSSDLite("xxs", num_classes=7),
    "ssdlite, stride 16": lambda: MobileViTSSDLite("xxs", num_classes=7, output_stride=16),
    "deeplabv3": lambda: MobileViTDeepLabV3("xxs", num_classes=5),
    "huggingface": lambda: models.huggingface("xxs", "ForSemanticSegmentation", num_labels=5, output_stride=16),
}
CONVOLUTIONS = {"ssdlite": 34 + 7 + 13, "deeplabv3": 34 + 7, "huggingface": 34 + 7}  # backbone, and after it


@functools.cache
def built(name: str) -> nn.Module:
    """Do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.sensible(mvit_kernels.restore(NETWORKS[name]()))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        y = model(x)
    return [y.logits] if hasattr(y, "loss") else list(y) if isinstance(y, tuple) else [y]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ------------------------------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_network_is_the_network(name, dtype):
    model, x = built(name), models.images(2, 70, 90)
    frozen = mvit_kernels.freeze(model, dtype=dtype)
    verification = mvit_kernels.verify(frozen, x, reference=model)
    assert verification.ok, f"\n{verification}"
    assert len(verification.rows) >= 4  # three blocks and the outputs
    report = frozen.freeze_report
    assert (len(report.blocks), len(report.inverted_residuals)) == (3, 7)
    assert len(report.convolutions) == CONVOLUTIONS[name.partition(",")[0]]
    assert report.left == report.composed == ()
    assert report.pyramids == {"deeplabv3": ("aspp",), "huggingface": ("segmentation_head.aspp",)}.get(name, ())
    assert all(pyramid in str(report) for pyramid in report.pyramids)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(32, 32), (33, 65), (128, 96)], ids=str)
def test_every_layer_is_in_a_native_call(name, size):
    model, x = built(name), models.images(1, *size)
    frozen = mvit_kernels.freeze(model)
    ours, truth = outputs(frozen, x), outputs(copy.deepcopy(model).double(), x.double())
    for mine, exact in zip(ours, truth, strict=True):
        assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max()
    inside = {id(part) for outer in called(frozen) for part in outer.modules()}
    assert all(id(part) in inside for part in frozen.modules() if isinstance(part, (FrozenConv2d, FrozenMean)))
    alone = [part for part in frozen.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))]
    assert alone == []


@pytest.mark.parametrize("name", ["ssdlite", "deeplabv3"])
def test_the_same_bits_for_any_number_of_threads(name):
    frozen, x = mvit_kernels.freeze(built(name)), models.images(3, 96, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = outputs(frozen, x)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert same(outputs(frozen, x), expected)
            assert same(outputs(frozen, x[2:]), [each[2:] for each in expected])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_pickles_and_loads(name):
    frozen, x = mvit_kernels.freeze(built(name)), models.images(1, 64, 64)
    expected = outputs(frozen, x)  # the weights are packed from here on
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert same(outputs(other, x), expected)
    other = mvit_kernels.freeze(models.sensible(copy.deepcopy(built(name)), seed=5))
    assert not same(outputs(other, x), expected)  # it has packed its own
    other.load_state_dict(frozen.state_dict())
    assert same(outputs(other, x), expected)
    assert outputs(copy.deepcopy(frozen).double(), x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_counted(name):
    counts = []
    for model in (built(name), mvit_kernels.freeze(built(name))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            outputs(model, models.images(1, 96, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 5e7


def test_operations_of_a_native_head_are_counted():
    """Called directly: the counter's own hooks make a module run part by part."""
    for name, path, size in (("ssdlite", "heads.0.layers", 6), ("ssdlite", "extra.3", 3), ("deeplabv3", "aspp", 6)):
        head = mvit_kernels.freeze(built(name)).get_submodule(path)
        x = torch.randn(2, head.in_channels, size, size + 1)
        counts = []
        native = head.native()
        for call in (head.composed, lambda x, native=native: native(x, native.plan(x))):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_a_frozen_detector_is_exported():
    """Module by module, also where several stages are otherwise one native call."""
    frozen, x = mvit_kernels.freeze(built("ssdlite")), models.images(1, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(frozen, (x,)).module()(x)
        for ours, expected in zip(exported, frozen(x), strict=True):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_frozen_detector_detects():
    model, x = built("ssdlite"), models.images(2, 96, 96)
    frozen = mvit_kernels.freeze(model)
    pytest.importorskip("torchvision")
    with torch.inference_mode():
        found, expected = (each.detect(each(x), (96, 96)) for each in (frozen, model))
    assert torch.equal(frozen.anchors(96, 96), model.anchors(96, 96))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["scores"]) == len(theirs["scores"]) > 0
    target = [{"boxes": torch.tensor([[4.0, 3.0, 50.0, 60.0]]), "labels": torch.tensor([2])}] * 2
    with torch.no_grad():
        losses = [each.loss(each(x), target, (96, 96))["loss"] for each in (frozen, model)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_a_frozen_segmenter_segments():
    model, x = built("deeplabv3"), models.images(2, 64, 96)
    frozen = mvit_kernels.freeze(model)
    masks = torch.randint(5, (2, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = frozen(x), model(x)
        assert (frozen.segment(ours, (40, 50)) == model.segment(theirs, (40, 50))).float().mean() > 0.999
        losses = [each.loss(y, masks)["loss"] for each, y in ((frozen, ours), (model, theirs))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    frozen.reset_classifier(3)
    assert outputs(frozen, x)[0].shape[1] == 3


# ---------------------------------------------------------------------------------------------------------- the pyramid


def pyramid_of(model: nn.Module) -> nn.Module:
    return model.aspp if isinstance(model, MobileViTDeepLabV3) else model.segmentation_head.aspp


@pytest.mark.parametrize("name", ["deeplabv3", "huggingface"])
def test_hooks_on_the_pyramid_and_inside(name):
    model, x, seen = copy.deepcopy(built(name)), models.images(1, 64, 64), []
    pyramid = pyramid_of(model)
    branch = next(module for module in pyramid.children() if isinstance(module, nn.ModuleList))[2]
    for watched in (pyramid, branch):
        watched.register_forward_hook(lambda module, _, y: seen.append((type(module), y)))
    expected = outputs(model, x)
    frozen = mvit_kernels.freeze(model)
    assert frozen.freeze_report.left == ()
    ours = outputs(frozen, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert [kind for kind, _ in seen[2:]] == [FrozenConv2d, FrozenASPP]
    torch.testing.assert_close([y for _, y in seen[2:]], [y for _, y in seen[:2]], rtol=1e-4, atol=1e-4)


class Shrinking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def _hook_the_pool(pyramid: nn.Module) -> None:
    pyramid.convs[-1].global_pool.register_forward_hook(lambda *_: None)


LEFT = {
    "another pool": (
        "huggingface",
        lambda p: setattr(p.convs[-1], "global_pool", nn.AdaptiveMaxPool2d(1)),
        "last branch",
    ),
    "a pool of somebody's": ("huggingface", lambda p: p.convs.__setitem__(4, Shrinking()), "last branch"),
    "a hook on the pool": ("huggingface", _hook_the_pool, "carries a hook"),
    "a dropout that computes": ("huggingface", lambda p: setattr(p, "dropout", Shrinking()), "further modules"),
    "another activation": ("deeplabv3", lambda p: setattr(p.branches[1], "act", nn.GELU()), "could not be folded"),
    "one more module": ("deeplabv3", lambda p: setattr(p, "more", nn.Conv2d(1, 1, 1)), "further modules"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_pyramid_with_something_else_inside_stays(case):
    name, change, says = LEFT[case]
    model, x = copy.deepcopy(built(name)), models.images(1, 64, 64)
    change(pyramid_of(model))
    if case == "a pool of somebody's":  # as wide as the map that it gets: the projection would not fit
        model.segmentation_head.aspp.project = nn.Conv2d(4 * 256 + 80, 256, 1)
    frozen = mvit_kernels.freeze(model)
    assert any(says in reason for _, reason in frozen.freeze_report.left), frozen.freeze_report.left
    assert frozen.freeze_report.pyramids == ()
    torch.testing.assert_close(outputs(frozen, x), outputs(model, x), rtol=1e-3, atol=1e-3)


def test_a_pyramid_of_somebodys_class_stays():
    class ASPP(type(built("deeplabv3").aspp)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = copy.deepcopy(built("deeplabv3")), models.images(1, 64, 64)
    model.aspp.__class__ = ASPP
    frozen = mvit_kernels.freeze(model)
    assert type(frozen.aspp) is ASPP and frozen.freeze_report.pyramids == ()
    torch.testing.assert_close(outputs(frozen, x), outputs(model, x), rtol=1e-3, atol=1e-3)


def test_a_pyramid_by_itself():
    """One native call, also where a branch, the pooled one or the projection is not what the published network has."""
    model = built("deeplabv3").aspp
    frozen, x = mvit_kernels.freeze(model), torch.randn(2, model.pool.conv.in_channels, 9, 13)
    assert type(frozen) is FrozenASPP and isinstance(frozen.native(), Network)
    with torch.inference_mode():
        ours = frozen(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (composed(frozen, x) - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_chain_that_begins_with_a_mean():
    frozen = mvit_kernels.freeze(built("ssdlite")).extra[3]
    assert type(frozen) is FrozenSequential and type(frozen[0]) is FrozenMean
    assert [type(module) for module in frozen[1:]] == [FrozenConv2d, nn.Identity]
    x = torch.randn(2, 128, 5, 3)
    assert isinstance(frozen.native(), Network)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), composed(frozen, x), rtol=1e-5, atol=1e-5)
        assert frozen(x).shape == (2, 64, 1, 1)
        assert frozen[0](x).shape == (2, 128, 1, 1)  # by itself PyTorch's
