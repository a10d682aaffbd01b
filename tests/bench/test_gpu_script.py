# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.sh from end to end without a GPU: with a Python and tools that only say what a GPU's would.

What each of its processes does is tested in test_gpu_processes.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from support import ROOT

GPU = {
    **{"what": "machine", "device": "cuda", "name": "a GPU", "capability": "9.0", "driver": "1", "python": "3.12"},
    **{"multiprocessors": 132, "l2_mib": 60, "gib": 139, "torch": "2.11", "cuda": "13.0", "triton": "3.6.0"},
    "backends": {"cuda": ["linear_residual"], "triton": ["linear_residual", "patch_attention"]},
    **{"why": {"cuda": [], "triton": []}, "libraries": {"cuda": "", "cpu": ""}, "library_folder": "/nowhere"},
}
BROKEN = "its library does not load: undefined symbol"
WITHOUT_CUDA = GPU | {
    "backends": {"triton": ["linear_residual"]},
    "why": {"cuda": [BROKEN], "triton": []},
    "libraries": {"cuda": BROKEN, "cpu": ""},
}
CPU = {
    **{
        "what": "machine",
        "device": "cpu",
        "python": "3.12",
        "torch": "2.11",
        "triton": "",
        "library_folder": "/nowhere",
    },
    **{"backends": {"cpu": ["linear_residual"]}, "why": {"cpu": []}, "libraries": {"cuda": BROKEN, "cpu": ""}},
}
TOOLS = {
    "nvcc": "exit 1",
    "ptxas": 'echo "Cuda compilation tools, release 13.0, V13.0.88"',
    "compute-sanitizer": 'echo "========= ERROR SUMMARY: 0 errors"',
    "ncu": 'echo \'"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\'\n'
    'echo \'"","","ns","register/thread"\'\necho \'"0","_mlp","480","102"\'',
    "cuda-gdb": 'echo "#0  0x00007fff5f0a in mvit::row_product_kernel<mvit::BFloat16, 1><<<(2048,1,1),(128,1,1)>>> ()"',
}


@pytest.fixture
def machine(tmp_path):
    """Run the script with a fake Python: `cases` of a shell's `case` on its arguments, before the usual ones."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "out").mkdir()

    def program(name, text):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)

    def start(cases="", minutes="9", facts=GPU, missing=(), **environment):
        (tmp_path / "facts.json").write_text(json.dumps(facts) + "\n")
        for name, text in TOOLS.items():
            if name not in missing:
                program(name, text)
        program(
            "python",
            f"""T={tmp_path}
case "$*" in
  *gpu_run/main.py*) exec {sys.executable} -S "$@" ;;
{cases}
  *gpu_run/facts.py*) cat $T/facts.json ;;
  *gpu_run/warm.py*) echo '{{"what": "warm", "begun": true}}'; echo '{{"what": "warm", "seconds": 1}}' ;;
  *gpu_run/fault.py*) echo '{{"what": "provoked", "faulted": false, "value": [7]}}' ;;
  *pytest*) echo "tests/a.py::test_b PASSED"; echo "1 passed in 1.00s" ;;
  *gates.every_kernel*) echo "1 calls" ;;
