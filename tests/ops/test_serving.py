# SPDX-License-Identifier: Apache-2.0
"""What the report says serves a block is what serves its calls."""

import pytest
import torch

from mvit_kernels import accelerate, report
from mvit_kernels.backends.contract import REGISTRY
from mvit_kernels.ops.serving import transformer_serving
from support import models
from support.fake_backend import NAME, fake_backend
from support.recorder import Recorder

WHOLE = ("transformer",)
OPERATORS = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")
BOTH = (NAME, "reference")
KERNELS = {  # operators of the fake backend, and what serves a block then, in inference and with training
    "none": ((), ("reference",), ("reference",)),
    "whole": (WHOLE, (NAME,), BOTH),
    "layers": (("transformer_layer", "patch_attention"), (NAME,), (NAME,)),
    "operators": (OPERATORS, (NAME,), (NAME,)),
    "whole and operators": ((*WHOLE, *OPERATORS), (NAME,), (NAME,)),
    "attention": (OPERATORS[1:2], BOTH[::-1], BOTH[::-1]),
    "all but the MLP": (OPERATORS[:3], BOTH, BOTH),
}


def serving(dtype=torch.float32, **options):
    return transformer_serving(
        144,
        [(144, 288), (144, 288)],
        **{"final_norm": True, "num_heads": 4, "patch_size": (2, 2), "device": torch.device("cpu"), "dtype": dtype}
        | {"training": True, **options},
    )


@pytest.mark.parametrize("kernels", KERNELS)
def test_as_calls_are_served(kernels):
    operators, inference, training = KERNELS[kernels]
    with fake_backend(operators):
        assert serving(training=False).backends == inference
        assert serving(training=True).backends == training
        for told in (serving(training=False), serving(training=True)):
            assert bool(told.reasons) == ("reference" in told.backends)
        block = models.blocks(accelerate(models.build("timm")))[0].eval()
        with Recorder() as recorder, torch.no_grad():
            block(torch.rand(2, block.conv_kxk.conv.in_channels, 16, 16))
        assert {NAME} & set(inference) == {name.partition(".")[2] for name in recorder.ours()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_cpu_serves_every_dtype(dtype):
    told = serving(dtype)
    assert told.backends == ("cpu",) and told.reasons == ()


@pytest.mark.parametrize(
    ("dtype", "inference", "training"),
    [
        (torch.bfloat16, ("triton", "cuda"), ("triton", "cuda")),  # single operators of few images, and one launch
        (torch.float32, ("triton",), ("triton",)),
        (torch.float64, ("reference",), ("reference",)),
    ],
)
def test_a_gpu(monkeypatch, dtype, inference, training):
    """What the two backends for GPUs answer does not depend on there being one."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(REGISTRY[name]), "unavailable", lambda self, device_type: [])
    gpu = {"device": torch.device("cuda"), "dtype": dtype}
    assert serving(**gpu, training=False).backends == inference
    told = serving(**gpu, training=True)
    assert told.backends == training
    assert any("float64" in reason for reason in told.reasons) == bool(told.reasons) == (dtype == torch.float64)
    monkeypatch.setattr("mvit_kernels.ops.serving.IMAGES", {"cuda": (256,)})
    many = ("cuda",) if dtype == torch.bfloat16 else inference  # in one launch, which has no gradient
    assert serving(**gpu, training=False).backends == many


def test_autocast_decides_the_dtype():
    with fake_backend(OPERATORS, refuses=lambda call: [] if call.dtype == torch.bfloat16 else ["another dtype"]):
        assert not serving().by_kernels
        with torch.autocast("cpu", torch.bfloat16):
            assert serving().backends == (NAME,)


@pytest.mark.parametrize("library", models.LIBRARIES)
def test_every_library(library):
    model = accelerate(models.build(library))
    assert {block.serving.backends for block in report(model).blocks} == {("cpu",)}
    with fake_backend(OPERATORS, preferred=False):
        accelerate(model, backend=NAME)
        assert {block.serving.backends for block in report(model).blocks} == {(NAME,)}
    restored = report(models.build(library))
    assert all(block.serving is None for block in restored.blocks)
