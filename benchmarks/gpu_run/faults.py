# SPDX-License-Identifier: Apache-2.0
"""The step ``fault``: provoke the illegal memory access again and again, under each condition of `VARIANTS`.

Processes run a few at a time, round by round, so that after a cut every condition was tried as often. Each leaves a
line of JSON, ``{"what": "fault", "variant": "ptxas", "workload": "train", "faulted": false, …}``, with the kernel where
a core dump names it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from machine import Machine, nvcc, tool
from runner import CUT, NOT_BEGUN, Ended, Job
from steps import warm

ROUNDS, AT_ONCE = 4, 4
FAULTED = 3  # fault.py's exit code
WORKLOADS = ("train", "stack")
EACH = 90.0  # seconds a process may take
MOST_READ = 2  # core dumps that cuda-gdb reads, each in up to `GDB` seconds: they would say the same
GDB = 30.0
MOST_KEPT = 15 * 2**20  # bytes of a core dump that is kept where no cuda-gdb reads it


class Variant(NamedTuple):
    """A condition: what it changes, and what it would tell."""

    tells: str
    environment: dict[str, str] = {}
    arguments: tuple[str, ...] = ()
    cache: str = ""  # its own cache of compiled kernels, for what the compiler makes differently


UNMENDED = ("--triton-s-ptxas",)
VARIANTS = {
    "as_is": Variant("whether it still comes, with the assembler that is used now"),
    "unmended": Variant("whether it comes at all, with the one that Triton itself uses", {}, UNMENDED, "own"),
    "dump": Variant(
        "which kernel that is, by a core dump",
        {"CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1", "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP": "1"},
        UNMENDED,
        "own",
    ),
    "synchronised": Variant("a control: it was never seen so", {"CUDA_LAUNCH_BLOCKING": "1"}, UNMENDED, "own"),
    "ptxas": Variant("whether nvcc's ptxas is right as well", {}, UNMENDED, "ptxas"),
    "no_wgmma": Variant("whether it is wgmma: mma.sync instead", {"DISABLE_MMA_V3": "1"}, UNMENDED, "v2"),
}


def fault(machine: Machine, seconds: float) -> None:
    """Cache by cache: warm it up, then rounds of the conditions that use it; the report has a line a condition."""
    runner = machine.runner
    if "triton" not in machine.backends:
        return runner.note("fault: Triton cannot be used here")
    end = runner.elapsed + seconds
    variants = _variants(machine)
    caches: dict[str, list[str]] = {}
    for name, one in variants.items():
        caches.setdefault(one["cache"], []).append(name)
    tried: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        for index, names in enumerate(caches.values()):
            # Half for the first, which tells whether the fault is gone, and half of the rest for the next.
            rest = (end - runner.elapsed) / (1 if index == len(caches) - 1 else 2)
            _fill(machine, variants[names[0]], 0.4 * rest)
            turns = range(int(os.environ.get("ROUNDS", ROUNDS)))
            jobs = [
                _job(machine, name, variants[name], workload, turn, folder)
                for turn in turns
                for name in names
                for workload in WORKLOADS
            ]

            def ended(job: Job, done: Ended) -> None:
                if line := _line(machine, job, done):
                    runner.line(**line)
                    tried.append(line)

            runner.run(jobs, min(rest, end - runner.elapsed), AT_ONCE, ended)
    _report(machine, variants, tried)
    return None


def _fill(machine: Machine, one: dict[str, Any], seconds: float) -> None:
    """Compile what the workloads launch, so that the processes behind this one find all of it on the disk: in parallel
    by operator, then the workloads themselves, with a synchronisation after each launch."""
    end = machine.runner.elapsed + seconds
    environment = {**one["environment"], "TRITON_CACHE_DIR": one["cache"]}
    warm(machine, 0.7 * seconds, "--only-training-of", "s", "--dtypes", "bfloat16", *one["arguments"], **environment)
    environment = {**machine.environment, **environment, "CUDA_LAUNCH_BLOCKING": "1"}
    name = Path(one["cache"]).name
    filled = [
        Job(f"fill {name} {workload}", machine.script("fault", workload, *one["arguments"]), environment)
        for workload in WORKLOADS
    ]
    machine.runner.run(filled, end - machine.runner.elapsed, AT_ONCE)


def _job(machine: Machine, name: str, one: dict[str, Any], workload: str, turn: int, folder: str) -> Job:
    environment = {**machine.environment, **one["environment"], "TRITON_CACHE_DIR": one["cache"]}
    if "CUDA_ENABLE_COREDUMP_ON_EXCEPTION" in environment:
        environment["CUDA_COREDUMP_FILE"] = str(Path(folder, f"{workload}-{turn}.core"))
    command = machine.script("fault", workload, *one["arguments"])
    return Job(f"{name} {workload} {turn}", command, environment, EACH)


def _line(machine: Machine, job: Job, done: Ended) -> dict[str, Any] | None:
    """What a process found, as a line of JSON; None if it had no time to find anything."""
    name, workload, _ = job.name.split()
    dump = Path(job.environment.get("CUDA_COREDUMP_FILE") or "/nowhere")
    # A process that CUDA ended while it dumped has said nothing, and faulted all the same.
    faulted = done.code == FAULTED or dump.exists()
    if done.code in (CUT, NOT_BEGUN) and not faulted:
        return None
    line: dict[str, Any] = {"what": "fault", "variant": name, "workload": workload, "code": done.code}
    said = [json.loads(text) for text in done.lines if text.startswith('{"what": "provoked"')]
    line |= {"faulted": faulted, **{key: value for key, value in (said or [{}])[-1].items() if key not in line}}
    line["faulted"] = faulted
    if done.code and not faulted:
        line["tried"] = False
        line.setdefault("error", done.how)
    return line | (read_dump(machine, dump) if dump.exists() else {})


def _variants(machine: Machine) -> dict[str, dict[str, Any]]:
    """`VARIANTS` as they can be tried here, with the folder of each one's cache; what cannot is noted."""
    found, base = {}, os.environ["TRITON_CACHE_DIR"]
    for name, (_, environment, arguments, cache) in VARIANTS.items():
        environment = dict(environment)
        if name == "ptxas":
            ptxas = other_ptxas()
            if not ptxas:
                machine.runner.note("fault, ptxas: there is no ptxas of a CUDA toolkit here")
                continue
            environment["TRITON_PTXAS_PATH"] = ptxas
            machine.runner.note(f"fault, ptxas: {ptxas}, {version(ptxas)}; Triton's own: {version(_own(machine))}")
        found[name] = {"environment": environment, "arguments": arguments}
        found[name]["cache"] = f"{base}-{cache}" if cache else base
    return found


