# SPDX-License-Identifier: Apache-2.0
"""The steps on a GPU but for the fault: each takes the machine and its seconds, and notes how it went.

A step never raises because of what a process did; a failure is a line of the report, and the exit code of the run.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import predictions
from machine import ROOT, Machine, tool
from runner import CUT, NOT_BEGUN, Ended, Job

WARM_UP = 10  # processes, of 16 cores
NOTHING_CHOSEN = 5  # pytest's exit code where no test of a file is for a GPU
LOST = 3  # exit code of a warm-up that lost the GPU
TEST_FILES_AT_ONCE, TEST_WORKERS = 3, 4  # 12 processes
# What has never run on a GPU comes first: a run that was cut has it.
OPERATORS = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        *("inverted_residual", "batch_norm_activation", "layer_norm_linear", "patch_attention", "linear_residual"),
        *("layer_norm_mlp", "layer_norm", "transformer_layer", "transformer"),
    )
)
NETWORKS = ("tests/freezing/test_on_a_gpu.py",)
OTHER_TESTS = tuple(f"tests/{name}.py" for name in ("backends/test_gpu", "ops/test_compile", "backends/test_choice"))
SUMMARY = re.compile(r"^[=\s]*\d+ (passed|failed|skipped|error|deselected)|^(FAILED|ERROR) ")
BENCH = ("mvit_kernels", "bench", "--device")
SUITES = {"operators": 45, "models": 35, "training": 10, "blocks": 0}  # and their shares; 0: only if asked for
TRIES = 4  # of a suite: the GPU may be lost in a case, which then has a row and is skipped
S = ("--model", "mobilevit_s", "--dtype", "bfloat16", "--no-memory", "--seconds", "2")
COMPILED = {  # the most valuable first; what may fault last
    "S b256": (*S, "--batch", "256", "--peers", "channels_last,accelerated,frozen,compile_channels_last"),
    "S b64 training step": ("--suite", "training", "--model", "mobilevit_s", "--dtype", "bfloat16", "--batch", "64"),
    "S b1": (*S, "--batch", "1", "--peers", "channels_last,frozen,compile_reduce_overhead"),
    "S b256, ours compiled": (*S, "--batch", "256", "--peers", "frozen,compile_accelerated"),
    "S b64, forward and backward": (*S, "--batch", "64", "--train", "--peers", "accelerated,compile_accelerated"),
    "S b256, max-autotune": (*S, "--batch", "256", "--peers", "frozen,compile_max_autotune"),
}
SMALLEST_SUITE = 85  # seconds of a budget in which a suite begins a case that compiles
COUNTERS = {  # Nsight Compute's name -> ours
    "gpu__time_duration.sum": "ns",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_%",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_%",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared_%",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special_%",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_%",
    "launch__registers_per_thread": "registers",
}


def has(module: str, python: str) -> bool:
    """Whether the steps' interpreter finds a module."""
    if os.path.realpath(python) == os.path.realpath(os.sys.executable):
        return importlib.util.find_spec(module) is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def failures(ended: dict[str, Ended]) -> dict[str, Ended]:
    return {name: end for name, end in ended.items() if end.code}


def in_short(
    machine: Machine, step: str, ended: dict[str, Ended], pattern: str | re.Pattern[str], most: int = 3
) -> None:
    """One line for all jobs, and one for each that failed with what it said."""
    runner, bad = machine.runner, failures(ended)
    runner.note(f"{step}: {len(ended) - len(bad)} of {len(ended)} processes ok")
    for name, end in bad.items():
        runner.note(f"{step}, {name}: {end.how}", bad=end.code not in (CUT, NOT_BEGUN))
        said = [line for line in end.lines if re.search(pattern, line)] or list(end.lines[-1:])
        for line in said[:most]:
            runner.detail(line)


# ------------------------------------------------------------------------------------------------------------ warm-up


