# SPDX-License-Identifier: Apache-2.0
"""Operators beside PyTorch's: the gate before timing, the rows that are written, and one operator at a shape of one's
own from the command line."""

import json

import pytest
import torch

from mvit_kernels.__main__ import main
from mvit_kernels.bench import suites
from mvit_kernels.bench.suites import operators
from mvit_kernels.bench.suites.operands import OPERATORS, operands
from mvit_kernels.verification import ErrorRow
from support.suites import TINY, context

pytestmark = pytest.mark.usefixtures("quick_ceilings")

# --- the gate, and rows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_is_measured_beside_pytorchs(operator, training):
    if training and operator == "inverted_residual":
        return
    stage = TINY if operator == "transformer" or training else TINY._replace(variant="s")
    setting = operators.Setting(operator, stage, 32, "float32", training)
    rows = operators.measure_setting(setting, context())
    by_name = {one["candidate"]: one for one in rows}
    backends = suites.operators.backends
    ours = {"cpu"} if operator in backends.operators("cpu") and not backends.unavailable("cpu", "cpu") else set()
    more = {"patch_attention": {"sdpa_math", "sdpa_flash"}, "inverted_residual": {"convolutions"}}.get(operator, set())
    assert set(by_name) - ({"cpu"} - ours) == {"eager"} | ours | more
    for name in {"eager"} | ours | more:
        one = by_name[name]
        assert one["p20_ms"] <= one["median_ms"] <= one["p80_ms"] and one["error"] <= one["allowed"]
        assert one["ratio"] == pytest.approx(by_name["eager"]["median_ms"] / one["median_ms"], rel=2e-3)
        assert one["gflop_per_s"] == pytest.approx(one["gflop"] / one["median_ms"] * 1e3, rel=2e-3)
        assert (one["mode"], one["stage"]) == ("training" if training else "inference", f"{stage.variant}/3")


@pytest.mark.parametrize("training, wrong", [(False, "output"), (True, "gradient of weight")])
def test_a_wrong_operator_is_not_timed(monkeypatch, training, wrong):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone() if training else x * 1.001

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def candidates(case, device, compiled):
        def function(x, weight, bias, residual):
            return case.plain(x, Wrong.apply(weight), bias, residual)

        return {"eager": case.plain, "cpu": function}

    monkeypatch.setattr(operators, "candidates", candidates)
    setting = operators.Setting("linear_residual", TINY, 32, "float32", training)
    right, ours = operators.measure_setting(setting, context())
    assert right["median_ms"] and (ours["median_ms"], ours["samples"]) == ("", 0)
    assert ours["note"].startswith(f"not timed: the error of {wrong} is ") and ours["error"] > ours["allowed"]
    assert suites._is_wrong(ours) and not suites._is_wrong(right)


def test_bad_luck_with_one_draw_is_no_error(monkeypatch):
    """An operator that misses on one draw of eight, by no more than PyTorch does on another, is right."""
    unit = torch.finfo(torch.float32).eps
    lucky, other = (ErrorRow("output", e, p, 2 * (p + unit), 1.0) for e, p in ((5e-6, 1e-6), (3e-6, 4e-6)))
    together = operators._together([lucky, other], unit)
    assert not lucky.ok and other.ok and together.ok
    assert together == ErrorRow("output", 5e-6, 4e-6, 2 * (4e-6 + unit), 1.0)

    seeds, rows = [], iter([[lucky], *[[other]] * 7])
    monkeypatch.setattr(operators, "_rows", lambda *_: next(rows))
    case = operands("linear_residual", TINY)

    def redraw(seed):
        seeds.append(seed)
        return case

    found = operators.check(case, False, *operators.truth_of(case, False), case.plain, redraw)
    assert found == together and seeds == list(range(1, 8))


def test_an_absent_backend_is_listed_with_its_reasons(monkeypatch):
    monkeypatch.setattr(operators.backends, "unavailable", lambda backend, device: ("no library",) * (backend == "cpu"))
    setting = operators.Setting("linear_residual", TINY, 32, "float32", False)
    rows = {one["candidate"]: one for one in operators.measure_setting(setting, context())}
    assert rows["cpu"]["note"] == "absent: no library" and rows["eager"]["median_ms"]


# --- one operator at a shape of one's own


@pytest.mark.parametrize(
    "options, message",
    [
        ("--operator patch_attention", "give --shape B,H,W,C for one call of it, or --suite operators"),
        ("--shape 1,2,2,8", "name the operator with --operator"),
        ("--operator attention --shape 1,2,2,8", "unknown operator 'attention'; choose from batch_norm_activation, "),
        ("--operator layer_norm,transformer --shape 1,2,2,8", "--shape is that of one operator"),
        ("--operator layer_norm --shape 8", "has 1 numbers; give 2 or more numbers, channels last"),
        ("--operator transformer --shape 4,8", "has 2 numbers; give 4: batch, height, width, channels"),
        ("--operator layer_norm --shape 8,0", "'8,0' is not a shape such as 8,32,32,144"),
        ("--operator layer_norm --shape 8,8 --heads 2", "layer_norm has no heads; its sizes are the shape"),
        ("--operator patch_attention --shape 1,2,2,10", "the channels, 10, are no multiple of heads, 4"),
        ("--operator patch_attention --shape 1,3,2,8", "3 × 2 has no whole number of patches of 2 × 2"),
        ("--operator inverted_residual --shape 1,4,4,8 --residual --stride 2", "residual takes stride 1"),
        ("--operator inverted_residual --shape 1,4,4,8 --train", "is for inference only and has no gradient"),
        ("--operator layer_norm --shape 100000,100000,1000", "give a smaller shape"),
        (
            "--operator layer_norm --shape 8,8 --peers fast",
            "layer_norm has no candidate fast here; choose from eager, ",
        ),
        ("--operator layer_norm --shape 8,8 --batch 3", "--batch is not for one operator; it belongs to --model, "),
        ("--operator layer_norm --shape 8,8 --output a.txt", "ends neither in .csv nor in .json"),
    ],
)
def test_bench_says_what_is_wrong_with_an_operator(options, message, capsys):
    assert main(["bench", *options.split()]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("train", [False, True])
def test_one_operator_is_measured(train, tmp_path, capsys):
    command = "bench --operator layer_norm_mlp --shape 3,5,16 --hidden 24 --seconds 0.05 --backend reference".split()
    command += ["--peers", "reference", "--output", str(tmp_path / "a.json")]
    assert main([*command, *["--train"] * train]) == 0
    head, amount, *table = capsys.readouterr().out.splitlines()
    kind = "training" if train else "inference"
    assert head.startswith(f"layer_norm_mlp, 3x5x16, hidden 24, float32, {kind}, torch ")
    assert "GFLOP of products" in amount and [one.split()[0] for one in table] == ["candidate", "eager", "reference"]
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [one["candidate"] for one in rows] == ["eager", "reference"]
    for one in rows:
        assert one["median_ms"] > 0 and one["error"] <= one["allowed"] and one["stage"] == "3x5x16, hidden 24"
        assert ("gradient" in one["worst"] or train is False) and one["backend"] == "reference"