esac""",
        )
        path = f"{tools}:/usr/bin:/bin"
        usual = {"PATH": path, "PYTHON": str(tools / "python"), "HOME": str(tmp_path), "CUDA_HOME": str(tools)}
        usual |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "ROUNDS": "1"}
        return subprocess.Popen(
            [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), minutes],
            env=usual | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(*arguments, **options):
        process = start(*arguments, **options)
        printed, _ = process.communicate(timeout=110)
        text = (tmp_path / "out" / "report.txt").read_text()
        assert text in printed or not text, printed
        return process.returncode, [re.sub(r"^ *\d+ s  | (after|in) \d+ s", "", one) for one in text.splitlines()]

    run.start, run.out, run.folder = start, tmp_path / "out", tmp_path
    return run


def lines_of(machine):
    return [json.loads(one) for one in (machine.out / "lines.jsonl").read_text().splitlines()]


def has(report, *wanted):
    """The wanted lines are in the report, in this order."""
    at = 0
    for one in wanted:
        assert one in report[at:], f"{one!r} is not in, or not at its place:\n" + "\n".join(report)
        at = report.index(one, at)


def test_everything_that_succeeds(machine):
    """Its order; at most eight files; the exit code."""
    code, report = machine(SUITES="operators blocks")
    has(
        report,
        "the machine: ok",
        "        Python 3.12, torch 2.11, CUDA 13.0, Triton 3.6.0",
        "        a GPU, 9.0, driver 1, 132 multiprocessors, 60 MiB of L2, 139 GiB",
        "library, cuda: /nowhere, of commit None, built None",
        "warm-up of cache: 10 units; 0 with an error",
        "warm-up of cache-own: 10 units; 0 with an error",
        "warm-up of cache-ptxas: 10 units; 0 with an error",
        "fault, as_is: faulted 0 of 2",
        "fault, unmended: faulted 0 of 2",
        "fault, dump: faulted 0 of 2",
        "correctness: 3 of 3 processes ok",
        "verify: 6 of 6 processes ok",
        "tests: 13 of 13 processes ok",
        "tests: 13 passed",
        "speed, operators: ok",
        "speed, blocks: ok",
        "compiled, S b256: ok",
        "counters: 1 kernels",
        "sanitizer, memcheck: ok",
        "        ========= ERROR SUMMARY: 0 errors",
        "sanitizer, racecheck: ok",
        "done; bad: 0",
    )
    assert code == 0 and len(list(machine.out.iterdir())) <= 8
    found = lines_of(machine)
    assert {"kernel": "_mlp", "ns": "480", "registers": "102"}.items() <= next(
        one for one in found if one["what"] == "counters"
    ).items()
    assert sum(one["what"] == "fault" for one in found) == 2 * 6


def test_everything_that_fails(machine):
    """Each failure is said, makes the exit code 1, and hides nothing behind it."""
    code, report = machine(
        """  *"warm.py 3 10 --skip 1"*) echo '{"what": "warm", "begun": true}'; echo '{"what": "warm", "seconds": 1}' ;;
  *"warm.py 3 10") echo '{"what": "warm", "begun": true}'; echo '{"what": "warm", "error": "lost"}'; exit 3 ;;
  *"fault.py train"*) [ -z "$CUDA_COREDUMP_FILE" ] || { echo dump >"$CUDA_COREDUMP_FILE"; kill -9 $$; }
    [ -n "$DISABLE_MMA_V3$CUDA_LAUNCH_BLOCKING" ] && exit 0
    echo '{"what": "provoked", "faulted": true, "error": "an illegal memory access"}'; exit 3 ;;
  *"fault.py stack"*) [ "${TRITON_CACHE_DIR##*-}" != ptxas ] || { echo "no module named x"; exit 1; } ;;
  *"every_kernel cuda --only linear_residual"*) echo "cuda linear_residual: WRONG: 1 for 2"; exit 1 ;;
  *"verified.py own/s float16"*) kill -SEGV $$ ;;
  *pytest*test_layer_norm_mlp*) echo "FAILED tests/x.py::test_y - Error"; echo "= 1 failed, 2 passed in 3s ="; exit 1 ;;
  *pytest*test_gpu*) exit 5 ;;
  *"--suite operators"*) [ -e $T/lost ] || { touch $T/lost; echo "the GPU was lost"; exit 2; } ;;
  *"--suite models"*) exit 1 ;;
  *--output*) for f; do :; done; printf 'a,b\\n1,2\\n' >"$f" ;;
  *rivals.py*) echo '{"what": "rival"}' ;;
