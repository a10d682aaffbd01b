# SPDX-License-Identifier: Apache-2.0
"""Subnormal numbers are zero inside the C++ kernels, on every thread, and nowhere else; inputs of any scale are
right."""

from __future__ import annotations

import functools

import pytest
import torch

from mvit_kernels.backends.library import raw
from support.cases import backward_arguments, carefully, convert, differentiable, evaluate, make, raw_arguments
from support.cases import call as call_operator
from support.native import skip_without_a_compiler
from support.networks import chain, composed, native
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()

SMALL = 1e-39  # subnormal in float32 and in bfloat16
LARGE = 1e36  # its product with SMALL is not

# Each makes ordinary numbers of a subnormal one if that is not read as zero: the map or parameter that is subnormal,
# and the weights that are large, among those that a call has; all others are zero.
SIZES = {
    "layer_norm_linear": (dict(shape=(3000, 32), n=32), "norm_weight", ("weight",)),
    "linear_residual": (dict(shape=(3000, 32), n=32), "x", ("weight",)),
    "layer_norm_mlp": (dict(shape=(3000, 32), hidden=64), "norm_weight", ("fc1_weight", "fc2_weight")),
    "patch_attention": (dict(shape=(2, 32, 32), heads=2, head_dim=16, patch=(2, 2)), "qkv", ()),
    "inverted_residual": (
        dict(shape=(2, 32, 32, 16), hidden=64, out=16),
        "x",
        ("expand_weight", "depthwise_weight", "project_weight"),
    ),
    "transformer": (dict(shape=(2, 16, 16, 32), heads=2, patch=(2, 2)), "final_norm.weight", ()),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def assert_pytorch_has_subnormals():
    """On all of its threads, which are ours too."""
    halves = torch.full((1 << 18,), 2.0**-126) * 0.5
    assert halves.min() == halves.max() == 2.0**-127
    assert torch.full((1 << 18,), 2.0**-1022, dtype=torch.float64).mul(0.5).min() > 0


def of_subnormals(operator: str, dtype: str):
    sizes, small, large = SIZES[operator]
    tensors, settings = make(operator, sizes)
    for name, t in tensors.items():
        if name == small:
            t.fill_(SMALL)
        elif name in large:
            t.fill_(LARGE)
        elif "bias" in name or name == "residual":
            t.zero_()
    return convert(tensors, getattr(torch, dtype)), settings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", SIZES)
def test_kernels_read_subnormals_as_zero(operator, dtype, threads):
    tensors, settings = of_subnormals(operator, dtype)
    # PyTorch's products of bfloat16 read them as zero too, where the processor's do.
    reference = call_operator(operator, tensors, settings, "reference")
    assert dtype == "bfloat16" or reference.abs().max() > 0
    ours = call_operator(operator, tensors, settings, "cpu")
    assert torch.equal(ours, tensors["x"]) if operator == "layer_norm_mlp" else not ours.any()
    assert_pytorch_has_subnormals()


@pytest.mark.parametrize("operator", [name for name in SIZES if differentiable(name, "cpu")])
def test_kernels_restore_the_thread_after_backward(operator, threads):
    tensors, settings = of_subnormals(operator, "float32")
    outputs = raw(operator, "cpu")(*raw_arguments(operator, tensors, settings))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad_out = torch.full_like(outputs[0], SMALL)
    assert (grad_out > 0).all()
    grads = raw(f"{operator}_backward", "cpu")(*backward_arguments(operator, tensors, settings, outputs, grad_out))
    assert not any(grad.any() for grad in (grads if isinstance(grads, tuple) else (grads,)))
    assert_pytorch_has_subnormals()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_kernels_of_a_frozen_network_restore_the_thread(images, threads):
    module, draw = chain()
    native(module, draw(images, 3, 64, 64))
    assert_pytorch_has_subnormals()
    first = draw.conv(3, 16, act=False)
    first.weight.fill_(LARGE)
    first.bias.zero_()
    x = torch.full((images, 3, 64, 64), SMALL)
    assert composed(first, x).abs().max() > 0 and not native(first, x).any()


def test_kernels_restore_the_thread_after_an_error(threads):
    """A workspace for which there is no memory is refused by the thread that was to work in it."""
    module, draw = chain()
    x = draw(2, 3, 33, 30)
    native(module, x)
    network = module._network
    program = network.program.clone()
    bordered = next(value for value in range(int(program[2])) if program[4 + 2 * value + 1])
    program[4 + 2 * bordered + 1] = 2**19
    with pytest.raises(RuntimeError, match="no memory for"):
        torch.ops.mvit_kernels.network.cpu(x, network.weights, program, network.out_channels, network.halvings)
    assert_pytorch_has_subnormals()


def test_kernels_keep_what_the_thread_had_set():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        tensors, settings = of_subnormals("linear_residual", "float32")
        call_operator("linear_residual", tensors, settings, "cpu")
        assert torch.tensor(2.0**-126).mul(0.5) == 0
    finally:
        torch.set_flush_denormal(False)
    assert_pytorch_has_subnormals()


SCALED = {
    "layer_norm_linear": dict(shape=(70, 24), n=40, activation="silu"),
    "layer_norm_mlp": dict(shape=(70, 24), hidden=40),
    "linear_residual": dict(shape=(70, 24), n=40),
    "patch_attention": dict(shape=(1, 12, 10), heads=2, head_dim=12, patch=(2, 2)),
    "inverted_residual": dict(shape=(1, 9, 10, 8), hidden=32, out=8, residual=True),
    "transformer": dict(shape=(1, 8, 8, 24), heads=2, patch=(2, 2)),
}


@pytest.mark.parametrize("scale", [1e-3, 3e2, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operator", SCALED)
def test_kernels_at_any_scale(operator, dtype, scale):
    """Of maps, and of norms' parameters, which decide the scale after a LayerNorm: SiLU saturates, and attention's
    weights are 0 and 1."""
    if dtype == "float64" and not differentiable(operator, "cpu"):
        pytest.skip("for inference there is float32")
    tensors, settings = make(operator, SCALED[operator])
    tensors = {
        name: t * scale if name in ("x", "qkv", "residual") or "norm" in name else t for name, t in tensors.items()
    }
    tensors = convert(convert(tensors, torch.float32), torch.float64)
    gradients = differentiable(operator, "cpu")

    def by(path):
        return lambda t: call_operator(operator, t, settings, path)

    # Not the oracle's truth: the derivative of x / (1 + e^-x), as autograd takes it, is NaN where e^-x overflows.
    truth = evaluate(by("usual"), tensors, gradients)
    pytorch = evaluate(by("usual"), convert(tensors, torch.float32), gradients)
    careful = carefully(by("usual"), tensors, gradients, torch.float32)
    for name, ours in evaluate(by("cpu"), convert(tensors, getattr(torch, dtype)), gradients).items():
        assert ours.isfinite().all(), name
        label = f"{operator} x {scale:g}, {name}"
        assert_close_as_pytorch(label, ours, pytorch[name], truth[name], functools.partial(careful, name))
