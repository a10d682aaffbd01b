# SPDX-License-Identifier: Apache-2.0
"""``accelerate``, ``restore`` and ``report``: what they say and undo, their errors, and hooks."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from mvit_kernels import accelerate, report, restore
from mvit_kernels._utils.third_party import import_timm, import_transformers
from mvit_kernels.backends import BackendError, cpu
from support import models
from support.declined import assert_declined, block_classes, classes, evaluated
from support.fake_backend import fake_backend
from support.models import BYPASSED, CALLED, LIBRARIES, accelerated, assert_same, blocks, double, fast_calls

X = models.images(1, 64, 64).double()
KERNELS = ("transformer", "layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")


# ---------------------------------------------------------------------------------------------- accelerate and restore


@pytest.mark.parametrize("library", LIBRARIES)
def test_accelerate_and_restore(library):
    """Nothing but the class of three blocks and of the convolution layers changes, their names do not, and restore
    gives all of it back."""
    model = double(library)
    original, before, keys = classes(model), evaluated(model, X), list(model.state_dict())
    tensors = [id(value) for value in model.state_dict(keep_vars=True).values()]
    assert not any(block.accelerated or block.reasons for block in report(model).blocks)

    assert accelerate(model, strict=True) is model
    swapped = [(a, b) for a, b in zip(classes(model), original, strict=True) if a is not b]
    assert len(swapped) == 3 + len(report(model).convolutions) and len(block_classes(model)) == 3
    for ours, theirs in swapped:
        assert issubclass(ours, theirs)
        assert (ours.__name__, ours.__qualname__, ours.__module__) == (
            theirs.__name__,
            theirs.__qualname__,
            theirs.__module__,
        )
    with fast_calls() as calls:
        assert_same(evaluated(model, X), before)
    assert len(calls) == 3
    assert list(model.state_dict()) == keys
    assert [id(value) for value in model.state_dict(keep_vars=True).values()] == tensors

    assert restore(model) is model
    assert classes(model) == original
    with fast_calls() as calls:
        assert torch.equal(evaluated(model, X), before)
    assert not calls
    assert restore(model) is model  # nothing left to undo


def test_report():
    model = accelerate(models.build("timm"))
    text = str(report(model))
    assert text.splitlines()[0] == "3 of 3 MobileViT blocks accelerated"
    assert [line.split() for line in text.splitlines()[1:4]] == [
        [f"stages.{stage}.1", "timm", "accelerated:", "cpu", f"({cpu.plain_instruction_set()})"] for stage in (2, 3, 4)
    ]
    assert [block.serving.backends for block in report(model).blocks] == [("cpu",)] * 3
    assert [block.library for block in report(model).accelerated] == ["timm"] * 3
    assert report(model).declined == ()
    restore(model)
    assert str(report(model)).count("not accelerated") == 3


def test_a_block_alone():
    block = blocks(double())[0]
    x = torch.randn(2, 48, 6, 8, dtype=torch.float64)
    expected = block(x)
    assert accelerate(block, strict=True) is block
    assert_same(block(x), expected)
    assert "(the model itself)" in str(report(block))


def test_accelerating_twice_changes_the_backend_only():
    model = accelerate(double(), backend="reference")
    once = classes(model)
    accelerate(model)
    assert classes(model) == once
    assert evaluated(model, X).isfinite().all()


def test_logging(caplog):
    caplog.set_level(logging.INFO, logger="mvit_kernels")
    model = models.build("timm")
    blocks(model)[1].norm.register_forward_hook(lambda *_: None)
    accelerate(model)
    assert "2 of 3 blocks accelerated" in caplog.text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "stages.3.1 (timm) is not accelerated: norm carries a hook" in warning.getMessage()


# -------------------------------------------------------------------------------------------------------------- errors


def test_no_module():
    with pytest.raises(TypeError, match="accelerate: model is the str 'mobilevit_s'"):
        accelerate("mobilevit_s")


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: import_timm().create_model("mobilevitv2_050")])
def test_a_model_without_blocks(make, caplog):
    """MobileViTv2's block is a different one: separable attention, no heads."""
    model = make()
    untouched = classes(model)
    assert accelerate(model) is model
    assert "no MobileViT block found" in caplog.text
    assert "no MobileViT block found" in str(report(model))
    with pytest.raises(ValueError, match="no MobileViT block found.*timm, huggingface, kornia, cvnets, own.*unchanged"):
        accelerate(model, strict=True)
    assert classes(model) == untouched


def test_the_later_networks_are_named():
    """Their blocks are counted by class, both in messages that find no block and next to blocks that are served."""
    transformers = import_transformers()
    v2 = import_timm().create_model("mobilevitv2_050")
    huggingface = transformers.MobileViTV2Model(transformers.MobileViTV2Config(width_multiplier=0.5))
    v3 = nn.Sequential(type("MobileViTBlockv3", (nn.Identity,), {})())
    for model, words in (
        (v2, "its 3 MobileVitV2Block belong to MobileViTv2, a different network (linear, separable attention"),
        (huggingface, "its 3 MobileViTV2Layer belong to MobileViTv2"),
        (v3, "its 1 MobileViTBlockv3 belong to MobileViTv3, a different network (a different fusion"),
    ):
        assert words in str(report(model))
        with pytest.raises(ValueError) as caught:
            accelerate(model, strict=True)
        assert words in str(caught.value)
    text = str(report(accelerate(nn.ModuleList([models.build("timm"), v2]))))
    assert text.startswith("3 of 3 MobileViT blocks accelerated") and "3 MobileVitV2Block" in text
    assert report(accelerate(models.build("timm"))).relatives == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_script_modules_are_left_alone():
    """TorchScript's copies of the blocks have other classes, and no Python forward to replace."""
    scripted = torch.jit.trace(models.build("timm"), X.float(), check_trace=False)
    assert isinstance(scripted, torch.jit.ScriptModule)
    assert accelerate(scripted) is scripted
    assert report(scripted).blocks == ()


