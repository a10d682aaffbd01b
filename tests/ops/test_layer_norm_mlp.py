# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_mlp``: values and gradients on every path, the layouts it may get, and what it refuses."""

import pytest
import torch

from support.cases import DTYPES, call, convert, make, paths, plain_dtype
from support.checks import check, check_saved_statistics
from support.operator_tests import OperatorTests
from support.tolerance import assert_close_as_pytorch

OP = "layer_norm_mlp"
PATHS = paths(OP)
SMALL = dict(shape=(2, 3, 5, 24), hidden=40)
CASES = [
    *(dict(shape=(2, 3, d), hidden=2 * d) for d in (64, 80, 96, 120, 144, 192, 240)),  # xxs, xs and s
    *(dict(shape=(2, 3, d), hidden=4 * d) for d in (80, 96)),  # Kornia's stages 4 and 5
    *(dict(shape=(5, d), hidden=hidden) for d, hidden in ((17, 33), (33, 100), (100, 17), (1, 1))),
    dict(shape=(24,), hidden=8),
    dict(shape=(1, 1, 1, 1, 24), hidden=8),
    dict(shape=(300, 24), hidden=48),
    dict(shape=(0, 4, 4, 24), hidden=8),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    *(
        (dict([(name, None)]), TypeError, (f"{name} is", "torch.Tensor is wanted"))
        for name in ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    ),
    (dict(x=lambda x: x.bool()), TypeError, ("x is torch.bool",)),
    (dict(x=torch.tensor(1.0)), ValueError, ("x has no axes",)),
    (dict(norm_weight=torch.ones(25)), ValueError, ("norm_weight has shape (25,)", "(24,) is wanted")),
    (dict(norm_bias=torch.ones(1)), ValueError, ("norm_bias has shape (1,)", "(24,) is wanted")),
    (dict(fc1_weight=lambda w: w.t()), ValueError, ("fc1_weight has shape (24, 40)", "(hidden, 24) is wanted")),
    (dict(fc1_bias=torch.zeros(24)), ValueError, ("fc1_bias has shape (24,)", "(40,) is wanted")),
    (dict(fc2_weight=lambda w: w.t()), ValueError, ("fc2_weight has shape (40, 24)", "(24, 40) is wanted")),
    (dict(fc2_bias=torch.zeros(40)), ValueError, ("fc2_bias has shape (40,)", "(24,) is wanted")),
    (dict(fc2_weight=lambda w: w.double()), TypeError, ("fc2_weight is torch.float64", "model.to(dtype)")),
    (dict(fc1_weight=lambda w: w.to("meta")), ValueError, ("fc1_weight is on meta", ".to(device)")),
    (dict(eps=-1e-5), ValueError, ("eps is -1e-05", "positive")),
    (dict(eps=float("inf")), ValueError, ("eps is inf", "positive")),
    (dict(eps=None), ValueError, ("eps is None", "positive")),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


class TestLayerNormMlp(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(3, 4), hidden=5)]
    repeated = dict(shape=(50, 64), hidden=128)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_mean_far_from_zero(dtype, path):
    check(OP, dict(shape=(40, 64), hidden=32, mean=1e3), dtype=dtype, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [1e-12, 1e-1, 10.0])
def test_eps(eps, path):
    check(OP, dict(shape=(6, 24), hidden=8, eps=eps), path=path)


@pytest.mark.parametrize("path", PATHS)
def test_silu_where_it_is_nearly_zero_and_nearly_linear(path):
    """Hidden values around ± 200: exp(200) is infinite in float32, silu and its derivative are not."""
    tensors, settings = make(OP, dict(shape=(12, 24), hidden=48))
    tensors = convert({**tensors, "fc1_weight": 100 * tensors["fc1_weight"]}, plain_dtype(path))
    out = call(OP, tensors, settings, path)
    truth = call(OP, convert(tensors, torch.float64), settings, "oracle")
    assert_close_as_pytorch("far silu", out, call(OP, tensors, settings, "usual"), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", PATHS[1:])
def test_saved_statistics(backend, dtype):
    check_saved_statistics(OP, dict(shape=(3, 7, 80), hidden=16, mean=3.0), dtype, backend)


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_independent(path):
    tensors, settings = make(OP, dict(shape=(37, 64), hidden=128))
    tensors = convert(tensors, plain_dtype(path))
    before = call(OP, tensors, settings, path)
    tensors["x"][11] += 1
    tensors["x"][23, 0] = torch.nan
    after = call(OP, tensors, settings, path)
    assert (after != before).any(-1).nonzero().flatten().tolist() == [11, 23]
    assert after.isnan().all(-1).nonzero().flatten().tolist() == [23]


@pytest.mark.parametrize("path", PATHS)
def test_zero_fc2_leaves_x(path):
    tensors, settings = make(OP, SMALL)
    tensors = convert(tensors, plain_dtype(path))
    tensors["fc2_weight"].zero_()
    tensors["fc2_bias"].zero_()
    assert torch.equal(call(OP, tensors, settings, path), tensors["x"])
