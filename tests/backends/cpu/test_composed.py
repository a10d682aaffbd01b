# SPDX-License-Identifier: Apache-2.0
"""Row-wise operators composed of PyTorch's products: right at every dtype and layout when forced, taken where the table
says so, and the LayerNorm between them."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

import mvit_kernels
from mvit_kernels.backends import cpu
from mvit_kernels.backends.contract import REGISTRY
from mvit_kernels.backends.cpu import composed
from mvit_kernels.backends.library import SCHEMAS
from support.cases import call, convert, evaluate, make
from support.checks import check, check_autocast, check_gradients
from support.layouts import LAYOUTS, lay_out
from support.native import instruction_sets, skip_without_a_compiler

skip_without_a_compiler()

DTYPES = ("float32", "bfloat16", "float64")
CASES = [
    ("layer_norm_linear", dict(shape=(2, 3, 5, 24), n=40)),
    ("layer_norm_linear", dict(shape=(2, 33, 17), n=33, activation="silu")),
    ("layer_norm_linear", dict(shape=(600, 144), n=432)),
    ("layer_norm_linear", dict(shape=(40, 64), n=64, bias=False, activation="silu")),
    ("layer_norm_linear", dict(shape=(24,), n=8)),
    ("layer_norm_linear", dict(shape=(0, 4, 24), n=8)),
    ("linear_residual", dict(shape=(2, 3, 5, 24), n=40)),
    ("linear_residual", dict(shape=(600, 144), n=144)),
    ("linear_residual", dict(shape=(2, 3, 80), n=96, bias=False)),
    ("linear_residual", dict(shape=(24,), n=8)),
    ("linear_residual", dict(shape=(0, 4, 4, 24), n=8)),
    ("layer_norm_mlp", dict(shape=(2, 3, 5, 24), hidden=48)),
    ("layer_norm_mlp", dict(shape=(300, 96), hidden=192)),
    ("layer_norm_mlp", dict(shape=(5, 17), hidden=33)),
    ("layer_norm_mlp", dict(shape=(24,), hidden=8)),
    ("layer_norm_mlp", dict(shape=(0, 24), hidden=48)),
]
SMALL = {operator: sizes for operator, sizes in reversed(CASES)}  # the first of each operator


@pytest.fixture(params=[False, True], ids=["kernel", "composed"])
def way(request, monkeypatch):
    """Which of the two computes every call, whatever the table says; counts the calls."""
    counted = []

    def composes(name, x, instruction_set):
        counted.append(name)
        return request.param

    monkeypatch.setattr(composed, "composes", composes)
    if request.param:  # the raw operator of the call's own name is not run then
        monkeypatch.setattr("support.checks.Recorder", contextlib.nullcontext)
    yield request.param
    assert any(name.endswith("_backward") for name in counted)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator, sizes", CASES, ids=str)
def test_values_and_gradients(operator, sizes, dtype, way):
    check(operator, sizes, dtype=dtype, path="cpu")


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("operator", SMALL)
def test_layouts_norm_parameters_and_autocast(operator, layout, way):
    check(operator, SMALL[operator], dtype="bfloat16", path="cpu", layout=layout, norm_dtype="float32")
    if layout == "contiguous":
        check_autocast(operator, SMALL[operator], "cpu")


@pytest.mark.parametrize(
    "operator, sizes",
    [
        ("layer_norm_linear", dict(shape=(2, 3, 4), n=3, activation="silu")),
        ("linear_residual", dict(shape=(2, 3, 4), n=3)),
        ("layer_norm_mlp", dict(shape=(2, 3, 4), hidden=5)),
    ],
)
def test_finite_differences(operator, sizes, way):
    check_gradients(operator, sizes, "cpu", twice=False)


@pytest.fixture
def everything_composed(monkeypatch):
    """As if the table had every operator in float32."""
    always = composed.Case(1, 1, 1000)
    monkeypatch.setattr(composed, "FASTER", {"some": {torch.float32: dict.fromkeys(composed.COMPOSED, always)}})
    monkeypatch.setattr(cpu, "_instruction_set_beside_amx", lambda: "some")


def made(operator):
    tensors, settings = make(operator, SMALL[operator])
    return {name: t if t is None else t.float().requires_grad_() for name, t in tensors.items()}, settings


def test_it_compiles_without_a_break(everything_composed):
    torch._dynamo.reset()
    graphs = AotEagerAndRecordGraphs()
    tensors, settings = made("layer_norm_linear")
    function = torch.compile(
        lambda t: call("layer_norm_linear", t, settings, "cpu"), fullgraph=True, dynamic=True, backend=graphs
    )
    for out in (function(tensors), call("layer_norm_linear", tensors, settings, "cpu")):
        out.sum().backward()
    products = [n for g in (*graphs.fw_graphs, *graphs.bw_graphs) for n in g.graph.nodes if "mm" in str(n.target)]
    assert len(products) == 3


@pytest.mark.parametrize("operator", ["layer_norm_linear", "layer_norm_mlp"])
def test_rows_of_equal_values(operator, way):
    """As in tests/ops/test_equal_rows.py: gradients to the bit those of rows of zeros, none of the norm's weight."""
    found = []
    for value in (0.0, 7.1, 1e4 + 0.37):
        tensors, settings = make(operator, dict(shape=(6, 144), **{"n" if "linear" in operator else "hidden": 6}))
        tensors["x"] = torch.full_like(tensors["x"], value)
        result = evaluate(lambda t, s=settings: call(operator, t, s, "cpu"), convert(tensors, torch.float32), True)
        assert not result["gradient of norm_weight"].any()
        found.append({name: t for name, t in result.items() if "gradient" in name and not name.endswith(" x")})
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


