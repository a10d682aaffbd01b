# SPDX-License-Identifier: Apache-2.0
"""Frozen networks in one call, library by library: how they are called, what they return, what is declined; and
`whole_network`, which hands out the chain."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels import MobileViTSSDLite
from mvit_kernels.freezing import chains, network
from mvit_kernels.freezing.modules import FrozenSequential
from mvit_kernels.freezing.program import NotNative
from mvit_kernels.freezing.whole import WholeNetwork, whole_network
from support import models
from support.native import skip_without_a_compiler
from support.whole import CLASSES, NETWORKS, frozen_network, tensors
from support.whole import network as built

skip_without_a_compiler()

IMAGES = models.images(2, 64, 128)


@pytest.fixture
def calls(monkeypatch):
    """The native calls that were made."""
    made, call = [], network.Network.rows
    monkeypatch.setattr(network.Network, "rows", lambda self, *of: made.append(self) or call(self, *of))
    return made


# ------------------------------------------------------------------------------------------------------- Hugging Face

HUGGINGFACE = [name for name in NETWORKS if name.startswith("huggingface")]


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_huggingfaces_outputs_are_the_librarys(name, calls):
    """Of every form of the simple call, in one native call: class, fields, tuples."""
    model, frozen = built(name), frozen_network(name)
    forms = (
        lambda each: each(IMAGES),
        lambda each: each(pixel_values=IMAGES),
        lambda each: each(pixel_values=IMAGES, return_dict=True),
        lambda each: each(IMAGES, return_dict=False),
        lambda each: each(IMAGES, return_dict=None),
    )
    for form in forms:
        calls.clear()
        ours = form(frozen)
        assert len(calls) == 1
        theirs = form(model)
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        if hasattr(theirs, "keys"):
            assert vars(ours).keys() == vars(theirs).keys() and list(ours.keys()) == list(theirs.keys())
            assert [value is None for value in vars(ours).values()] == [
                value is None for value in vars(theirs).values()
            ]
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_other_calls_of_huggingfaces_are_the_librarys(name, calls):
    model, frozen = built(name), copy.deepcopy(frozen_network(name))
    stage = tensors(model(IMAGES))[0]
    labels = torch.randint(CLASSES, (2, 64, 128) if stage.dim() == 4 else (2,))
    forms = [lambda each: each(IMAGES, output_hidden_states=True)]
    if name != "huggingface deeplabv3":
        forms.append(lambda each: each(IMAGES, True))  # of hidden states too
    if name in ("huggingface", "huggingface deeplabv3"):
        forms += [lambda each: each(IMAGES, labels=labels), lambda each: each(pixel_values=IMAGES, labels=labels)]
    for form in forms:
        calls.clear()
        ours, theirs = form(frozen), form(model)
        assert len(calls) > 1 and list(ours.keys()) == list(theirs.keys()) and len(ours) > 1
        if ours.hidden_states is not None:
            assert [y.shape for y in ours.hidden_states] == [y.shape for y in theirs.hidden_states]
        if ours.get("loss") is not None:
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    for each in (frozen, model):
        with pytest.raises((ValueError, TypeError)):
            each()
    frozen.config.return_dict = False
    assert type(frozen(IMAGES)) is tuple
    frozen.config.return_dict, frozen.config.output_hidden_states = True, True
    assert len(frozen(IMAGES).hidden_states) == 5


def test_the_signature_is_the_librarys():
    """Hugging Face's Trainer and exporters read it."""
    for name in ("huggingface", "timm", "own", "kornia"):
        assert inspect.signature(frozen_network(name).forward) == inspect.signature(built(name).forward)