def warm(machine: Machine, seconds: float, *arguments: str, **environment: str | None) -> None:
    """Fill Triton's cache from several processes; one that loses the GPU is begun again behind the unit at fault."""
    runner = machine.runner
    if "triton" not in machine.backends:
        why = "; ".join(machine.facts["why"].get("triton", []))
        return runner.note(f"warm-up: Triton cannot be used: {why}", bad=True)
    shares = {f"warm {i}": machine.script("warm", str(i), str(WARM_UP), *arguments) for i in range(WARM_UP)}
    jobs = dict(shares)
    before = runner.elapsed
    compiled, cut, broken, begun = 0, 0, [], dict.fromkeys(jobs, 0)
    while jobs and seconds - (runner.elapsed - before) >= 5:
        made = [Job(name, command, {**machine.environment, **environment}) for name, command in jobs.items()]
        ended = runner.run(made, seconds - (runner.elapsed - before), WARM_UP)
        again = {}
        cut += sum(end.code in (CUT, NOT_BEGUN) for end in ended.values())
        for name, end in ended.items():
            units = [line for line in end.lines if line.startswith('{"what": "warm"')]
            compiled += sum('"seconds"' in line and '"error"' not in line for line in units)
            broken += [line for line in units if '"error"' in line]
            begun[name] += sum('"begun"' in line for line in units)
            if end.code not in (0, CUT, NOT_BEGUN) and units:  # one unit is at fault; the next ones are not
                if end.code != LOST:
                    broken.append(f"{units[-1]}: the process ended with {end.code}")
                again[name] = [*shares[name], "--skip", str(begun[name])]
            elif end.code not in (0, CUT, NOT_BEGUN):
                runner.note(f"{name}: {end.how}", bad=True)
                for line in end.lines[-2:]:
                    runner.detail(line)
        jobs = again
    cache = Path(environment.get("TRITON_CACHE_DIR") or os.environ["TRITON_CACHE_DIR"]).name
    text = f"warm-up of {cache}: {compiled} units in {runner.elapsed - before:.0f} s; {len(broken)} with an error"
    runner.note(text + (f"; {cut} processes were cut" if cut else ""), bad=bool(broken))
    for line in broken[:5]:
        runner.detail(line)
    return None


# -------------------------------------------------------------------------------------------------------- correctness


