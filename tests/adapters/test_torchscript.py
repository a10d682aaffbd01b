# SPDX-License-Identifier: Apache-2.0
"""TorchScript of accelerated, own and frozen models: what is compiled or traced is the plain path."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_graph_node_names
from torch import nn

from mvit_kernels import MobileViT, freeze, report, restore
from mvit_kernels.nn import register_timm_models
from support import models
from support.models import LIBRARIES, accelerated, assert_same, blocks, fast_calls

register_timm_models()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

X = models.images(2, 64, 128).double()
SCRIPTABLE = ("timm", "own")  # as their libraries write them; the blocks of the others are not, accelerated or not


def saved_and_loaded(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("library", SCRIPTABLE)
def test_script(library):
    """The library's own forward is compiled; the model that was scripted stays accelerated, and shares its weights."""
    model = accelerated(models.build(library)).double()
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = model(X)
        scripted = torch.jit.script(model)
        with fast_calls() as calls:
            assert_same(scripted(X), expected)
            assert_same(saved_and_loaded(scripted)(X[:1]), expected[:1])
            assert calls == []
            assert_same(model(X), expected)
        assert len(calls) == 3
        assert [type(module) for module in model.modules()] == classes
        assert len(report(model).accelerated) == 3
        next(model.parameters()).mul_(2)
        assert_same(scripted(X), model(X))


@pytest.mark.parametrize("library", SCRIPTABLE)
def test_script_trains(library):
    model = accelerated(models.build(library)).double()
    scripted = torch.jit.script(copy.deepcopy(model))
    (y, gradients), (theirs, expected) = (models.differentiated(one, X) for one in (scripted, model))
    assert_same(y, theirs)
    models.assert_gradients_as_pytorch(gradients, expected, expected, unit=1e-9)


@pytest.mark.parametrize("library", SCRIPTABLE)
def test_script_of_a_block_alone(library):
    block = blocks(accelerated(models.build(library)))[0].double()
    x = torch.randn(2, 48, 5, 8, dtype=torch.float64)
    assert_same(torch.jit.script(block)(x).detach(), block(x).detach())


@pytest.mark.parametrize("library", [library for library in LIBRARIES if library not in SCRIPTABLE])
def test_what_cannot_be_scripted_fails_as_before(library):
    """Kornia's and cvnets' blocks take ``*args``, and Hugging Face's cannot be scripted either."""
    model = models.build(library)
    errors = []
    for candidate in (copy.deepcopy(model), accelerated(model)):
        with pytest.raises(Exception) as error:  # noqa: B017 (of many kinds, as TorchScript's are)
            torch.jit.script(candidate)
        errors.append((type(error.value), str(error.value).splitlines()[:1]))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("options", [{}, {"global_pool": "max"}, {"num_classes": 0, "global_pool": ""}])
def test_script_of_a_registered_model(options):
    model = timm.create_model("mvit_kernels_mobilevit_xxs", scriptable=True, drop_path_rate=0.1, **options)
    model = model.double().eval()
    assert_same(torch.jit.script(model)(X).detach(), model(X).detach())


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mvit_kernels_mobilevit_xxs"])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "getter", "fx"])
def test_script_of_feature_extractors(name, feature_cls):
    options = {"feature_cls": feature_cls, "out_indices": (1, 3)}
    extractor = accelerated(timm.create_model(name, features_only=True, **options)).double().eval()
    maps = [torch.jit.script(extractor)(X), extractor(X)]
    if feature_cls == "dict":
        maps = [list(one.values()) for one in maps]
    for value, other in zip(*maps, strict=True):
        assert_same(value.detach(), other.detach())


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mvit_kernels_mobilevit_xxs"])
def test_script_after_fx(name):
    """As timm's own tests do: traced by FX with blocks as leaves, then scripted."""
    model = accelerated(timm.create_model(name)).double().eval()
    traced = create_feature_extractor(model, return_nodes=[get_graph_node_names(model)[1][-1]]).eval()
    (expected,), (y,) = traced(X).values(), torch.jit.script(traced)(X).values()
    assert_same(y.detach(), expected.detach())


def test_own_model_scripts_in_every_state():
    """Accelerated as built, restored, with gradient checkpointing, as a backbone."""
    model = MobileViT("xxs", dropout=0.1, drop_path=0.1).double().eval()
    expected = model(X).detach()
    for change in (lambda: None, lambda: model.set_grad_checkpointing(True), lambda: restore(model)):
        change()
        assert_same(torch.jit.script(model)(X).detach(), expected)
    model.train()
    torch.jit.script(model)(X).sum().backward()


@pytest.mark.parametrize("library", LIBRARIES)
def test_trace(library):
    model = accelerated(models.build(library)).double()
    options = {"strict": False} if library == "huggingface" else {}
    traced = saved_and_loaded(torch.jit.trace(model, X, check_trace=False, **options))
    y = traced(X)
    y = y["logits"] if isinstance(y, dict) else y
    assert_same(y.detach(), models.output(model(X)).detach())
    assert "mvit_kernels" not in {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}


# -------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("library", LIBRARIES)
def test_frozen_models_are_not_scripted(library):
    frozen = freeze(models.build(library))
    before = list(frozen.modules())
    holder = nn.Sequential(frozen)
    for model in (frozen, holder):
        with pytest.raises(RuntimeError, match="frozen, and its native calls cannot be compiled by TorchScript") as e:
            torch.jit.script(model)
        assert "torch.jit.trace" in str(e.value) and len(str(e.value)) < 200
    assert list(frozen.modules()) == before


def test_frozen_models_are_traced():
    model = models.build("timm").double()
    frozen = freeze(model)
    with torch.no_grad():
        traced = saved_and_loaded(torch.jit.trace(frozen, X))
        assert_same(traced(X), model(X))


def test_saved_scripts_need_this_package_no_more(tmp_path):
    model = accelerated(models.build("timm"))
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    torch.jit.trace(freeze(model), X.float(), check_trace=False).save(tmp_path / "traced.pt")
    torch.save((X.float(), model(X.float()).detach()), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["mvit_kernels"] = None
x, expected = torch.load("expected.pt")
for name in ("scripted.pt", "traced.pt"):
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(name)(x), expected, rtol=1e-3, atol=1e-4)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
