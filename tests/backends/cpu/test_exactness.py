# SPDX-License-Identifier: Apache-2.0
"""How exact the C++ kernels are in themselves, regardless of how exact PyTorch is on this machine.

The tolerance rule measures an error against PyTorch's, which sums products in one chain on one machine and in sixteen
on another. Here the yardsticks depend on no machine: a chain of products, a unit in the last place. The ratios to
PyTorch are what benchmarks/exactness.py reports; test_instruction_sets.py runs all of these on every instruction set.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mvit_kernels
from mvit_kernels.freezing.modules import FrozenConv2d
from support.cases import call, convert, evaluate, make
from support.native import skip_without_a_compiler

skip_without_a_compiler()

FLOATS = ("float32", "float64")
needs_a_wider_type = pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 2e-19, reason="the truth of float64 needs a longdouble that is wider than it"
)


def _rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(value.astype(np.float64)))))


def _chain_error(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square error of a · bᵀ summed in column order, with each product and each sum rounded."""
    chain = np.zeros((len(a), len(b)), a.dtype)
    for k in range(a.shape[1]):
        chain += np.outer(a[:, k], b[:, k])
    return _rms(chain - _exact(a, b))


def _exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.longdouble) @ b.astype(np.longdouble).T


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    zeros = x.new_zeros(len(x), len(weight))
    return mvit_kernels.linear_residual(x, weight, None, zeros, backend="cpu")


def _grad_x(grad: Tensor, weight_t: Tensor) -> Tensor:
    """grad · weight_tᵀ as the gradient of x."""
    x = grad.new_zeros(len(grad), len(weight_t), requires_grad=True)
    out = mvit_kernels.linear_residual(x, weight_t.t().contiguous(), None, torch.zeros_like(grad), backend="cpu")
    return torch.autograd.grad(out, x, grad)[0]


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    with torch.inference_mode():
        conv = FrozenConv2d(weight[:, :, None, None], weight.new_zeros(len(weight)))
        return conv(x.t()[None, :, None]).flatten(2)[0].t()