""",
        SUITES="operators models nonsense",
    )
    has(
        report,
        "warm-up of cache: 10 units; 1 with an error",
        '        {"what": "warm", "error": "lost"}',
        "fault, as_is: faulted 1 of 2",
        "fault, unmended: faulted 1 of 2",
        "fault, dump: faulted 1 of 2, in mvit::row_product_kernel<mvit::BFloat16, 1>",
        "fault, synchronised: faulted 0 of 2",
        "fault, ptxas: faulted 1 of 1; 1 did not run: FAILED with 1",
        "fault, no_wgmma: faulted 0 of 2",
        "correctness: 2 of 3 processes ok",
        "correctness, cuda linear_residual: FAILED with 1",
        "        cuda linear_residual: WRONG: 1 for 2",
        "verify, own/s float16: FAILED with -11",
        "tests: 12 of 13 processes ok",
        "tests, test_layer_norm_mlp: FAILED with 1",
        "        FAILED tests/x.py::test_y - Error",
        "        = 1 failed, 2 passed in 3s =",
        "speed, nonsense: there is no such suite; choose from operators models training blocks",
        "speed, operators: FAILED with 2",
        "        the GPU was lost",
        "speed, operators: ok",
        "speed, models: FAILED with 1",
        "compiled.csv: 5 rows",
        "done; bad: 1",
    )
    assert code == 1
    assert (machine.out / "compiled.csv").read_text() == "a,b\n" + 5 * "1,2\n"
    assert not list(machine.out.glob("*.core"))  # cuda-gdb has read it


def test_a_dump_is_kept_where_nothing_reads_it(machine):
    case = '  *"fault.py train"*) [ -z "$CUDA_COREDUMP_FILE" ] || { echo dump >"$CUDA_COREDUMP_FILE"; exit 3; } ;;\n'
    code, report = machine(case, missing=("cuda-gdb",), STEPS="fault")
    assert code == 1 and (machine.out / "fault.core").read_text() == "dump\n"
    assert "fault, dump: faulted 1 of 2" in report
    assert next(one for one in lines_of(machine) if one.get("dump"))["dump"] == "5 bytes; there is no cuda-gdb here"


def test_each_condition_reaches_its_processes(machine):
    """The other assemblers, each with a cache of its own: what the processes are given."""
    case = """  *fault.py*) echo "$TRITON_PTXAS_PATH|${TRITON_CACHE_DIR##*/}|$DISABLE_MMA_V3|$*" >>$T/given ;;
"""
    machine(case, STEPS="fault")
    given = (machine.folder / "given").read_text().splitlines()
    ptxas = str(machine.folder / "tools" / "ptxas")
    script = str(ROOT / "benchmarks" / "gpu_run" / "fault.py")
    for one in (
        f"|cache|| {script} train",
        f"|cache-own|| {script} train --triton-s-ptxas",
        f"{ptxas}|cache-ptxas|| {script} train --triton-s-ptxas",
        f"|cache-v2|1| {script} stack --triton-s-ptxas",
    ):
        assert one.replace("| /", "|/") in given, given
    assert len(given) == 2 * 6 + 2 * 4  # the rounds, and what fills each of four caches


@pytest.mark.parametrize("how", ["given", "built", "built without it", "neither"])
def test_a_library_that_was_wanted(machine, how):
    """One that neither loads nor can be built fails the run, in which Python alone would be tested."""
    build = "  *build_native*) echo 'nvcc: no such header'; exit 7 ;;\n"
    if how == "built":
        build = f"  *build_native*) echo '{json.dumps(GPU)}' >$T/facts.json ;;\n"
    if how == "built without it":
        build = "  *build_native*) ;;\n"
    environment = {}
    if how == "given":
        (machine.folder / "libmvit_kernels_cuda.so").touch()
        environment = {"MVIT_KERNELS_LIBRARIES": str(machine.folder)}
    steps = "library" if how == "built without it" else "library correctness"
    code, report = machine(build, facts=WITHOUT_CUDA, STEPS=steps, **environment)
    if how == "built":
        has(report, "build: ok", "library, cuda: /nowhere, of commit None, built None", "done; bad: 0")
        assert code == 0 and not any("NOT tested" in one for one in report)
        return
    if how == "given":
        assert f"library, cuda: FAILED: {machine.folder} has it, and {BROKEN}" in report
    if how == "built without it":
        has(report, "build: ok", f"library, cuda: FAILED: {BROKEN}", "done; bad: 1")
        assert code == 1
        return
    has(report, "build: FAILED with 7", "        nvcc: no such header", f"library, cuda: FAILED: {BROKEN}")
    has(report, f"correctness: the CUDA kernels are NOT tested: {BROKEN}", "correctness: 1 of 1 processes ok")
    assert code == 1 and report[-1] == "done; bad: 1"


def test_a_wanted_library_fails_the_run_though_nothing_builds_it(machine):
    code, report = machine(facts=WITHOUT_CUDA, STEPS="correctness")
    assert code == 1 and f"correctness: the CUDA kernels are NOT tested: {BROKEN}" in report


def test_without_a_gpu(machine):
    """It says so and runs the CPU's part."""
    code, report = machine('  *--suite*) echo "$*" >>$T/suites ;;\n', facts=CPU)
    has(
        report,
        "no GPU is visible to torch: only the CPU part runs",
        "library, cpu: /nowhere, of commit None, built None",
        "correctness: 1 of 1 processes ok",
        "speed, operators: ok",
        "speed, models: ok",
        "done; bad: 0",
    )
    assert code == 0 and not any(one.startswith(("fault", "warm", "tests", "compiled")) for one in report)
    assert "--device cpu --suite operators" in (machine.folder / "suites").read_text()


