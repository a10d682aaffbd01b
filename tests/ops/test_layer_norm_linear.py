# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_linear``: values and gradients on every path, the layouts it may get, and what it refuses."""

import pytest
import torch

from support.cases import DTYPES, call, convert, make, paths, plain_dtype
from support.checks import check, check_saved_statistics
from support.operator_tests import OperatorTests
from support.oracle import layer_norm
from support.tolerance import assert_close_as_pytorch

OP = "layer_norm_linear"
PATHS = paths(OP)
SMALL = dict(shape=(2, 3, 5, 24), n=40, activation="silu")
CASES = [
    *(dict(shape=(2, 3, d), n=3 * d) for d in (64, 80, 96, 120, 144, 192, 240)),  # qkv of xxs, xs and s
    *(dict(shape=(6, d), n=2 * d, activation="silu") for d in (64, 96, 144, 240)),  # fc1
    dict(shape=(2, 3, 80), n=96, bias=False),  # Kornia's qkv
    *(dict(shape=(5, d), n=n) for d, n in ((17, 33), (33, 100), (100, 17), (1, 1), (2, 3))),
    dict(shape=(24,), n=8),  # one row
    dict(shape=(1, 1, 1, 1, 24), n=8),
    dict(shape=(300, 24), n=8, activation="silu"),  # more rows than any tile
]
EMPTY = [dict(shape=(0, 4, 4, 24), n=8), dict(shape=(0, 24), n=8, activation="silu")]
REFUSED = [
    (dict(x="a string"), TypeError, ("x is a str", "torch.Tensor is wanted")),
    (dict(x=lambda x: x.int()), TypeError, ("x is torch.int32", "float32, bfloat16", ".float()")),
    (dict(x=torch.tensor(1.0)), ValueError, ("x has no axes", "(..., d)")),
    (dict(norm_weight=None), TypeError, ("norm_weight is", "torch.Tensor is wanted")),
    (dict(norm_bias=None), TypeError, ("norm_bias is", "torch.Tensor is wanted")),
    (dict(weight=None), TypeError, ("weight is", "torch.Tensor is wanted")),
    (
        dict(norm_weight=torch.ones(23)),
        ValueError,
        ("norm_weight has shape (23,)", "(24,) is wanted", "width of x"),
    ),
    (dict(norm_bias=torch.ones(24, 1)), ValueError, ("norm_bias has shape (24, 1)", "(24,) is wanted")),
    (dict(weight=lambda w: w.t()), ValueError, ("weight has shape (24, 40)", "(n, 24) is wanted")),
    (dict(weight=lambda w: w[0]), ValueError, ("weight has shape (24,)", "(n, 24) is wanted")),
    (dict(bias=torch.zeros(41)), ValueError, ("bias has shape (41,)", "(40,) is wanted", "row of weight")),
    (
        dict(weight=lambda w: w.double()),
        TypeError,
        ("weight is torch.float64", "x torch.float32", "model.to(dtype)"),
    ),
    (dict(bias=lambda b: b.half()), TypeError, ("bias is torch.float16", "torch.autocast")),
    (dict(norm_weight=lambda w: w.double()), TypeError, ("norm_weight is torch.float64",)),
    (
        dict(x=lambda x: x.bfloat16(), norm_weight=lambda w: w.half()),
        TypeError,
        ("norm_weight is torch.float16",),
    ),
    (dict(weight=lambda w: w.to("meta")), ValueError, ("weight is on meta", "x on cpu", ".to(device)")),
    (dict(activation="gelu"), ValueError, ("activation is 'gelu'", "None or 'silu'")),
    (dict(eps=0.0), ValueError, ("eps is 0.0", "positive")),
    (dict(eps=float("nan")), ValueError, ("eps is nan", "positive")),
    (dict(eps=None), ValueError, ("eps is None", "positive")),
    (dict(eps="1e-5"), ValueError, ("eps is '1e-5'", "positive")),
    (dict(backend="gpu"), ValueError, ("unknown backend 'gpu'", "reference, cpu, triton, cuda")),
]


class TestLayerNormLinear(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(3, 5), n=4, activation="silu")]
    repeated = dict(shape=(50, 64), n=192)


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch warns of a LayerNorm of no rows at all
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes, path):
    check(OP, sizes, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_mean_far_from_zero(dtype, path):
    """E[x²] − E[x]² would lose six digits of the variance here."""
    check(OP, dict(shape=(40, 64), n=32, mean=1e3), dtype=dtype, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_constant_rows(path):
    """No variance at all: rstd is eps^(-1/2), and the result is the linear layer of the norm's bias."""
    tensors, settings = make(OP, dict(shape=(3, 24), n=8))
    tensors = convert({**tensors, "x": torch.full((3, 24), 7.0)}, plain_dtype(path))
    out = call(OP, tensors, settings, path)
    expected = tensors["norm_bias"].double() @ tensors["weight"].double().t() + tensors["bias"]
    assert_close_as_pytorch("constant rows", out, call(OP, tensors, settings, "usual"), expected.expand(3, 8).double())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-1, 10.0])
def test_eps(eps, path):
    check(OP, dict(shape=(6, 24), n=8, eps=eps), path=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", PATHS[1:])
def test_saved_statistics(backend, dtype):
    check_saved_statistics(OP, dict(shape=(3, 7, 80), n=16, mean=3.0), dtype, backend)


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_independent(path):
    tensors, settings = make(OP, dict(shape=(37, 64), n=48, activation="silu"))
    tensors = convert(tensors, plain_dtype(path))
    before = call(OP, tensors, settings, path)
    tensors["x"][11] += 1
    changed = (call(OP, tensors, settings, path) != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row(path):
    tensors, settings = make(OP, dict(shape=(9, 64), n=48))
    tensors = convert(tensors, plain_dtype(path))
    tensors["x"][4, 63] = torch.nan
    assert call(OP, tensors, settings, path).isnan().all(-1).nonzero().flatten().tolist() == [4]


def test_normalised_rows_have_mean_zero_and_variance_one():
    """The oracle itself, checked against the definition."""
    y = layer_norm(torch.randn(5, 64, dtype=torch.float64) * 3 + 7, torch.ones(64), torch.zeros(64), 1e-12)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_autocast_refuses_float64_weights_but_takes_half():
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    one = torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(
            OP, dict(x=x, norm_weight=one, norm_bias=one, weight=w.half(), bias=None), {}, "reference"
        ).shape == (3, 4)
        with pytest.raises(TypeError, match="layer_norm_linear: weight is torch.float64"):
            call(OP, dict(x=x, norm_weight=one, norm_bias=one, weight=w.double(), bias=None), {}, "reference")