def other_ptxas() -> str | None:
    """The assembler beside nvcc."""
    compiler = nvcc()
    beside = Path(os.path.realpath(compiler)).parent / "ptxas" if compiler else None
    return str(beside) if beside and beside.exists() else tool("ptxas")


def _own(machine: Machine) -> str:
    code = "import pathlib, triton; print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/ptxas')"
    done = machine.runner.run([Job("Triton's ptxas", [machine.python, "-c", code], machine.environment)], 30)
    lines = done["Triton's ptxas"].lines
    return lines[-1] if lines else "ptxas"


def version(ptxas: str) -> str:
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (re.findall(r"V[\d.]+", said) or ["unknown"])[-1]


def read_dump(machine: Machine, dump: Path) -> dict[str, str]:
    """The kernel and where in it, by cuda-gdb; without one the first dump that is small is kept."""
    gdb = tool("cuda-gdb")
    if not gdb:
        if dump.stat().st_size <= MOST_KEPT and not list(machine.runner.folder.glob("*.core")):
            shutil.copy(dump, machine.runner.folder / "fault.core")
        return {"dump": f"{dump.stat().st_size} bytes; there is no cuda-gdb here"}
    if machine.runner.dumps_read >= MOST_READ:
        return {"dump": f"{dump.stat().st_size} bytes, not read"}
    machine.runner.dumps_read += 1
    asked = (f"target cudacore {dump}", "info cuda kernels", "bt", "x/4i $pc")
    command = [gdb, "-batch", *(word for one in asked for word in ("-ex", one))]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=min(GDB, max(machine.runner.left, 1.0)), check=False
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"dump": str(error)}
    for line in said.splitlines()[:80]:
        machine.runner.log(f"[cuda-gdb] {line}")
    return {"kernel": kernel_of(said), "dump": " | ".join(said.splitlines()[-8:])[:800]}


def kernel_of(said: str) -> str:
    """The kernel in what cuda-gdb printed: the innermost frame, else the running kernel; "" if it names none."""
    frame = re.search(r"^#0\s+(?:0x[0-9a-f]+ in )?([^\n]+?)\s*(?:<<<|\()", said, re.MULTILINE)
    running = re.search(r"^\*?\s+\d+ .*?([A-Za-z_][\w:]*)\(", said, re.MULTILINE)
    return next((found[1] for found in (frame, running) if found), "")


def _report(machine: Machine, variants: Iterable[str], tried: list[dict[str, Any]]) -> None:
    for name in variants:
        mine = [line for line in tried if line["variant"] == name]
        ran = [line for line in mine if line.get("tried", True)]
        lame = [line for line in mine if line not in ran]
        faulted = [line for line in ran if line["faulted"]]
        kernels = sorted({line["kernel"] for line in faulted if line.get("kernel")})
        text = f"faulted {len(faulted)} of {len(ran)}" if ran else "NOT tried"
        text += f", in {', '.join(kernels)}" if kernels else ""
        text += f"; {len(lame)} did not run: {lame[0]['error']}" if lame else ""
        machine.runner.note(f"fault, {name}: {text}", bad=bool(faulted or lame))
    if not tried:
        machine.runner.note("fault: skipped, the budget is spent")
