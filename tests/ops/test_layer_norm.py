# SPDX-License-Identifier: Apache-2.0
"""``layer_norm``: values and gradients by every path, and what it refuses."""

import pytest
import torch

from support.cases import DTYPES, LAYOUTS, paths
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

OP = "layer_norm"
PATHS = paths(OP)
SMALL = dict(shape=(2, 3, 5, 24))
CASES = [
    *(dict(shape=(2, 3, d)) for d in (64, 80, 96, 120, 144, 192, 240)),  # of xxs, xs and s
    *(dict(shape=(5, d)) for d in (1, 17, 33, 100, 300, 512)),
    dict(shape=(24,)),
    dict(shape=(300, 24)),
    dict(shape=(40, 64), mean=1e3),
    dict(shape=(5, 24), eps=0.1),
    dict(shape=(0, 4, 24)),
]


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


@pytest.mark.parametrize("path", [path for path in PATHS if path != "raw"])
def test_autocast(path):
    check_autocast(OP, SMALL, path)


@pytest.mark.parametrize("path", PATHS)
def test_graph(path):
    check_graph_only_where_needed(OP, SMALL, path)
    check_gradients_one_by_one(OP, SMALL, path)


@pytest.mark.parametrize("path", paths(OP, "float64"))
def test_finite_differences(path):
    check_gradients(OP, dict(shape=(2, 3, 4)), path, twice=path == "reference")


@pytest.mark.parametrize("backend, layout", registrations(OP))
def test_registration(backend, layout):
    check_registration(OP, SMALL, layout, backend)


@pytest.mark.parametrize("path", PATHS)
def test_same_bits(path):
    check_same_bits(OP, dict(shape=(50, 64)), path)


REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x.to(torch.uint8)), TypeError, ("x is torch.uint8",)),
    (dict(x=torch.tensor(1.0)), ValueError, ("x has no axes",)),
    (dict(norm_weight=lambda w: w[:23]), ValueError, ("norm_weight has shape (23,)", "(24,) is wanted")),
    (dict(norm_bias=lambda b: b.double()), TypeError, ("norm_bias is torch.float64", "x torch.float32")),
    (dict(norm_bias=lambda b: b.to("meta")), ValueError, ("norm_bias is on meta", ".to(device)")),
    (dict(eps=0.0), ValueError, ("eps is 0.0", "positive")),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


@pytest.mark.parametrize("change, error, says", REFUSED, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_refuses(change, error, says):
    check_refusal(OP, SMALL, change, error, *says)


def test_meta_device():
    check_meta(OP, SMALL, "reference")
