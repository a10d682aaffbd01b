# SPDX-License-Identifier: Apache-2.0
"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize` runs this, and more."""

import os
import subprocess
import sys

import pytest

from gates import sanitized
from mvit_kernels import backends
from support import ROOT


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """Builds the library (the first time a minute on two cores, then no time); gives the variables to run with it."""
    try:
        found = sanitized.environment()
    except sanitized.NoSanitizer as why:
        pytest.skip(str(why))
    build = {**os.environ, "MVIT_KERNELS_SANITIZE": "1", "MVIT_KERNELS_BUILD": "require"}
    command = [sys.executable, "setup.py", "-q", "build_native", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=build, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return found


def test_every_operator_under_the_sanitizers(variables):
    command = [sys.executable, "-m", "gates.sanitized", "here"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[:8000]
    for operator in backends.operators("cpu"):
        assert f"portable: {operator}, " in done.stdout
    assert "portable: frozen networks" in done.stdout


@pytest.mark.parametrize("isa", ["", "portable"])  # the best there is, and the one with other vectors
def test_malformed_calls_under_the_sanitizers(variables, isa):
    """None reads or writes outside a tensor, or overflows an integer."""
    options = variables["ASAN_OPTIONS"] + ":max_allocation_size_mb=1024"  # as without the sanitizers: see malformed.py
    limited = {**variables, "ASAN_OPTIONS": options, "MVIT_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gates.malformed", "--count", "10000"]
    done = subprocess.run(command, env=limited, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-8000:]
    assert "10000 calls of cpu" in done.stdout and " 0 ended the process" in done.stdout


@pytest.mark.parametrize("isa", ["", "portable"])
def test_damaged_files_under_the_sanitizers(variables, isa):
    options = variables["ASAN_OPTIONS"] + ":max_allocation_size_mb=1024"
    limited = {**variables, "ASAN_OPTIONS": options, "MVIT_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-m", "gates.damaged_files", "--count", "10000"]
    done = subprocess.run(command, env=limited, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-8000:]
    assert "10000 damaged files" in done.stdout


def test_the_sanitizers_see_a_write_behind_a_tensor(variables):
    """The sanitizers are at work: the library built for them stops a process that writes one float too far."""
    code = "import ctypes, torch, mvit_kernels.backends.cpu as c; assert c.instruction_set(); x = torch.empty(5); "
    code += "ctypes.memset(x.data_ptr(), 0, 4 * {})"
    for floats, fails in ((5, False), (6, True)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(floats)], env=variables, capture_output=True, text=True, timeout=300
        )
        assert (done.returncode != 0) == fails, done.stderr[:4000]
        assert ("heap-buffer-overflow" in done.stderr) == fails
