# SPDX-License-Identifier: Apache-2.0
"""The machine, and the compiled library: what was wanted is there and loads, or the run says so and fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from runner import Job, Runner

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GIVEN = "MVIT_KERNELS_LIBRARIES"


class Machine:
    """Where the steps run, and what serves it.

    Args:
        runner: of all processes.
        python: the interpreter of the steps.
    """

    def __init__(self, runner: Runner, python: str) -> None:
        self.runner, self.python = runner, python
        self.environment: dict[str, str | None] = {}  # beyond that of this process
        self.facts: dict[str, Any] = {}

    @property
    def device(self) -> str:
        return self.facts["device"]

    @property
    def backends(self) -> dict[str, list[str]]:
        """Each backend with kernels that can be used, and its operators."""
        return self.facts["backends"]

    def script(self, name: str, *arguments: str) -> list[str]:
        return [self.python, str(HERE / f"{name}.py"), *arguments]

    def module(self, name: str, *arguments: str) -> list[str]:
        return [self.python, "-m", name, *arguments]

    def ask(self) -> bool:
        """Look at the machine anew; whether Python, torch and the package work there."""
        done = self.runner.step("the machine", self.script("facts"), 120, **self.environment)
        found = [line for line in done.lines if line.startswith('{"what": "machine"')]
        if done.code or not found:
            for line in done.lines[-3:]:
                self.runner.detail(line)
            return False
        self.facts = json.loads(found[-1])
        return True

    def describe(self) -> None:
        facts, detail = self.facts, self.runner.detail
        detail(f"Python {facts['python']}, torch {facts['torch']}, CUDA {facts.get('cuda')}, Triton {facts['triton']}")
        if self.device == "cuda":
            detail(
                f"{facts['name']}, {facts['capability']}, driver {facts['driver']}, {facts['multiprocessors']} "
                f"multiprocessors, {facts['l2_mib']} MiB of L2, {facts['gib']} GiB"
            )
        else:
            self.runner.note("no GPU is visible to torch: only the CPU part runs")

    # --------------------------------------------------------------------------------------------------- the library

    def library(self, seconds: float) -> None:
        """See that the library of this device is there, built if it has to be.

        It is wanted where a folder of libraries is given or where there is a compiler for it. A library that was wanted
        and does not load makes the run a failed one: what follows would test Python alone, and look like a success.
        """
        runner, name = self.runner, "cuda" if self.device == "cuda" else "cpu"
        given = os.environ.get(GIVEN)
        if given:
            files = sorted(path.name[len("libmvit_kernels_") : -3] for path in Path(given).glob("libmvit_kernels_*.so"))
            broken = {one: why for one in files if (why := self.facts["libraries"].get(one))}
            for one, why in broken.items():
                runner.note(f"library, {one}: FAILED: {given} has it, and {why}", bad=True)
            if name in files and name not in broken:
                return runner.note(f"library, {name}: that of {given}")
            if name not in broken:
                runner.note(f"library, {name}: FAILED: {given} has none", bad=True)
            self.environment[GIVEN] = None
            self.ask()
        compiler = nvcc() if name == "cuda" else shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
        if not self.facts["libraries"][name]:
            why_old = self._outdated(name)
            if not why_old:
                return runner.note(f"library, {name}: {self._built(name)}")
            runner.note(f"library, {name}: {why_old}", bad=not compiler)
        if not compiler:
            if name == "cuda" and not given:
                runner.note("library, cuda: not wanted: no nvcc, no MVIT_KERNELS_LIBRARIES; its kernels are NOT tested")
            return None
        environment = {"MVIT_KERNELS_BUILD": "require", "MVIT_KERNELS_BUILD_LIBRARIES": name, GIVEN: None}
        if name == "cuda":  # of this GPU alone, which takes half as long as the default
            environment["TORCH_CUDA_ARCH_LIST"] = self.facts["capability"]
        command = [self.python, "setup.py", "-q", "build_native", "--inplace"]
        done = runner.step("build", command, seconds, **environment)
        for line in done.lines[-3:] if done.code else ():
            runner.detail(line)
        if self.ask() and not self.facts["libraries"][name]:
            return runner.note(f"library, {name}: {self._built(name)}")
        runner.note(f"library, {name}: FAILED: {self.facts['libraries'][name]}", bad=True)
        return None

    def wants_cuda(self) -> bool:
        """Whether the CUDA library should be there: one was given, or can be compiled."""
        return self.device == "cuda" and bool(os.environ.get(GIVEN) or nvcc())

    def without_library(self) -> str:
        """Why the CUDA kernels cannot be tested, for every step that would have; "" if they can."""
        why = self.facts["why"].get("cuda") if self.device == "cuda" else None
        return "; ".join(why) if why else ""

    def _info(self, name: str) -> dict[str, Any]:
        try:
            text = Path(self.facts["library_folder"], "build_info.json").read_text(encoding="utf-8")
            return json.loads(text).get(name) or {}
        except (OSError, ValueError):
            return {}

    def _built(self, name: str) -> str:
        known = self._info(name)
        return f"{self.facts['library_folder']}, of commit {known.get('commit')}, built {known.get('time')}"

    def _outdated(self, name: str) -> str:
        """Why the library is older than its sources; "" if it is not, or if that is not known."""
        commit = (self._info(name).get("commit") or "").rstrip("+")
        if not commit or not (ROOT / ".git").exists():
            return ""
        command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", f"csrc/{name}"]
        done = self.runner.run([Job("sources", command)], 20)["sources"]
        return f"csrc/{name} has changed since commit {commit}, of which it is" if done.code == 1 else ""


def nvcc() -> str | None:
    """CUDA's compiler, where `setup.py` looks for it."""
    return tool("nvcc")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: CUDA_HOME's, that on the PATH, or that of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    inside = [str(Path(home, folder)) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    first = [path for path in inside if os.environ.get("CUDA_HOME") and path.startswith(os.environ["CUDA_HOME"])]
    return shutil.which(name, path=os.pathsep.join([*first, os.environ.get("PATH", ""), *inside]))
