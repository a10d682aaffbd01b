# SPDX-License-Identifier: Apache-2.0
"""The scripts in benchmarks/."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ as a module."""

    def load(name: str):
        specification = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
        return module

    return load


def test_stack_counts_what_the_networks_do(script):
    """GFLOP of the published variants at 256 px, by hand: S stage 3 is 2 layers of 1024 tokens, of which each costs
    6 · 144² + 2 · 144² + 8 · 144² for the linear layers, and 2 · 2 · 256 · 144 for attention to 256 tokens."""
    stacks = {stack[:2]: stack for stack in script("stack").stacks(["s", "xs", "xxs"], 256, 1)}
    assert stacks["s", 3].gflop == pytest.approx(2 * 1024 * (16 * 144**2 + 4 * 256 * 144) / 1e9)
    assert [round(stacks["s", stage].gflop * 1e3, 1) for stage in (3, 4, 5)] == [981.5, 654.3, 179.9]
    for model, total in (("xs", 836), ("xxs", 424)):
        assert round(sum(stacks[model, stage].gflop for stage in (3, 4, 5)) * 1e3) == total
    assert [stack.side for stack in script("stack").stacks(["s"], 224, 1)] == [28, 14, 8]  # 7 × 7 becomes 8 × 8


def test_stack_writes_a_row_a_stack(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "stack.csv"
    stack = script("stack")
    monkeypatch.setattr(stack, "SQUARES", (64, 96))
    arguments = "--models xxs --dtypes float32,bfloat16 --batches 2 --size 64 --threads 1 --seconds 0.05 --csv"
    monkeypatch.setattr(sys, "argv", ["stack.py", *arguments.split(), str(path)])
    stack.main()
    rows = list(csv.DictReader(path.open()))
    assert [(row["model"], row["stage"]) for row in rows[:5]] == [
        *(("xxs", stage) for stage in "345"),
        ("torch.mm", ""),
        ("torch.mm", ""),
    ]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"} and len(rows) == 10
    for row in rows:
        assert float(row["gflop_per_s"]) == pytest.approx(1e3 * float(row["gflop"]) / float(row["median_ms"]), rel=0.15)
    assert max(float(row["percent"]) for row in rows if row["model"] == "torch.mm") == 100
    assert "of torch.mm's" in capsys.readouterr().out


def test_stack_does_not_time_what_is_wrong(script, monkeypatch):
    stack = script("stack")
    right = stack.mvit_kernels.transformer

    def wrong(*arguments, backend, **options):
        out = right(*arguments, backend=backend, **options)
        return out if backend == "reference" else out + 1e-4

    monkeypatch.setattr(stack.mvit_kernels, "transformer", wrong)
    with pytest.raises(RuntimeError, match="an error of .* is allowed"):
        stack.function_of(stack.stacks(["xxs"], 64, 1)[0], stack.torch.float32)