# ------------------------------------------------------------------------------------------------------- the choice


def test_the_table_names_what_there_is():
    for instruction_set, by_dtype in composed.FASTER.items():
        assert instruction_set in instruction_sets()
        for dtype, cases in by_dtype.items():
            assert dtype in cpu.DTYPES and cases
            for name, case in cases.items():
                assert name in composed.COMPOSED and name in SCHEMAS
                assert 0 < case.rows and 64 <= case.narrowest <= case.widest <= 240  # the widths that were measured


@pytest.mark.parametrize(
    "rows, width, composes", [(512, 64, 1), (511, 64, 0), (512, 63, 0), (512, 241, 0), (4096, 240, 1)]
)
def test_a_row_of_the_table_is_taken_where_it_holds(monkeypatch, rows, width, composes):
    monkeypatch.setattr(
        composed, "FASTER", {"avx512": {torch.float32: {"linear_residual": composed.Case(512, 64, 240)}}}
    )
    for name, dtype, instruction_set, expected in (
        ("linear_residual", torch.float32, "avx512", bool(composes)),
        ("linear_residual_backward", torch.float32, "avx512", False),
        ("linear_residual", torch.bfloat16, "avx512", False),
        ("linear_residual", torch.float32, "avx2", False),
        ("linear_residual", torch.float32, "", False),
    ):
        x = torch.empty(rows // 64, 64, width, dtype=dtype) if rows % 64 == 0 else torch.empty(rows, width, dtype=dtype)
        assert composed.composes(name, x, instruction_set) is expected


def test_without_amx_every_call_runs_our_kernels(monkeypatch):
    cpu._instruction_set_beside_amx.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert cpu.instruction_set_beside_amx() == ""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    cpu._instruction_set_beside_amx.cache_clear()
    assert cpu.instruction_set_beside_amx() == cpu.instruction_set()
    cpu._instruction_set_beside_amx.cache_clear()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_table_decides_forward_and_backward(everything_composed, monkeypatch, deterministic):
    """Not where PyTorch is asked for the same bits: those of MKL and oneDNN may depend on the number of threads."""
    calls = []
    for name, function in composed.COMPOSED.items():
        told = lambda *args, n=name, f=function: calls.append(n) or f(*args)  # noqa: E731
        monkeypatch.setitem(composed.COMPOSED, name, told)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for operator in SMALL:
            tensors, settings = made(operator)
            call(operator, tensors, settings, "cpu").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ([] if deterministic else [n for o in SMALL for n in (o, f"{o}_backward")])


# --------------------------------------------------------------------------------------------------- the LayerNorm


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 64), (70, 240), (5, 17), (300, 24), (1, 1), (24,), (0, 4, 24)])
def test_kernels_of_layer_norm(monkeypatch, shape, dtype):
    monkeypatch.setitem(REGISTRY["cpu"].supports, "layer_norm", lambda call: [])
    check("layer_norm", dict(shape=shape), dtype=dtype, path="cpu")
    check("layer_norm", dict(shape=shape, mean=1e3), dtype=dtype, path="cpu", norm_dtype=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_layer_norm_give_forward_again(dtype, layout):
    tensors, settings = make("layer_norm", dict(shape=(3, 5, 7, 40)))
    x, weight, bias = convert(tensors, getattr(torch, dtype)).values()
    x = lay_out(x, layout)[0]
    out, mean, rstd = torch.ops.mvit_kernels.layer_norm.cpu(x, weight, bias, 1e-5)
    again = torch.ops.mvit_kernels.layer_norm_from_statistics.cpu(x, mean, rstd, weight, bias)
    torch.testing.assert_close(again, out, rtol=4 * torch.finfo(out.dtype).eps, atol=4 * torch.finfo(out.dtype).eps)
    with pytest.raises(RuntimeError, match="mean is not the one that the forward operator returned"):
        torch.ops.mvit_kernels.layer_norm_from_statistics.cpu(x, mean[:1], rstd, weight, bias)


def test_the_operator_itself_is_still_pytorchs():
    assert "layer_norm" not in mvit_kernels.backends.operators("cpu")  # as fast in float32, and not measured elsewhere