def correctness(machine: Machine, seconds: float) -> None:
    """Every kernel against float64 on small shapes: a process for each backend and operator."""
    missing(machine, "correctness")
    jobs = [
        Job(
            f"{backend} {operator}",
            machine.module("gates.every_kernel", backend, "--only", operator),
            machine.environment,
        )
        for backend, operators in machine.backends.items()
        for operator in operators
    ]
    at_once = 8 if machine.device == "cuda" else max(1, (os.cpu_count() or 2) // 2)
    in_short(machine, "correctness", machine.runner.run(jobs, seconds, at_once), "WRONG|Error|refused")


def missing(machine: Machine, step: str) -> None:
    """Say what a step does not test for want of the CUDA library; a failure where it was wanted."""
    if why := machine.without_library():
        machine.runner.note(f"{step}: the CUDA kernels are NOT tested: {why}", bad=machine.wants_cuda())


def tests(machine: Machine, seconds: float) -> None:
    """The operators' own tests on the GPU: a run of pytest for each file, in 12 processes together."""
    missing(machine, "tests")
    parallel = ["-n", str(TEST_WORKERS)] if has("xdist", machine.python) else []
    at_once = TEST_FILES_AT_ONCE if parallel else TEST_FILES_AT_ONCE * TEST_WORKERS
    usual = ["-v", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20", *parallel]
    files = {
        file: ["-k", "cuda or triton"] if file in OPERATORS else [] for file in (*NETWORKS, *OPERATORS, *OTHER_TESTS)
    }
    jobs = [
        Job(Path(file).stem, machine.module("pytest", *usual, file, *more), machine.environment)
        for file, more in files.items()
        if (ROOT / file).exists()
    ]
    ended = machine.runner.run(jobs, seconds, at_once)
    ended = {name: end._replace(code=0) if end.code == NOTHING_CHOSEN else end for name, end in ended.items()}
    in_short(machine, "tests", ended, SUMMARY, 12)
    passed = sum(line.count(" PASSED ") + line.endswith(" PASSED") for end in ended.values() for line in end.lines)
    machine.runner.note(f"tests: {passed} passed")


def verify(machine: Machine, seconds: float) -> None:
    """`verify` of whole networks: a process for each and dtype."""
    jobs = [
        Job(f"{name} {dtype}", machine.script("verified", name, dtype), machine.environment)
        for name in ("own/s", "own/xxs")
        for dtype in ("bfloat16", "float32", "float16")
    ]
    in_short(machine, "verify", machine.runner.run(jobs, seconds, 6), "TOO LARGE|Error")


# -------------------------------------------------------------------------------------------------------------- speed


def speed(machine: Machine, seconds: float) -> None:
    """The suites, one after another: a GPU that measures does nothing else."""
    asked = os.environ.get("SUITES", "").split()
    usual = SUITES if machine.device == "cuda" else {"operators": 40, "models": 60}
    chosen = {name: share or 10 for name, share in usual.items() if (name in asked if asked else share)}
    for name in asked:
        if name not in usual:
            machine.runner.note(f"speed, {name}: there is no such suite; choose from {' '.join(usual)}", bad=True)
    end = machine.runner.elapsed + seconds
    for index, name in enumerate(chosen):
        rest = end - machine.runner.elapsed
        _suite(machine, name, rest * chosen[name] / sum(list(chosen.values())[index:]))
    show_predictions(machine)


def _suite(machine: Machine, name: str, seconds: float) -> None:
    end = machine.runner.elapsed + seconds
    for _ in range(TRIES):
        rest = end - machine.runner.elapsed
        if rest < 25:  # the first case of networks is not begun with less than 20 s
            return machine.runner.note(f"speed, {name}: skipped, the budget is spent")
        minutes = f"{rest / 60:.3f}"
        command = [*BENCH, machine.device, "--suite", name, "--budget", minutes, "--resume"]
        command += ["--results", str(machine.runner.folder)]
        done = machine.runner.step(f"speed, {name}", machine.module(*command), rest + 20, **machine.environment)
        if done.code != 2:  # 2: an error such as a lost GPU; the case at fault has a row, and is skipped now
            return None
        for line in done.lines[-1:]:
            machine.runner.detail(line)
    return None


def compiled(machine: Machine, seconds: float) -> None:
    """Beside `torch.compile`, each table in a process of its own; rows of `--model` are in ``compiled.csv``."""
    end = machine.runner.elapsed + seconds
    for index, (name, arguments) in enumerate(COMPILED.items()):
        rest = end - machine.runner.elapsed
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, f"{index}.csv")
            if "--suite" in arguments:  # its table with torch.compile; --resume leaves out that without
                how = ["--results", str(machine.runner.folder), "--resume"]
                how += ["--budget", f"{max(rest, SMALLEST_SUITE) / 60:.3f}"]
            else:
                how = ["--build-seconds", f"{max(rest, 10):.0f}", "--output", str(rows)]
            command = [*BENCH, machine.device, *arguments, *how]
            done = machine.runner.step(f"compiled, {name}", machine.module(*command), rest, **machine.environment)
            for line in done.lines[-1:] if done.code else ():
                machine.runner.detail(line)
            _append(rows, machine.runner.folder / "compiled.csv")
    done = machine.runner.step("compiled, other networks", machine.script("rivals"), end - machine.runner.elapsed)
    for line in done.lines[-2:]:
        machine.runner.detail(line)
    show_predictions(machine)


def _append(rows: Path, to: Path) -> None:
    """The lines of a file behind those of another with the same head."""
    if rows.exists() and (text := rows.read_text(encoding="utf-8")):
        head, _, body = text.partition("\n")
        with to.open("a", encoding="utf-8") as file:
            file.write(text if file.tell() == 0 else body)


def show_predictions(machine: Machine) -> None:
    for line in predictions.table(machine.runner.folder) if machine.device == "cuda" else ():
        machine.runner.detail(line)


# --------------------------------------------------------------------------------------------------- inside the kernels


def counters(machine: Machine, seconds: float) -> None:
    """What Nsight Compute counts in one call of each kernel, as lines of JSON."""
    ncu = tool("ncu")
    if not ncu:
        return machine.runner.note("counters: there is no ncu here")
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(COUNTERS), *machine.script("one_call")]
    done = machine.runner.step("counters", command, seconds, **machine.environment)
    found = list(counted(done.lines))
    for line in found:
        machine.runner.line(what="counters", **line)
    machine.runner.note(f"counters: {len(found)} kernels", bad=not found and done.code not in (CUT, NOT_BEGUN))
    return None


def counted(lines: Iterable[str]) -> Iterable[dict[str, str]]:
    """The kernels in Nsight Compute's table, with our names of what is counted."""
    table = [line for line in lines if line.startswith('"')]
    for row in csv.DictReader(table):
        if row.get("Kernel Name") and row.get("ID"):  # below the head stands a line of units
            yield {"kernel": row["Kernel Name"]} | {mine: row[name] for name, mine in COUNTERS.items() if row.get(name)}


def sanitizer(machine: Machine, seconds: float) -> None:
    """memcheck and racecheck over every kernel once."""
    program = tool("compute-sanitizer")
    if not program:
        return machine.runner.note("sanitizer: there is no compute-sanitizer here")
    for index, kind in enumerate(("memcheck", "racecheck")):
        rest = seconds / 2 if not index else machine.runner.left
        command = [program, "--tool", kind, "--error-exitcode", "9", *machine.module("gates.every_kernel", "--run")]
        environment = {**machine.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = machine.runner.step(f"sanitizer, {kind}", command, min(rest, seconds / 2), **environment)
        for line in [x for x in done.lines if re.search("ERROR SUMMARY|RACECHECK SUMMARY|={9} (Invalid|Error)", x)][:6]:
            machine.runner.detail(line)
    return None
