# SPDX-License-Identifier: Apache-2.0
"""Rows without spread, of one column or of equal values: LayerNorm gives exactly its bias for them, and gradients that
should be 0 are 0.

The mean of equal values is that value. If it is off in its last bit, 1/σ multiplies the error by 316, and a value of
1e4 becomes 0.3; if forward has it right and backward subtracts something else, x's gradient has such an error.
"""

import pytest
import torch

from support.cases import call, convert, differentiable, evaluate, make, paths, takes
from support.layouts import lay_out

SIZES = {  # by operator, of d columns
    "layer_norm": lambda d: dict(shape=(2, 3, d)),
    "layer_norm_linear": lambda d: dict(shape=(2, 3, d), n=5),
    "layer_norm_mlp": lambda d: dict(shape=(2, 3, d), hidden=6),
    "transformer_layer": lambda d: dict(shape=(1, 2, 3, d), heads=1, head_dim=3, hidden=6, patch=(1, 3)),
}
# All paths but "reference": that is PyTorch's own layer_norm, which gives 0.3 where 0 is right.
EXACT = [(operator, path) for operator in SIZES for path in paths(operator) if path != "reference"]
VALUES = (0.0, 7.1, -123.456, 1e4 + 0.37)
LAYOUTS = ("contiguous", "sliced", "expanded")  # of x


# Features of CUDA C++'s products, and rows, are multiples of 8.
SERVED_BY_CUDA = {"layer_norm_linear": {"n": 8}, "layer_norm_mlp": {"hidden": 8}}
WIDTHS = {"cuda": (8, 24, 144, 192, 240)}


def made(operator, d, dtype, layout, value, norm_dtype=None, path=None):
    """The operator's tensors; x is `value` in all of its first row, and other values in the other rows."""
    served = SERVED_BY_CUDA.get(operator, {}) if path == "cuda" else {}
    tensors, settings = make(operator, SIZES[operator](d) | served)
    rows = torch.arange(tensors["x"].numel() // d, dtype=torch.float64).view(*tensors["x"].shape[:-1], 1)
    tensors["x"] = (value * (1 + rows / 8)).expand(tensors["x"].shape)
    tensors = convert(tensors, getattr(torch, dtype), norm_dtype)
    tensors["x"] = lay_out(tensors["x"], layout)[0]
    return tensors, settings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator, path", EXACT)
def test_the_norm_of_equal_values_is_its_bias(operator, path, dtype):
    """Result and gradients are to the bit those of rows of zeros, whatever the value, except an MLP's result, to which
    x is added. The norm's weight gets no gradient."""
    if not takes(path, dtype) or operator == "transformer_layer":  # its second norm has other rows
        return
    for d in WIDTHS.get(path, (1, 17, 144, 192, 240, 300)):
        results = []
        for value in VALUES:
            tensors, settings = made(operator, d, dtype, "contiguous", value, path=path)
            gradients = differentiable(operator, path)
            results.append(evaluate(lambda t, s=settings: call(operator, t, s, path), tensors, gradients))
            if operator == "layer_norm_mlp" or path == "raw":  # where the norm's result is PyTorch's own
                del results[-1]["out"]
            results[-1].pop("gradient of x", None)
        for value, result in zip(VALUES, results, strict=True):
            for name, tensor in result.items():
                where = f"{operator} by {path}: {name} of rows of {value}, d = {d}"
                assert torch.equal(tensor, results[0][name]), where
                assert "norm_weight" not in name or not tensor.any(), where


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator, path", EXACT)
def test_rows_of_one_column_take_no_gradient_through_the_norm(operator, path, dtype, layout):
    """x's gradient is 0, or with a residual the gradient of the result."""
    if not takes(path, dtype) or not differentiable(operator, path):
        return
    if layout != "contiguous" and path in ("triton", "cuda"):  # which refuse strides
        return
    for value in VALUES:
        tensors, settings = made(operator, 1, dtype, layout, value)
        x = tensors["x"].detach().requires_grad_()
        out = call(operator, {**tensors, "x": x}, settings, path)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        grad_x, *_ = torch.autograd.grad(out, [x], grad)
        expected = grad if operator in ("layer_norm_mlp", "transformer_layer") else torch.zeros_like(grad_x)
        assert torch.equal(grad_x, expected), f"{operator} by {path}: x = {value}, {layout}: {grad_x} for {expected}"
