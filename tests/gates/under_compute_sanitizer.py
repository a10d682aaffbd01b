# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel under NVIDIA's compute-sanitizer, on tiny shapes: `make sanitize-gpu` runs this.

    python -m pytest tests/gates/under_compute_sanitizer.py
    python -m gates.under_compute_sanitizer triton linear_residual      # the calls alone, as the sanitizer runs them

memcheck sees accesses beside a tensor and misaligned ones: PyTorch's caching allocator is off in these processes, so
that a tensor ends where its memory does. racecheck sees hazards in shared memory, synccheck barriers that not all
threads reach, initcheck memory that is read before anybody wrote it. Where there is no GPU, or no compute-sanitizer, it
says so and skips.
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
from support.cases import DIFFERENTIABLE, call, convert, device_of, evaluate, make

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit code of a process in which a tool found something
LIVE = dict(projection=0.2, mlp=0.2, path1=0.2, path2=0.2)
SIZES = {  # rows that are no tile, widths that are no power of two, every kernel of an operator
    "layer_norm": [dict(shape=(70, 24)), dict(shape=(3, 300))],
    "layer_norm_linear": [dict(shape=(70, 24), n=40, activation="silu"), dict(shape=(3, 300), n=17, bias=False)],
    "patch_attention": [
        dict(shape=(2, 6, 8), heads=3, head_dim=12, patch=(2, 2)),  # short sequences
        dict(shape=(1, 16, 16), heads=2, head_dim=36, patch=(2, 2)),  # backward whole
        dict(shape=(1, 10, 26), heads=1, head_dim=20, patch=(2, 2)),  # backward by blocks
        dict(shape=(1, 16, 16), heads=1, head_dim=17, patch=(1, 1)),
    ],
    "linear_residual": [dict(shape=(70, 24), n=40), dict(shape=(5, 33), n=100, bias=False)],
    "layer_norm_mlp": [dict(shape=(70, 24), hidden=40), dict(shape=(5, 33), hidden=50)],
    "transformer_layer": [
        dict(shape=(2, 6, 8, 24), heads=2, patch=(2, 2), dropout=LIVE),
        dict(shape=(1, 5, 6, 33), heads=3, head_dim=20, hidden=17, patch=(1, 2), qkv_bias=False),
    ],
    "inverted_residual": [
        dict(shape=(2, 7, 9, 24), hidden=40, out=24, residual=True),
        dict(shape=(1, 8, 6, 17), hidden=33, out=20, stride=2),
    ],
    "transformer": [
        dict(shape=(2, 6, 8, 24), heads=2, patch=(2, 2)),
        dict(shape=(1, 16, 16, 64), heads=4, patch=(2, 2), qkv_bias=False, final_norm=False),
    ],
}


def run_cases(backend: str, operator: str) -> int:
    """The operator forward, and backward where it has one, in every dtype that the backend takes."""
    done, device = 0, device_of(backend) if backend == "triton" else "cuda"
    for sizes in SIZES[operator]:
        tensors, settings = make(operator, sizes)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            inputs = convert(tensors, dtype, device=device)
            try:
                evaluate(lambda t: call(operator, t, settings, backend), inputs, operator in DIFFERENTIABLE)  # noqa: B023
                done += 1
            except backends.BackendError as refusal:
                print(f"{operator} by {backend}: {refusal}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{operator} by {backend}: {done} calls", flush=True)
    return done


def sanitizer() -> str | None:
    """The program, from the path or from where CUDA is installed."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda", "/opt/cuda"]
    places = [Path(folder, *rest) for folder in folders for rest in (("bin",), ("compute-sanitizer",))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def under(tool: str, command: list[str]) -> subprocess.CompletedProcess:
    """Run Python under a tool, Triton compiling with line numbers, each tensor in memory of its own."""
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
    done = under(tool, ["-m", "gates.under_compute_sanitizer", backend, operator])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{operator} by {backend}: " in done.stdout and ": 0 calls" not in done.stdout


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
    """It is at work: 2 KB too far are found, and the right size is not."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(elements=elements))
    done = under("memcheck", [str(script)])
    assert (done.returncode == 0) == (code == 0), done.stdout[-4000:] + done.stderr[-2000:]
    assert ("Invalid __global__ write" in done.stdout) == (code != 0)


if __name__ == "__main__":
    sys.exit(0 if run_cases(*sys.argv[1:]) else 1)
