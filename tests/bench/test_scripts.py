# SPDX-License-Identifier: Apache-2.0
"""The scripts in benchmarks/ that measure, and every kernel once. The script for GPUs: test_gpu_script.py."""

import sys

import pytest
import torch

import mvit_kernels
from gates import every_kernel
from mvit_kernels.bench.results import read


def test_boundary_writes_a_row_a_path(script, tmp_path, monkeypatch, capsys):
    boundary = script("boundary")
    monkeypatch.setattr(sys, "argv", ["boundary.py", "--rounds", "3", "--results", str(tmp_path)])
    boundary.main()
    lines = read(tmp_path / "boundary.csv")
    paths = {(one["subject"], one["backend"], one["candidate"]) for one in lines}
    assert ("torch.add", "", "forward") in paths and ("transformer", "reference", "raw") in paths
    assert ("layer_norm_linear", "reference", "function") in paths
    assert len(paths) == len(lines) and all(float(one["median_ms"]) > 0 for one in lines)
    assert "× torch.add" in capsys.readouterr().out


def test_exactness_writes_a_row_a_result(script, tmp_path, monkeypatch, capsys):
    """Ours and PyTorch's, against a truth that is exact in comparison; operators only in the dtypes they have."""
    exactness = script("exactness")
    if exactness.mvit_kernels.backends.unavailable("cpu", "cpu"):
        pytest.skip(exactness.mvit_kernels.backends.unavailable("cpu", "cpu")[0])
    monkeypatch.setattr(exactness, "PRODUCTS", [(6, 64, 192)])
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--draws", "2", "--results", str(tmp_path)])
    exactness.main()
    lines = read(tmp_path / "exactness.csv")
    found = {(one["subject"], one["dtype"], one["mode"]) for one in lines}
    assert ("layer_norm_mlp", "float64", "fc2_weight") in found and ("convolution", "float32", "out") in found
    assert ("convolution", "float64", "out") not in found and len(capsys.readouterr().out.splitlines()) == len(lines)
    for one in lines:
        unit = torch.finfo(getattr(torch, one["dtype"])).eps
        assert float(one["error"]) < 20 * unit and 0 < float(one["ratio"]) < 3, one


def test_startup_times_both_ways(script, monkeypatch, capsys):
    startup = script("startup")
    if startup.mvit_kernels.backends.unavailable("cpu", "cpu"):
        pytest.skip(startup.mvit_kernels.backends.unavailable("cpu", "cpu")[0])
    monkeypatch.setattr(sys, "argv", ["startup.py", "--model", "xxs", "--dtype", "bfloat16", "--runs", "1"])
    startup.main()
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("MobileViT-XXS in bfloat16, 2.")
    for line, kind in zip(lines, ("NumPy alone", "PyTorch"), strict=True):
        parts = [float(word) for word in line.removeprefix(kind).split()]
        assert line.startswith(kind) and parts[4] == pytest.approx(sum(parts[:3]), abs=0.3)


def test_regressions_check_and_time_the_cpu_path(script):
    regressions = script("regressions")
    timed = []

    def benchmark(function, *arguments):
        timed.append(function(*arguments))

    stage = regressions.stages(["xxs"], 64, 1)[0]
    if regressions.backends.unavailable("cpu", "cpu"):
        pytest.skip(regressions.backends.unavailable("cpu", "cpu")[0])
    regressions.test_operator(benchmark, "transformer", stage, torch.float32)
    regressions.test_operator_with_backward(benchmark, "linear_residual")
    assert timed[0].shape == (1, 8, 8, 64) and len(timed[1]) == 1 + 4


def test_scales_times_every_scale(script, monkeypatch, capsys):
    """A line a case; it exits with 1 if a scale is slower than allowed, and measures again before it says so."""
    scales = script("scales")
    if scales.mvit_kernels.backends.unavailable("cpu", "cpu"):
        pytest.skip(scales.mvit_kernels.backends.unavailable("cpu", "cpu")[0])
    base = ["scales.py", "--variant", "xxs", "--dtypes", "float32", "--seconds", "0.001"]
    monkeypatch.setattr(scales, "FORWARD", ("layer_norm_linear", "frozen"))
    monkeypatch.setattr(scales, "TRAINED", ("patch_attention",))
    monkeypatch.setattr(sys, "argv", [*base, "--most", "1000"])
    assert scales.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == [f"{scale:g}" for scale in scales.SCALES] and float(head.split()[-1]) == 1e4
    assert [one.split(",")[0] for one in lines] == ["layer_norm_linear", "frozen", "patch_attention"]
    assert "trained" in lines[2] and all(len(one.split("float32")[1].split()) == 10 for one in lines)
    monkeypatch.setattr(sys, "argv", [*base, "--most", "0.5", "--only", "frozen"])
    assert scales.main() == 1
    assert [one.endswith("slow") for one in capsys.readouterr().out.splitlines()] == [False, True]


def test_every_kernel_once(monkeypatch, capsys):
    """It exits with 0 if all is right, and with 1 if a kernel is wrong or if every call is refused."""
    monkeypatch.setattr(every_kernel, "SIZES", {name: sizes[:1] for name, sizes in every_kernel.SIZES.items()})
    assert every_kernel.main(["reference"]) == 0
    dtypes = 3
    assert capsys.readouterr().out.count(": ok\n") == dtypes * len(every_kernel.SIZES)
    right = mvit_kernels.linear_residual

    def wrong(*arguments, **options):
        return right(*arguments, **options) * 1.1

    def refused(*arguments, **options):
        raise mvit_kernels.BackendError("linear_residual: not here")

    monkeypatch.setattr(mvit_kernels, "linear_residual", wrong)
    assert every_kernel.main(["reference"]) == 1
    out = capsys.readouterr().out
    assert out.count(": WRONG: ") == dtypes and out.count(": ok\n") == dtypes * (len(every_kernel.SIZES) - 1)
    assert every_kernel.main(["reference", "--only", "linear_residual", "--run"]) == 0
    out = capsys.readouterr().out
    assert out.count(": ran\n") == dtypes and out.endswith(f"{dtypes} calls\n")
    monkeypatch.setattr(mvit_kernels, "linear_residual", refused)
    assert every_kernel.main(["reference"]) == 0 and capsys.readouterr().out.count(": refused: ") == dtypes
    assert every_kernel.main(["reference", "--only", "linear_residual"]) == 1


def test_every_kernel_is_among_the_small_cases():
    assert every_kernel.SIZES.keys() == set(mvit_kernels.backends.operators("reference"))
