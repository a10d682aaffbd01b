# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel under NVIDIA's compute-sanitizer, on tiny shapes: `make sanitize-gpu` runs this.

    python -m pytest tests/gates/under_compute_sanitizer.py

It runs every_kernel.py, for one backend and operator at a time.

memcheck sees accesses outside a tensor and misaligned ones: PyTorch's caching allocator is off in these processes, so
that a tensor ends where its memory does. racecheck sees hazards in shared memory, synccheck barriers that not all
threads reach, initcheck memory that is read before it is written. Without a GPU or compute-sanitizer it says so and
skips.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvit_kernels import backends

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit code of a process in which a tool found something


def sanitizer() -> str | None:
    """The program, from the path or from where CUDA is installed."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda", "/opt/cuda"]
    places = [Path(folder, *rest) for folder in folders for rest in (("bin",), ("compute-sanitizer",))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def under(tool: str, command: list[str]) -> subprocess.CompletedProcess:
    """Run Python under a tool, with every tensor in memory of its own; Triton compiles with line numbers."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [sanitizer(), *options, sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1800
    )


@pytest.fixture(scope="module", autouse=True)
def what_it_takes():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if sanitizer() is None:
        pytest.skip("no compute-sanitizer: it comes with the CUDA toolkit (set CUDA_HOME)")


KERNELS = [(backend, operator) for backend in ("triton", "cuda") for operator in backends.operators(backend)]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("backend, operator", KERNELS)
def test_an_operator(backend, operator, tool):
    if why := backends.unavailable(backend, "cuda"):
        pytest.skip("; ".join(why))
    done = under(tool, ["-m", "gates.every_kernel", "--run", backend, "--only", operator])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{backend} {operator} " in done.stdout and ": ran\n" in done.stdout


BROKEN = """
import torch, triton, triton.language as tl
@triton.jit
def fill(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)
x = torch.empty({elements}, device="cuda")
fill[(1,)](x, 1024)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("elements, code", [(1024, 0), (512, FOUND)])
def test_memcheck_sees_a_write_behind_a_tensor(elements, code, tmp_path):
    """The tool is at work: a write 2 KB too far is found, and one of the right size is not."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(elements=elements))
    done = under("memcheck", [str(script)])
    assert (done.returncode == 0) == (code == 0), done.stdout[-4000:] + done.stderr[-2000:]
    assert ("Invalid __global__ write" in done.stdout) == (code != 0)
