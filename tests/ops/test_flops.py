# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's FLOP counter counts: for a kernel, what it counts for the operators that the kernel replaces."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvit_kernels import freeze
from mvit_kernels.backends import cpu
from mvit_kernels.backends.library import raw
from mvit_kernels.freezing.network import Network
from support import models
from support.cases import DIFFERENTIABLE, SMALL, backward_arguments, call, convert, make, raw_arguments
from support.models import LIBRARIES

FORWARD_PRODUCTS_MADE_AGAIN = {"layer_norm_linear": 1, "patch_attention": 0.5, "layer_norm_mlp": 0.5}


def counted(function):
    """On the CPU PyTorch only has a formula for attention by matrix products, and none for the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("operator", SMALL)
def test_operators(operator):
    tensors, settings = make(
        operator, {**SMALL[operator], **({"dropout": None} if "dropout" in SMALL[operator] else {})}
    )
    tensors = convert(tensors, torch.float32)
    expected, _ = counted(lambda: call(operator, tensors, settings, "reference"))
    flops, outputs = counted(lambda: raw(operator, "reference")(*raw_arguments(operator, tensors, settings)))
    assert flops == expected and (flops > 0 or operator in ("layer_norm", "batch_norm_activation"))
    if operator not in DIFFERENTIABLE:
        return
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    _, out = counted(lambda: call(operator, tensors, settings, "reference"))
    expected, _ = counted(lambda: out.sum().backward())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arguments = backward_arguments(operator, tensors, settings, outputs, torch.ones_like(out))
    with torch.no_grad():
        ours, _ = counted(lambda: raw(f"{operator}_backward", "reference")(*arguments))
    if operator == "transformer_layer":
        d, tokens = tensors["x"].shape[-1], tensors["x"][..., 0].numel()
        qkv, fc1, scores = 2 * tokens * d * 3 * d, 2 * tokens * d * 2 * d, 2 * tokens * (tokens // 8) * d
        assert ours == expected + qkv + fc1 + scores
    else:
        assert ours == expected + FORWARD_PRODUCTS_MADE_AGAIN.get(operator, 0) * flops


@pytest.mark.parametrize("library", LIBRARIES)
def test_models(library):
    """Accelerated and frozen models count the same as before, though the counter's hooks on all modules change what
    runs."""
    model = models.build(library)
    side = 64 if library == "kornia" else 96  # which does not take 3 × 3, the last block's map
    x = models.images(2, side, side)
    with torch.no_grad():
        expected, _ = counted(lambda: model(x))
        assert counted(lambda: models.accelerated(model)(x))[0] == expected > 5e7
        frozen = freeze(model)  # which tries a cvnets model once in a process, on images of its own
        assert counted(lambda: frozen(x))[0] == expected


@pytest.mark.skipif(bool(cpu.BACKEND.unavailable("cpu")), reason="needs the compiled library")
def test_a_network():
    """One native call for all of a model's stages, called directly; 96 px give the last block a map of 3 × 3."""
    stages = freeze(models.build("timm")).stages
    x = torch.randn(2, 16, 48, 48)
    network = stages.native()
    assert isinstance(network, Network)
    with torch.no_grad():
        expected, _ = counted(lambda: stages(x))
        assert counted(lambda: network(x, network.plan(x)))[0] == expected > 1e8
