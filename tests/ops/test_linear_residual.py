# SPDX-License-Identifier: Apache-2.0
"""``linear_residual``: values and gradients on every path, the layouts it may get, and what it refuses."""

import pytest
import torch

from mvit_kernels import linear_residual
from support.cases import call, convert, make, paths, plain_dtype
from support.operator_tests import OperatorTests

OP = "linear_residual"
PATHS = paths(OP)
SMALL = dict(shape=(2, 3, 5, 24), n=40)
CASES = [
    *(dict(shape=(2, 3, d), n=d) for d in (64, 80, 96, 120, 144, 192, 240)),  # the out-projection of xxs, xs and s
    *(dict(shape=(2, 3, 32), n=d) for d in (64, 120, 240)),  # Kornia's: inner is 32 whatever d is
    *(dict(shape=(5, k), n=n) for k, n in ((17, 33), (33, 100), (100, 17), (1, 1))),
    dict(shape=(2, 3, 80), n=96, bias=False),
    dict(shape=(24,), n=8),
    dict(shape=(1, 1, 1, 1, 24), n=8),
    dict(shape=(300, 24), n=8),
    dict(shape=(0, 4, 4, 24), n=8),
    dict(shape=(0, 24), n=8, bias=False),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(weight=None), TypeError, ("weight is", "torch.Tensor is wanted")),
    (dict(residual=None), TypeError, ("residual is", "torch.Tensor is wanted")),
    (dict(residual=0.0), TypeError, ("residual is a float", "torch.Tensor is wanted")),
    (dict(x=lambda x: x.to(torch.uint8)), TypeError, ("x is torch.uint8",)),
    (dict(weight=lambda w: w.t()), ValueError, ("x has shape (2, 3, 5, 24)", "weight (24, 40)", "(..., k) and (n, k)")),
    (dict(weight=lambda w: w[0]), ValueError, ("weight (24,)",)),
    (dict(x=torch.tensor(1.0)), ValueError, ("x has shape ()",)),
    (dict(bias=torch.zeros(24)), ValueError, ("bias has shape (24,)", "(40,) is wanted")),
    (dict(residual=lambda r: r[:1]), ValueError, ("residual has shape (1, 3, 5, 40)", "(2, 3, 5, 40) is wanted")),
    (dict(residual=lambda r: r[..., :24]), ValueError, ("residual has shape (2, 3, 5, 24)", "shape of the result")),
    (dict(residual=lambda r: r.double()), TypeError, ("residual is torch.float64", "x torch.float32")),
    (dict(weight=lambda w: w.bfloat16()), TypeError, ("weight is torch.bfloat16", "torch.autocast")),
    (dict(residual=lambda r: r.to("meta")), ValueError, ("residual is on meta", ".to(device)")),
    (dict(backend=3), ValueError, ("unknown backend 3",)),
]


class TestLinearResidual(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(2, 3, 4), n=3)]
    repeated = dict(shape=(50, 64), n=64)
    test_norm_parameters_in_float32 = None  # it has no norm


@pytest.mark.parametrize("path", PATHS)
def test_the_residual_is_not_written(path):
    """Not even where it could be: the backward pass still uses the caller's tensor."""
    tensors, settings = make(OP, dict(shape=(6, 24), n=24))
    tensors = convert(tensors, plain_dtype(path))
    before = tensors["residual"].clone()
    out = call(OP, tensors, settings, path)
    assert torch.equal(tensors["residual"], before)
    assert out.data_ptr() != tensors["residual"].data_ptr()


@pytest.mark.parametrize("path", paths(OP, "float64"))
def test_x_may_be_the_residual(path):
    """One tensor for both: its gradients add up."""
    tensors, settings = make(OP, dict(shape=(6, 24), n=24))
    x = tensors["x"].requires_grad_()
    call(OP, {**tensors, "residual": x}, settings, path).sum().backward()
    torch.testing.assert_close(x.grad, (1 + tensors["weight"].sum(0)).expand(6, 24), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_independent(path):
    tensors, settings = make(OP, dict(shape=(37, 64), n=48))
    tensors = convert(tensors, plain_dtype(path))
    before = call(OP, tensors, settings, path)
    tensors["x"][11] += 1
    tensors["residual"][23] = torch.nan
    changed = (call(OP, tensors, settings, path) != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [11, 23]


def test_autocast_takes_a_residual_of_another_dtype():
    """In a float32 model under autocast, the residual stream is float32 at first, and autocast's dtype after the first
    operator."""
    x, weight, residual = torch.randn(3, 8).bfloat16(), torch.randn(4, 8), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_residual(x, weight, None, residual)
    assert torch.equal(out, linear_residual(x, weight.bfloat16(), None, residual.bfloat16()))