def test_unknown_backend():
    model = models.build("timm")
    untouched = classes(model)
    with pytest.raises(ValueError, match="accelerate: unknown backend 'metal'; choose one of reference, cpu"):
        accelerate(model, backend="metal")
    assert classes(model) == untouched


@pytest.mark.parametrize(
    ("operators", "unavailable", "message"),
    [
        (KERNELS, ["no such chip"], "backend 'triton' was requested but cannot run here: no such chip"),
        (["transformer"], [], "it has no layer_norm_linear, patch_attention"),
    ],
)
def test_unavailable_backend(operators, unavailable, message):
    model = models.build("timm")
    untouched = classes(model)
    with fake_backend(operators, unavailable=unavailable, preferred=False):
        with pytest.raises(BackendError, match=message):
            accelerate(model, backend="triton")
    assert classes(model) == untouched


@pytest.mark.parametrize("requested", ["triton", "reference", None])
def test_the_backend_asked_for_serves_the_blocks(requested):
    model = double()
    expected = evaluated(model, X)
    with fake_backend(KERNELS, preferred=False) as fake:
        accelerate(model, backend=requested, strict=True)
        assert_same(evaluated(model, X), expected)
        assert len(fake.asked) >= 3 if requested == "triton" else fake.asked == []


def test_classes_of_the_same_name_elsewhere_are_not_ours():
    """A class that merely has the name MobileVitBlock may compute anything."""
    theirs = models.build("timm")
    cls = type("MobileVitBlock", (nn.Module,), {"forward": lambda self, x: x})
    for block in blocks(theirs):
        block.__class__ = cls
    assert accelerate(theirs) is theirs
    assert report(theirs).blocks == ()


@pytest.mark.parametrize("library", LIBRARIES)
def test_subclasses_are_declined(library):
    def change(block):
        cls = type(block)
        block.__class__ = type("Gated", (cls,), {"forward": lambda self, *a, **k: 2 * cls.forward(self, *a, **k)})

    model = models.build(library)
    for block in blocks(model):
        change(block)
    untouched = block_classes(model)
    accelerate(model)
    assert block_classes(model) == untouched
    assert all("it is a Gated, derived from" in str(block.reasons) for block in report(model).declined)
    assert len(report(model).declined) == 3


def test_a_forward_replaced_on_the_block_is_declined():
    """As Hugging Face's accelerate does with device_map: our forward would never call the one it put there."""
    model = models.build("timm")
    for block in blocks(model):
        block.forward = lambda x: x
    accelerate(model)
    assert all("its forward was replaced" in str(block.reasons) for block in report(model).declined)
    assert len(report(model).declined) == 3


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_on_blocks_and_convolutions_are_called(library):
    model = accelerated(double(library))
    block, seen = blocks(model)[0], []
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, y: seen.append("after"))
    for path in CALLED[library]:
        block.get_submodule(path).register_forward_hook(lambda module, args, y, path=path: seen.append(path))
    expected = evaluated(restore(copy.deepcopy(model)), X)
    seen.clear()
    with fast_calls() as calls:
        assert_same(evaluated(model, X), expected)
    assert len(calls) == 3
    assert [seen[0], seen[-1]] == ["before", "after"]
    assert set(seen[1:-1]) == set(CALLED[library])


@pytest.mark.parametrize(("library", "path"), [(lib, path) for lib in LIBRARIES for path in BYPASSED[lib]])
def test_hooks_on_inner_modules(library, path):
    """They make the block decline, before and after; it is fast again as soon as they are gone."""
    model = double(library)
    accelerate(model, strict=True)
    expected = evaluated(model, X)
    block, seen = blocks(model)[0], []
    handle = block.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    with fast_calls() as calls:
        assert_same(evaluated(model, X), expected)
    assert len(calls) == 2 and len(seen) == 1
    assert f"{path} carries a hook" in str(report(model)) and len(report(model).accelerated) == 2
    handle.remove()
    assert len(report(model).accelerated) == 3
    with fast_calls() as calls:
        assert_same(evaluated(model, X), expected)
    assert len(calls) == 3 and len(seen) == 1


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_every_kind_of_hook_is_declined(register):
    def change(block):
        getattr(block.transformer[0].mlp.fc2, register)(lambda *_: None)

    assert_declined("timm", change, "transformer.0.mlp.fc2 carries a hook", differs=False)


def test_hooks_on_all_modules_get_every_call():
    """FLOP counters and similar tools register one; while it is there, blocks run module by module."""
    model = accelerated(double())
    expected, seen = evaluated(model, X), []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        with fast_calls() as calls:
            assert_same(evaluated(model, X), expected)
        assert not calls
        assert blocks(model)[2].transformer[0].attn.qkv in seen
        assert "hook on all modules" in str(report(model)) and not report(model).accelerated
    finally:
        handle.remove()
    with fast_calls() as calls:
        evaluated(model, X)
    assert len(calls) == 3 == len(report(model).accelerated)


def test_flops_are_counted_by_module():
    model = models.build("timm")
    counts = []
    for candidate in (model, accelerated(model)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(X.float())
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]
