# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_mlp``: values and gradients by every path, the layouts it may meet, and what it refuses."""

import pytest
import torch

from support.cases import DTYPES, LAYOUTS, call, call_raw, convert, make, paths, plain_dtype, takes
from support.checks import (
    check,
    check_autocast,
    check_gradients,
    check_gradients_one_by_one,
    check_graph_only_where_needed,
    check_meta,
    check_refusal,
    check_registration,
    check_same_bits,
    one_thread,  # noqa: F401 (a fixture)
    registrations,
)
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


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's word on no rows at all
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_values_and_gradients(sizes, dtype, path):
    check(OP, sizes, dtype=dtype, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(layout, dtype, path):
    check(OP, SMALL, dtype=dtype, path=path, layout=layout)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_parameters_in_float32(dtype, path):
    check(OP, SMALL, dtype=dtype, norm_dtype="float32", path=path)


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
    """The raw operator's second and third results are those of the first LayerNorm, in float32 or better."""
    backend = "reference" if backend == "raw" else backend
    tensors, settings = make(OP, dict(shape=(3, 7, 80), hidden=16, mean=3.0))
    tensors = convert(tensors, getattr(torch, dtype))
    if not takes(backend, dtype):
        with pytest.raises((TypeError, RuntimeError), match="bfloat16 and float"):
            call_raw(OP, backend, tensors, settings)
        return
    _, mean, rstd = call_raw(OP, backend, tensors, settings)
    x = tensors["x"].double()
    centred = x - x.sum(-1, keepdim=True) / 80
    _, pytorch_mean, pytorch_rstd = torch.native_layer_norm(tensors["x"].float(), (80,), None, None, 1e-5)
    assert_close_as_pytorch("mean", mean, pytorch_mean.squeeze(-1), x.sum(-1) / 80)
    truth = 1 / torch.sqrt((centred * centred).sum(-1) / 80 + 1e-5)
    assert_close_as_pytorch("rstd", rstd, pytorch_rstd.squeeze(-1), truth)


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


@pytest.mark.parametrize("path", [path for path in PATHS if path != "raw"])
def test_autocast(path):
    check_autocast(OP, SMALL, path)


@pytest.mark.parametrize("path", PATHS)
def test_graph(path):
    check_graph_only_where_needed(OP, SMALL, path)
    check_gradients_one_by_one(OP, SMALL, path)


@pytest.mark.parametrize("path", paths(OP, "float64"))
def test_finite_differences(path):
    check_gradients(OP, dict(shape=(3, 4), hidden=5), path, twice=path == "reference")


@pytest.mark.parametrize("backend, layout", registrations(OP))
def test_registration(backend, layout):
    check_registration(OP, SMALL, layout, backend)


@pytest.mark.parametrize("path", PATHS)
def test_same_bits(path):
    check_same_bits(OP, dict(shape=(50, 64), hidden=128), path)


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


@pytest.mark.parametrize("change, error, says", REFUSED, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_refuses(change, error, says):
    check_refusal(OP, SMALL, change, error, *says)


def test_meta_device():
    check_meta(OP, SMALL, "reference")
