# SPDX-License-Identifier: Apache-2.0
"""What the processes of benchmarks/gpu.sh do, on the CPU and small: provoking the fault, filling the cache, verifying,
reading what CUDA's tools print, predictions."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from mvit_kernels import backends
from mvit_kernels.bench import results
from support import ROOT

SMALL = ["--model", "own/xxs", "--batch", "1", "--size", "64", "--steps", "2", "--device", "cpu"]


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- the fault


@pytest.mark.parametrize("workload", ["train", "stack"])
def test_a_workload_without_a_fault(part, capsys, workload):
    """Each runs to its end on any backend, and says what it computed."""
    assert part("fault").main([workload, *SMALL, "--backend", "reference"]) == 0
    (line,) = printed(capsys)
    assert line["workload"] == workload and not line["faulted"] and "error" not in line
    assert len(line["value"]) == 2 and all(value == value for value in line["value"])


def test_the_stack_by_operator_is_the_stack(part):
    """What is provoked launches what a stack launches: the same values, up to its last norm."""
    fault = part("fault")
    stage = part("warm").stages(["xxs"], 64, 1)[0]
    case = fault.operands("transformer", stage)
    with backends.use_backend("reference"):
        rows, whole = fault.by_operator(case.tensors), case.public(*case.tensors)
    last = torch.nn.functional.layer_norm(rows, rows.shape[-1:], *case.tensors[-2:], eps=1e-5)
    torch.testing.assert_close(last, whole)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Triton Error [CUDA]: an illegal memory access was encountered", 3),
        ("CUDA error: misaligned address", 3),
        ("CUDA out of memory", 1),
    ],
)
def test_a_planted_fault_is_told_from_other_errors(part, capsys, monkeypatch, message, code):
    fault = part("fault")

    def broken(given):
        def step():
            raise RuntimeError(message)

        return step

    monkeypatch.setattr(fault, "train", broken)
    monkeypatch.setattr(fault.os, "_exit", sys.exit)  # which flushes nothing: the line has to be out before
    with contextlib.suppress(SystemExit):
        assert fault.main(["train", *SMALL]) == code
    (line,) = printed(capsys)
    assert line["faulted"] == (code == 3) and message in line["error"] and line["where"][-1].startswith("step (")


def test_triton_s_own_assembler_is_left_alone(part, monkeypatch):
    """`--triton-s-ptxas`: launches are assembled as on the H200 that faulted."""
    from mvit_kernels.backends.triton import _launch

    monkeypatch.setattr(_launch.assembler, "sound", _launch.assembler.sound)
    monkeypatch.setattr(_launch.assembler, "_is_sound", lambda tool: tool != "old")
    monkeypatch.setattr(_launch.assembler, "_tool", lambda name: "old")
    part("fault").use_triton_s_ptxas()
    with _launch.assembler.sound(90) as options:
        assert options == {}


@pytest.mark.parametrize(
    ("said", "kernel"),
    [
        ("#0  0x7fff1 in _mlp<<<(64,1,1),(128,1,1)>>> ()\n#1  0x0 in x ()", "_mlp"),
        ("#0  0x7f in mvit::row_kernel<mvit::Half, 1><<<(2,1,1),(3,1,1)>>> ()", "mvit::row_kernel<mvit::Half, 1>"),
        ("#0  _forward<<<(1,1,1),(64,1,1)>>> () at _forward.py:12", "_forward"),
        ("  Kernel Parent Dev Grid Status\n*      0      -   0    9 Active 0x1 (1,1,1) (2,1,1) _mlp(int*)", "_mlp"),
        ("no stack", ""),
    ],
)  # fmt: skip
def test_the_kernel_in_a_core_dump(part, said, kernel):
    assert part("faults").kernel_of(said) == kernel


# --- the other processes


def test_shares_of_the_warm_up_are_all_of_it(part):
    warm = part("warm")
    everything = list(warm.units(["s", "xxs"], list(warm.DTYPES), "triton", networks=False))
    assert {unit.operator for unit in everything} == set(backends.operators("triton"))
    assert len(everything) == len(set(everything)) == 3 * 6 * len(backends.operators("triton"))
    assert {unit.dtype for unit in everything[: len(everything) // 3]} == {"bfloat16"}
    more = [unit for unit in warm.units(["s", "xxs"], list(warm.DTYPES), "triton") if unit not in everything]
    assert len(more) == len({unit.name for unit in more}) == 2 * 2 * 3  # networks, 16-bit dtypes, batches
    warm.compile_network(more[-1]._replace(batch=1, size=32), "cpu")


def test_a_unit_that_fails_does_not_end_the_warm_up(part, capsys, monkeypatch):
    warm, compiled = part("warm"), []
    compile_unit = warm.compile_unit

    def sometimes(unit, *rest):
        if unit.stage.index == 4:
            raise RuntimeError("out of resources")
        compile_unit(unit, *rest)
        compiled.append(unit.name)

    monkeypatch.setattr(warm, "compile_unit", sometimes)
    usual = ["0", "4", "--only-training-of", "xxs", "--dtypes", "float32", "--size", "32", "--backend", "reference"]
    assert warm.main(usual) == 0
    lines = printed(capsys)
    done = [line for line in lines if "seconds" in line]
    failed = [line for line in done if "error" in line]
    assert len(done) == -(-len(list(warm.units(["xxs"], ["float32"], "reference"))) // 4)  # a quarter of them
    assert failed and all("xxs/4" in line["unit"] and "out of resources" in line["error"] for line in failed)
    assert len(compiled) == len(done) - len(failed) > 0 and sum("begun" in line for line in lines) == len(done)
    assert warm.main([*usual, "--skip", str(len(done) - 1)]) == 0
    assert [line["index"] for line in printed(capsys)] == 2 * [len(done) - 1]


def test_networks_are_verified(part, capsys, monkeypatch):
    verified = part("verified")
    assert verified.main(["own/xxs", "float32", "64"]) == 0
    assert [(line["form"], line["ok"]) for line in printed(capsys)] == [
        *(("accelerated", True), ("frozen", True), ("gradients", True))
    ]
    wrong = type("Report", (), {"ok": False, "__str__": lambda self: "output: 1 for 2"})()
    monkeypatch.setattr(verified.mvit_kernels, "verify", lambda *arguments, **options: wrong)
    assert verified.main(["own/xxs", "bfloat16", "64"]) == 1
    assert "TOO LARGE: own/xxs bfloat16 frozen\noutput: 1 for 2" in capsys.readouterr().out


def test_one_call_of_each_kernel(part, capsys):
    if why := backends.unavailable("cpu", "cpu"):
        pytest.skip(why[0])
    assert part("one_call").main(["--batch", "1", "--size", "32"]) == 0
    names = [line["name"] for line in printed(capsys)]
    assert "cpu transformer s/5" in names and len(names) == len(set(names)) > 15


def test_other_networks_are_timed(part, capsys):
    pytest.importorskip("timm")
    arguments = ["--models", "test_efficientnet", "--batch", "1", "--calls", "1", "--no-compile"]
    assert part("rivals").main(arguments) == 0
    (line,) = printed(capsys)
    assert line["images_per_s"] > 0 and line["model"] == "test_efficientnet"


def test_the_machine_is_described(part, capsys):
    assert part("facts").main() == 0
    (facts,) = printed(capsys)
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu") and facts["torch"] == torch.__version__
    for name, operators in facts["backends"].items():
        assert operators == sorted(backends.operators(name)) and not facts["why"][name]


# --- predictions, and the files


def test_predictions_stand_beside_what_an_h200_measured(part):
    """The column "before" is that of the committed rows; and every prediction asks for a row that can exist."""
    predictions = part("predictions")
    folder = ROOT / "benchmarks" / "results" / "nvidia-h200"
    found = [(one, predictions.measured(folder, one)) for one in predictions.PREDICTED]
    known = [(one, value) for one, value in found if value is not None]
    assert len(known) >= 18
    for one, value in known:
        assert one.before == pytest.approx(value, rel=2e-3), one.label
    for one in predictions.PREDICTED:
        assert set(one.row) <= set(results.COLUMNS) and one.file in ("operators.csv", "models.csv", "training.csv")
    table = predictions.table(folder)
    assert len(table) == 1 + len(known)
    stack = next(line for line in table if line.startswith("stack s/3 b256, one launch"))
    assert stack.split()[-4:] == ["1610.0", "1008.0", "1.60", "1610.0"]
    assert predictions.table(ROOT / "benchmarks") == []


def test_a_log_stays_small_enough_to_come_back(part, monkeypatch, tmp_path):
    runner = part("runner")
    monkeypatch.setattr(runner, "MOST_LOGGED", 2000)
    run = runner.Runner(tmp_path, 1)
    job = runner.Job("much", [sys.executable, "-S", "-c", "for i in range(1000): print('x' * 30)"])
    ended = run.run([job, runner.Job("none", ["/nowhere/at/all"])], 30, at_once=2)
    log = (tmp_path / "log.txt").read_text()
    assert len(log.encode()) < 2200 and log.endswith("the rest is left out\n")
    assert ended["much"].code == 0 and len(ended["much"].lines) == 1000
    assert ended["none"].code == 127 and "No such file" in ended["none"].lines[0]


def test_only_eight_files_come_back(part, tmp_path):
    main, runner = part("main"), part("runner")
    run = runner.Runner(tmp_path, 1)
    for name in ("operators.csv", "models.csv", "training.csv", "blocks.csv", "compiled.csv"):
        (tmp_path / name).write_text("a\n1\n")
    (tmp_path / "fault.core").write_text("dump")
    main.finish(run)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("report.txt", "log.txt", "lines.jsonl", "compiled.csv"),
        *("operators.csv", "models.csv", "training.csv", "blocks.csv"),
    }
    assert "fault.core: deleted, since 8 files of 16 MiB come back" in (tmp_path / "report.txt").read_text()


def test_a_step_with_a_defect_is_not_the_end(part, tmp_path, monkeypatch):
    main = part("main")
    machine = part("machine").Machine(part("runner").Runner(tmp_path, 1), "python")
    machine.facts = {"device": "cuda", "backends": {}, "why": {}}
    monkeypatch.setattr(machine, "ask", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda: None)
    ran = []
    monkeypatch.setitem(main.STEPS, "speed", main.Step(lambda *given: 1 / 0, 1))
    monkeypatch.setitem(main.STEPS, "counters", main.Step(lambda machine, seconds: ran.append(seconds), 1))
    main.run(machine, ["speed", "counters"])
    assert "speed: FAILED: ZeroDivisionError" in (tmp_path / "report.txt").read_text() and machine.runner.bad
    assert ran and ran[0] > 50  # the time that the first left


@pytest.mark.parametrize("has_nvcc", [True, False])
def test_without_a_compiler_the_cuda_library_is_not_wanted(part, tmp_path, monkeypatch, has_nvcc):
    """It is said that its kernels are not tested; the run fails only where it could have been built."""
    module, monkeys = part("machine"), monkeypatch
    monkeys.delenv("MVIT_KERNELS_LIBRARIES", raising=False)
    monkeys.setattr(module, "nvcc", lambda: "/cuda/bin/nvcc" if has_nvcc else None)
    machine = module.Machine(part("runner").Runner(tmp_path, 1), "/nowhere/python")
    machine.facts = {"device": "cuda", "capability": "9.0", "backends": {}, "library_folder": str(tmp_path)}
    machine.facts |= {"why": {"cuda": ["not built"]}, "libraries": {"cuda": "not built"}}
    machine.library(20)
    part("steps").missing(machine, "correctness")
    report = (tmp_path / "report.txt").read_text()
    assert "correctness: the CUDA kernels are NOT tested: not built" in report and machine.runner.bad == has_nvcc
    assert ("library, cuda: not wanted" in report) != has_nvcc


def test_a_library_older_than_its_sources_is_built_anew(part, tmp_path, monkeypatch):
    module = part("machine")
    machine = module.Machine(part("runner").Runner(tmp_path, 1), sys.executable)

    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)

    first = git("rev-list", "--max-parents=0", "HEAD").stdout
    if git("diff", "--quiet", "HEAD", "--", "csrc").returncode or not git("diff", "--quiet", first[:12]).returncode:
        pytest.skip("this is no git checkout, one without a history, or csrc has changes")
    machine.facts = {"library_folder": str(tmp_path)}
    for commit, outdated in ((first.split()[0][:12], True), ("HEAD", False), ("", False)):
        (tmp_path / "build_info.json").write_text(json.dumps({"cuda": {"commit": commit, "time": "2026"}}))
        assert bool(machine._outdated("cuda")) == outdated, commit
