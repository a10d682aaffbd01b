# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions of stride 2 in bfloat16: the forward's bits are PyTorch's, the gradients at least as exact."""

import copy

import pytest
import torch
from torch import nn

from mvit_kernels import accelerate
from mvit_kernels.adapters import _depthwise
from support import models
from support.fake_backend import fake_backend
from support.tolerance import assert_close_as_pytorch

AUTOCAST = torch.float32  # of the weights under autocast
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def slow_here(monkeypatch):
    """As on a processor with AVX-512's bfloat16 instructions."""
    monkeypatch.setattr(_depthwise, "_has_bfloat16_instructions", lambda: True)


def convolution(dtype=BF16, bias=False, **changes):
    settings = dict(kernel_size=3, stride=2, padding=1, groups=32, bias=bias) | changes
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(32, 32, **settings).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        for value in conv.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    x = torch.randn(2, 32, 13, 16, generator=generator).to(BF16).contiguous(memory_format=torch.channels_last)
    return conv, x.requires_grad_()


def differentiated(run, conv, x, autocast):
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = run(conv, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, (x, *conv.parameters()), cotangent.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [AUTOCAST, BF16])
@pytest.mark.parametrize(
    "changes", [{}, {"bias": True}, {"kernel_size": 5, "padding": 2}, {"dilation": 2, "padding": 2}]
)
def test_values_and_gradients(dtype, changes):
    conv, x = convolution(dtype, **changes)
    with torch.autocast("cpu", BF16, enabled=dtype == AUTOCAST):
        assert _depthwise.is_slow(conv, x)
    ours, gradients = differentiated(_depthwise.convolution, conv, x, dtype == AUTOCAST)
    pytorch, expected = differentiated(lambda conv, x: conv(x), conv, x, dtype == AUTOCAST)
    _, truth = differentiated(lambda conv, x: conv(x), copy.deepcopy(conv).to(BF16).double(), x.double(), False)
    assert torch.equal(ours, pytorch)
    for name, one, other, true in zip(("x", "weight", "bias"), gradients, expected, truth, strict=False):
        assert one.dtype == other.dtype and one.stride() == other.stride(), name
        assert_close_as_pytorch(name, one, other, true)
    assert torch.equal(gradients[1], expected[1])  # the weight's is PyTorch's own


def test_what_is_left_alone():
    conv, x = convolution()
    assert _depthwise.is_slow(conv, x)
    for other in (dict(stride=1), dict(groups=16), dict(padding_mode="reflect"), dict(padding="valid")):
        assert not _depthwise.is_slow(convolution(**other)[0], x), other
    assert not _depthwise.is_slow(convolution(torch.float32)[0], x)  # PyTorch's error about two dtypes
    assert not _depthwise.is_slow(conv, x.float())
    assert not _depthwise.is_slow(conv, x.detach())
    assert not _depthwise.is_slow(conv, x.contiguous())
    with torch.no_grad():
        assert not _depthwise.is_slow(conv, x)
    with torch.autocast("cpu", torch.float16):
        assert not _depthwise.is_slow(conv, x)
    conv.register_forward_hook(lambda *_: None)
    assert not _depthwise.is_slow(conv, x)


def test_only_with_bfloat16_instructions(monkeypatch):
    conv, x = convolution()
    monkeypatch.setattr(_depthwise, "_has_bfloat16_instructions", lambda: False)
    assert not _depthwise.is_slow(conv, x)


def test_gradients_of_gradients():
    conv, x = convolution()
    penalties = []
    for run in (_depthwise.convolution, lambda conv, x: conv(x)):
        (gradient,) = torch.autograd.grad(run(conv, x).float().square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.float().square().sum(), conv.weight)[0])
    torch.testing.assert_close(*penalties, rtol=2e-2, atol=1e-2 * penalties[1].abs().max().item())


@pytest.mark.parametrize("library", models.LIBRARIES)
def test_layers_use_it(library, monkeypatch):
    """Every depthwise convolution of stride 2; the stem is not depthwise."""
    model = models.build(library).train().to(memory_format=torch.channels_last)
    seen, original = [], _depthwise.convolution
    monkeypatch.setattr(_depthwise, "convolution", lambda conv, x: seen.append(conv) or original(conv, x))
    x = models.images(2, 64, 128).contiguous(memory_format=torch.channels_last)
    with fake_backend(["batch_norm_activation"]), torch.autocast("cpu", BF16):
        models.output(accelerate(model)(x)).float().sum().backward()
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.stride == (2, 2)]
    assert seen == strided and len(strided) == 4


def test_compiled():
    torch._dynamo.reset()
    conv, x = convolution()
    block = accelerate(models.build("own")).to(BF16).train()
    layer = block.stages[1][0].depthwise  # some layer of the kind
    layer.conv = conv
    layer.norm = nn.BatchNorm2d(32).to(BF16)
    with fake_backend(["batch_norm_activation"]):
        expected = layer(x)
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert x.grad.isfinite().all()
    torch._dynamo.reset()
