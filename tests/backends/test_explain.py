# SPDX-License-Identifier: Apache-2.0
"""What reports say about who serves a call, and the one warning where kernels serve nothing."""

import warnings

import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends import Call, Serving, cpu, explain, use_backend, warn_without_kernels
from support import models
from support.fake_backend import NAME, fake_backend

NORM = Call("layer_norm", "cpu", torch.float32, False, (2, 4, 4, 24), (("contiguous", True),))
MLP = NORM._replace(operator="layer_norm_mlp", facts=(("hidden_features", 48), ("contiguous", True)))


def test_names_and_variants():
    with fake_backend(["layer_norm_mlp"]):
        assert explain([MLP]) == Serving((NAME,), ("",), ()) and str(explain([MLP])) == NAME
        both = explain([MLP, NORM, MLP])
        assert both == Serving((NAME, "reference"), ("", "plain PyTorch"), (f"{NAME}: it has no layer_norm",))
        assert str(both) == f"{NAME}, reference (plain PyTorch)" and both.by_kernels
        only = explain([NORM])
        assert only.backends == ("reference",) and not only.by_kernels and only.reasons


def test_the_kernels_of_the_cpu_are_named_by_their_instruction_set():
    """A set with products of bfloat16 pairs computes bfloat16; the others are computed by the best set without."""
    assert str(explain([MLP._replace(dtype=torch.bfloat16)])) == f"cpu ({cpu.instruction_set()})"
    assert str(explain([MLP])) == f"cpu ({cpu.plain_instruction_set()})"
    assert cpu.plain_instruction_set() in ("avx512", "avx2", "portable")
    half = explain([MLP._replace(dtype=torch.float16)])
    assert half.backends == ("cpu",) and "float16 in float32 arithmetic" in str(half)


def test_reasons_are_of_calls_that_no_kernel_serves():
    with fake_backend(["layer_norm_mlp"], refuses=lambda call: ["no gradient"] if call.needs_grad else []):
        assert explain([MLP]).reasons == ()
        assert explain([MLP, MLP._replace(needs_grad=True)]).reasons == (f"{NAME}: no gradient",)
        backends.PREFERENCE["cpu"] = (NAME, "cpu", "reference")  # until the end of the fake, as Triton's behind CUDA's
        told = explain([MLP, MLP._replace(needs_grad=True)])
        assert told.backends == (NAME, "cpu") and told.reasons == ()


def test_what_was_requested():
    with fake_backend(["layer_norm_mlp"], preferred=False):
        assert explain([MLP], NAME).backends == (NAME,)
        cannot = explain([MLP, NORM], NAME)
        assert cannot.backends == (NAME,) and cannot.reasons == (f"{NAME}: it has no layer_norm",)
        assert str(explain([NORM], NAME)) == "no backend"
        with use_backend("reference"):  # whoever asks for it need not be told why
            assert explain([MLP, NORM]) == Serving(("reference",), ("plain PyTorch",), ())
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        explain([MLP], "gpu")


def test_devices_without_backends():
    assert "no backend has kernels for mps" in explain([MLP._replace(device_type="mps")]).reasons[0]


SLOW = Serving(("reference",), ("plain PyTorch",), ("cpu: it was not built; run `make`",))


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(backends, "_warned", False)


def test_one_warning_a_process(unwarned):
    with pytest.warns(
        UserWarning, match="accelerate: no kernel serves torch.float32 on cpu here.*run `make`"
    ) as caught:
        warn_without_kernels("accelerate", [SLOW, SLOW], "cpu", torch.float32)
    assert caught[0].filename == __file__  # the first line outside of the package
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_kernels("accelerate", [SLOW], "cpu", torch.float32)


@pytest.mark.parametrize(
    "servings, device",
    [
        ([SLOW, Serving(("cpu",), ("",))], "cpu"),
        ([Serving(("reference",), ("plain PyTorch",))], "cpu"),  # as requested
        ([SLOW], "meta"),  # where nothing is computed
        ([], "cpu"),
    ],
)
def test_no_warning(unwarned, servings, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_kernels("accelerate", servings, device, torch.float32)


@pytest.mark.parametrize("function", ["accelerate", "freeze"])
def test_a_pure_installation_is_loud(unwarned, monkeypatch, tmp_path, function):
    """What `pip install .` gives beside no torch to compile against."""
    monkeypatch.setattr(backends.library, "LIBRARY_DIRECTORY", tmp_path)
    monkeypatch.setattr(backends.library, "_loaded", {})
    backends._choices.clear()
    model = models.build("timm")
    with pytest.warns(UserWarning, match=f"{function}: no kernel serves .* was not built .*to build it, ") as caught:
        model = getattr(mvit_kernels, function)(model)
    assert caught[0].filename == __file__
    told = mvit_kernels.report(model)
    assert str(told).startswith("3 of 3 MobileViT blocks swapped, none of them served by a kernel\n")
    assert told.on_kernels == () and len(told.accelerated) == 3
    assert str(told).count("reference (plain PyTorch)") == 3 and str(told).count("was not built") == 1
    assert "libmvit_kernels_cpu.so was not built" in told.blocks[0].serving.reasons[0]
    if function == "freeze":
        assert str(model.freeze_report).count("was not built") == 1 and "12 × run part by part" in str(
            model.freeze_report
        )
    backends._choices.clear()