def _expand(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ as an inverted residual's first product: the rest is the identity for values far above zero."""
    hidden = len(weight)
    taps = x.new_zeros(hidden, 1, 3, 3)
    taps[:, 0, 1, 1] = 1
    with torch.inference_mode():
        weights = (weight, x.new_zeros(hidden), taps, x.new_zeros(hidden), torch.eye(hidden), x.new_zeros(hidden))
        settings = dict(stride=1, dilation=1, residual=False, backend="cpu")
        return mvit_kernels.inverted_residual(x[None, None], *weights, **settings)[0, 0]


@pytest.mark.parametrize("depth, share", [(192, 0.6), (512, 0.5), (2048, 0.35)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("product", [_forward, _grad_x, _pointwise, _expand])
def test_kernels_sum_long_products_in_blocks(product, dtype, depth, share):
    """One chain of 192 products is 2.5 times as far off as MKL's sums of few rows; one of 2048, 3.7 times."""
    if dtype == "float64" and product in (_pointwise, _expand):
        return  # it has no float64 kernels
    draw = torch.Generator().manual_seed(depth)
    x = torch.randn(6, depth, generator=draw).to(getattr(torch, dtype))
    weight = torch.randn(96, depth, generator=draw).to(getattr(torch, dtype))
    if product is _expand:
        x, weight = x.abs() + 1, weight.abs() + 1
    ours = product(x, weight).numpy()
    if product is _expand:  # positive terms: a chain's error would grow as fast, and the result is rounded thrice
        share += 0.1
    assert _rms(ours - _exact(x.numpy(), weight.numpy())) < share * _chain_error(x.numpy(), weight.numpy())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", ["linear_residual", "layer_norm_linear", "layer_norm_mlp"])
def test_kernels_sums_over_many_rows(operator, dtype):
    """The gradients of biases are as exact as their terms: 20,000 rows of 1/3."""
    rows, d = 20_000, 6
    sizes = {"layer_norm_mlp": dict(hidden=d)}.get(operator, dict(n=d))
    tensors, settings = make(operator, dict(shape=(rows, d), **sizes))
    tensors = convert(tensors, getattr(torch, dtype))
    name = "fc2_bias" if operator == "layer_norm_mlp" else "bias"
    leaf = tensors[name].requires_grad_()
    out = call(operator, tensors, settings, "cpu")
    third = torch.full_like(out, 1 / 3)
    (grad,) = torch.autograd.grad(out, leaf, third)
    wanted = third[0].numpy().astype(np.longdouble) * rows
    # Within a block of 128 rows a few additions round; 30 was one chain of blocks.
    assert np.abs(grad.numpy() - wanted).max() <= 6 * np.spacing(wanted.astype(grad.numpy().dtype)).max()


@needs_a_wider_type
@pytest.mark.parametrize(
    "low, high, most", [(-86, -20, 7), (-20, -8, 4), (-8, -1, 3.5), (-1, 1, 2.5), (1, 20, 2), (20, 86, 2)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels_silu_to_the_last_places(dtype, low, high, most):
    """Also far below zero, where all depends on the exponential: with x · log2(e) rounded it would be 60 units off."""
    low, high = (8 * low, 8 * high) if dtype == "float64" and abs(low) + abs(high) > 100 else (low, high)
    x = torch.linspace(low, high, 20_001, dtype=torch.float64).to(getattr(torch, dtype))
    zero = x.new_zeros(2)
    ours = mvit_kernels.layer_norm_linear(
        x.new_zeros(1, 2), zero, zero, x.new_zeros(len(x), 2), x, eps=1e-5, activation="silu", backend="cpu"
    )[0]
    wide = x.numpy().astype(np.longdouble)
    truth = wide / (1 + np.exp(-wide))
    unit = np.spacing(np.abs(truth).astype(ours.numpy().dtype)).astype(np.longdouble)
    error = np.abs(ours.numpy() - truth) / unit
    assert error.max() < most and _rms(error) < most / 3  # PyTorch's: 2.3 and 0.5


def _normalised(x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + x.dtype.type(eps))


@needs_a_wider_type
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", ["layer_norm_linear", "layer_norm_mlp"])
def test_kernels_rows_far_from_zero(operator, dtype, mean):
    """Rows of any mean are normalised as exactly as rows of mean zero; subtracting a rounded mean would cost three
    digits of a float64 near 1e4. The same in backward, where the gradient of norm_weight is grad · normalised."""
    rows, d = 6, 64
    draw = torch.Generator().manual_seed(int(mean))
    x = (torch.randn(rows, d, generator=draw, dtype=torch.float64) + mean).to(getattr(torch, dtype))
    norm_weight, norm_bias, eye = torch.ones(d).to(x), torch.zeros(d).to(x), torch.eye(d).to(x)
    truth = _normalised(x.numpy().astype(np.longdouble), 1e-5)
    unit = torch.finfo(x.dtype).eps
    leaf = norm_weight.requires_grad_()
    if operator == "layer_norm_linear":
        out = mvit_kernels.layer_norm_linear(x, leaf, norm_bias, eye, backend="cpu")
        assert np.abs(out.detach().numpy() - truth).max() < 5 * unit
        grad_out = torch.zeros_like(out)
        grad_out[0] = 1
        (grad,) = torch.autograd.grad(out, leaf, grad_out)
        assert np.abs(grad.numpy() - truth[0]).max() < 5 * unit
    else:  # fc2's gradient is silu(normalised), without the residual
        fc2 = torch.zeros(d, d).to(x).requires_grad_()
        out = mvit_kernels.layer_norm_mlp(x, leaf, norm_bias, eye, norm_bias, fc2, norm_bias, backend="cpu")
        grad_out = torch.zeros_like(out)
        grad_out[0] = 1
        (grad,) = torch.autograd.grad(out, fc2, grad_out)
        assert np.abs(grad[0].numpy() - truth[0] / (1 + np.exp(-truth[0]))).max() < 5 * unit


# --------------------------------------------------------------------------------- rows of one column, of equal values

VALUES = (0.1, -7.3, 1e3, 12345.678, 1e6, -3.3e-9)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 64, 240])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator", ["layer_norm_linear", "layer_norm_mlp"])
def test_kernels_rows_of_equal_values_normalise_to_zero(operator, dtype, d):
    """To the bit, the results are those of rows of zeros, and the gradient is 0 where all channels weigh alike."""
    kind, n = getattr(torch, dtype), 12
    sizes = dict(shape=(len(VALUES), d)) | (dict(hidden=n) if operator == "layer_norm_mlp" else dict(n=n))
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, kind)
    tensors["x"] = torch.tensor(VALUES, dtype=kind)[:, None].expand(-1, d).contiguous()
    zeros = {**tensors, "x": torch.zeros_like(tensors["x"])}
    ours, of_zeros = (call(operator, case, settings, "cpu") for case in (tensors, zeros))
    if operator == "layer_norm_linear":
        assert torch.equal(ours, of_zeros)
    else:
        branch = of_zeros.double()
        assert (ours.double() - tensors["x"].double() - branch).abs().max() <= torch.finfo(kind).eps * 1e6
    alike = dict(tensors, norm_weight=torch.full_like(tensors["norm_weight"], 0.7))
    first = "weight" if operator == "layer_norm_linear" else "fc1_weight"
    alike[first] = tensors[first][:, :1].expand(-1, d).contiguous()

    grads = evaluate(lambda t: call(operator, t, settings, "cpu"), alike, ("x", "norm_weight"))
    if operator == "layer_norm_linear":
        assert not grads["gradient of x"].any()
    else:  # only the residual's
        residual = evaluate(lambda t: 1 * t["x"], alike, ("x",))
        assert torch.equal(grads["gradient of x"], residual["gradient of x"])
    assert not grads["gradient of norm_weight"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_transformer_takes_rows_of_one_column(dtype):
    """Its LayerNorms give their bias whatever the rows are: only the residual distinguishes them."""
    tensors, settings = make("transformer", dict(shape=(1, 4, 4, 1), heads=1, patch=(2, 2), layers=1, final_norm=True))
    tensors = convert(tensors, getattr(torch, dtype))
    with torch.inference_mode():
        out = call("transformer", tensors, settings, "cpu")
    assert torch.equal(out, tensors["final_norm.bias"].expand_as(out))


def test_kernels_infinite_gradients_stay_infinite():
    """A sum that compensates for its roundings must not turn infinity into NaN."""
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = torch.ones(300, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype), torch.ones(3, dtype=dtype)
        leaf = bias.requires_grad_()
        out = mvit_kernels.linear_residual(x, weight, leaf, torch.zeros(300, 3, dtype=dtype), backend="cpu")
        grad_out = torch.ones_like(out)
        grad_out[7, 0], grad_out[290, 1] = torch.inf, -torch.inf
        (grad,) = torch.autograd.grad(out, leaf, grad_out)
        assert grad.tolist() == [torch.inf, -torch.inf, 300.0]
        assert F.linear(x, weight).isfinite().all()