@torch.no_grad()
def test_a_backbone_that_lost_its_convolution_is_seen(calls):
    frozen = copy.deepcopy(frozen_network("huggingface model"))
    frozen(IMAGES)
    calls.clear()
    frozen.expand_output = False
    output = frozen(IMAGES)
    assert output.last_hidden_state.shape[1] == 80 and output.pooler_output is None and len(calls) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_tracing_and_compiling_huggingfaces():
    frozen = frozen_network("huggingface")
    with torch.no_grad():
        wanted = frozen(IMAGES).logits
        traced = torch.jit.trace(lambda x: frozen(x, return_dict=False)[0], IMAGES, check_trace=False)
        torch.testing.assert_close(traced(IMAGES), wanted, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(frozen, (), {"pixel_values": IMAGES}).module()
        torch.testing.assert_close(exported(pixel_values=IMAGES).logits, wanted, rtol=1e-3, atol=1e-4)
        compiled = torch.compile(frozen, backend="eager")
        torch.testing.assert_close(compiled(IMAGES).logits, wanted, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- Kornia and cvnets


@torch.no_grad()
def test_kornia_still_raises_for_maps_that_are_not_whole_patches(calls):
    model, frozen = built("kornia"), frozen_network("kornia")
    for each in (model, frozen):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            each(models.images(1, 96, 96))
    calls.clear()
    assert frozen(models.images(1, 64, 64)).shape == (1, 320, 2, 2) and len(calls) == 1


@torch.no_grad()
def test_cvnets_own_layer_norm_serves_its_maps(calls):
    """Where there are as many patches as channels: 64 at stage 3 of 128 px."""
    model, frozen, x = built("cvnets"), frozen_network("cvnets"), models.images(1, 128, 128)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-4)
    assert len(calls) > 1


def _copied(name: str, forward=None) -> nn.Module:
    """cvnets' classifier as it is copied to a package of somebody's, with another forward or its own."""
    model = copy.deepcopy(built("cvnets"))
    cls = type(model)
    namespace = {"__module__": "model"} | ({} if forward is None else {"forward": forward})
    model.__class__ = type(name, (cls,), namespace)
    return model


@pytest.mark.parametrize(
    "name, forward, count",
    [
        ("MobileViT", None, 1),
        ("Net", None, 0),
        ("MobileViT", lambda self, x: 2 * super(type(self), self).forward(x), 0),
        ("MobileViT", lambda self, x: {"logits": super(type(self), self).forward(x)}, 0),
    ],
    ids=["a copy", "another name", "another function", "a dict"],
)
@torch.no_grad()
def test_a_copy_of_cvnets_is_tried(name, forward, count, calls):
    model = _copied(name, forward)
    frozen = mvit_kernels.freeze(model)
    calls.clear()
    ours, theirs = frozen(IMAGES), model(IMAGES)
    assert (len(calls) == 1) is bool(count)
    ours, theirs = (y["logits"] if isinstance(y, dict) else y for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_cvnets_head_with_another_pooling_stays(calls):
    model = copy.deepcopy(built("cvnets"))
    model.classifier[0] = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    frozen = mvit_kernels.freeze(model)
    torch.testing.assert_close(frozen(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    assert len(calls) > 1
    with pytest.raises(NotNative, match="computes something different"):
        whole_network(frozen)


# ------------------------------------------------------------------------------------------------------- whole_network

SHAPES = {  # (channels, vector, logits)
    "timm": (CLASSES, True, True),
    "timm features": (320, True, False),
    "timm map": (320, False, False),
    "own map": (320, False, False),
    "own deeplabv3": (CLASSES, False, True),
    "huggingface": (CLASSES, True, True),
    "huggingface features": (320, True, False),
    "huggingface model": (320, False, False),
    "huggingface deeplabv3": (CLASSES, False, True),
    "kornia": (320, False, False),
    "cvnets": (CLASSES, True, True),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_chain_computes_the_models_bits(name):
    frozen = frozen_network(name)
    whole = whole_network(frozen)
    assert isinstance(whole, WholeNetwork) and whole[1:] == SHAPES[name]
    assert isinstance(whole.links, FrozenSequential) and isinstance(whole.links.native(), network.Network)
    wanted, ours = tensors(frozen(IMAGES))[0], whole.result(whole.links(IMAGES))
    assert torch.equal(ours, wanted) and ours.stride() == wanted.stride()
    assert whole_network(pickle.loads(pickle.dumps(frozen)))[1:] == SHAPES[name]


@torch.no_grad()
def test_a_part_is_a_chain_too():
    frozen = frozen_network("timm")
    for part, inp, out in ((frozen.stages, 16, 80), (frozen.stages[2][1], 48, 48), (frozen.stem, 3, 16)):
        whole, x = whole_network(part), torch.randn(1, inp, 16, 16)
        assert whole[1:] == (out, False, False) and torch.equal(whole.result(whole.links(x)), part(x))


def _left(model: nn.Module) -> nn.Module:
    model.stem.bn.act = nn.GELU()
    model.stages[4][1].conv_kxk.conv.padding_mode = "reflect"
    return mvit_kernels.freeze(model)


def _changed(name: str, change) -> nn.Module:
    frozen = copy.deepcopy(frozen_network(name))
    change(frozen)
    return frozen


REASONS = {
    "not frozen": (lambda: built("timm"), "ByobNet is not frozen; give what freeze"),
    "on another device": (lambda: copy.deepcopy(frozen_network("kornia")).to("meta"), "MobileViT is on meta"),
    "float64": (lambda: copy.deepcopy(frozen_network("own")).double(), "not float32, bfloat16 or float16"),
    "mixed": (lambda: _changed("own", lambda m: m.classifier.half()), "dtypes: torch.float16, torch.float32"),
    "a hook": (lambda: _changed("huggingface", lambda m: m.dropout.register_forward_hook(print)), "hooks.*: dropout;"),
    "training": (lambda: _changed("timm", lambda m: m.head.drop.train()), "in training mode: head.drop;"),
    "layers": (
        lambda: _left(copy.deepcopy(built("timm"))),
        "not frozen: stem.*stem: activation GELU.*stages.4.1.conv_kxk",
    ),
    "another head": (
        lambda: _changed("own", lambda m: setattr(m, "classifier", nn.ReLU().eval())),
        "classifier is a ReLU",
    ),
    "a detector": (lambda: mvit_kernels.freeze(MobileViTSSDLite("xxs").eval()), "a detector returns two tensors"),
    "somebody's": (
        lambda: mvit_kernels.freeze(nn.Sequential(built("timm"), nn.Softmax(1)).eval()),
        "Sequential.*not known",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_there_is_no_chain(case):
    make, says = REASONS[case]
    with pytest.raises(NotNative, match=says):
        whole_network(make())


def test_what_is_no_model():
    with pytest.raises(TypeError, match="whole_network: model is"):
        whole_network("mobilevit_s")


def test_every_adapter_has_its_chain():
    assert {library.__name__.rpartition(".")[2] for library in chains._LIBRARIES} == set(models.LIBRARIES)


def test_models_of_others_are_no_chains():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = models.first_block()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    frozen = mvit_kernels.freeze(Model().eval())
    assert type(frozen) is Model and "_mvit_call" not in vars(frozen)
    with pytest.raises(NotNative, match="what a Model does between its frozen layers is not known"):
        whole_network(frozen)