def test_without_torch(machine):
    code, report = machine("  *facts.py*) echo \"No module named 'torch'\"; exit 1 ;;\n")
    has(report, "the machine: FAILED with 1", "        No module named 'torch'", "done; bad: 1")
    assert code == 2 and report[-2].startswith("nothing can be done")


def test_what_was_not_tried_is_not_said_to_be_right(machine):
    """Where the first condition takes all the time, the others have told nothing."""
    case = """  *fault.py*) [ -z "$CUDA_LAUNCH_BLOCKING" ] || exit 0; trap 'exit 1' INT; sleep 60 >/dev/null & wait ;;
"""
    code, report = machine(case, minutes="0.21", STEPS="fault")
    assert [one for one in report if one.startswith("fault, ") and "tools" not in one] == [
        f"fault, {name}: NOT tried" for name in ("as_is", "unmended", "dump", "synchronised", "ptxas", "no_wgmma")
    ]
    assert "fault: skipped, the budget is spent" in report and not any(
        one["what"] == "fault" for one in lines_of(machine)
    )


def test_unknown_steps(machine):
    process = machine.start(STEPS="speed nonsense")
    assert "STEPS: there is no nonsense; choose from library warm fault" in process.communicate()[0]
    assert process.returncode == 2


def test_the_head_of_the_script_names_every_step(part):
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert re.findall(r"^#  {20,}(\w+)  ", text, re.MULTILINE) == list(part("main").STEPS)
    for call in re.findall(r'STEPS="([^"]+)"', text):
        assert part("main").chosen(call) == (call.split(), [])
    assert len(part("faults").VARIANTS) == 6 and "under six conditions" in text


def test_a_cut_by_time_keeps_what_was_there(machine):
    """A process past its time is asked to end and tells what it has; the next step has its own time."""
    case = """  *gates.every_kernel*triton*) trap 'echo "so far: 3"; exit 1' INT; echo '{"what": "check", "n": 1}'
    sleep 30 & wait ;;
"""
    code, report = machine(case, minutes="0.2", STEPS="correctness verify")
    has(report, "correctness: 1 of 3 processes ok", "        so far: 3", "verify: 6 of 6 processes ok", "done; bad: 0")
    assert any(re.match("correctness, triton linear_residual: cut", one) for one in report) and code == 0
    assert any(one["what"] == "check" for one in lines_of(machine))
    assert "[triton linear_residual] so far: 3" in (machine.out / "log.txt").read_text()


def test_no_time_at_all(machine):
    code, report = machine(minutes="0.05", STEPS="correctness speed")
    has(report, "the machine: not begun, the budget is spent", "done; bad: 1")
    assert code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cut_from_outside_keeps_what_was_there(machine, number):
    """And ends what was running, unless it was killed itself."""
    case = '  *gates.every_kernel*) echo $$ >>$T/pid; echo \'{"what": "check"}\'; exec sleep 60 ;;\n'
    process = machine.start(case, STEPS="correctness speed")
    log = machine.out / "log.txt"
    for _ in range(200):
        if log.exists() and log.read_text().count("check") == 3:
            break
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    children = [int(one) for one in (machine.folder / "pid").read_text().split()]
    report = (machine.out / "report.txt").read_text()
    assert "the machine: ok" in report and any(one["what"] == "check" for one in lines_of(machine))
    if number == signal.SIGTERM:
        assert "cut from outside by SIGTERM" in report and report.endswith("done; bad: 1\n")
        assert process.returncode == 1
        assert not [one for one in children if os.path.exists(f"/proc/{one}")]
    else:
        for child in children:
            os.kill(child, signal.SIGKILL)
