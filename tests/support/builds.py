# SPDX-License-Identifier: Apache-2.0
"""The package in a folder of its own: what runs there, and a library in small to be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "mvit_kernels"

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)

# A whole compiled library in small: one operator, and a kernel for every instruction set.
PROBE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "instruction_sets.h"
using torch::stable::Tensor;
#define ASK(isa, ...) bool compiled_for_##isa(); const bool isa##_is_right = compiled_for_##isa();
MVIT_INSTRUCTION_SETS(ASK)
#define AND(isa, ...) && isa##_is_right
Tensor probe(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  const float* in = static_cast<const float*>(x.data_ptr());
  float* out = static_cast<float*>(y.data_ptr());
#ifdef __AVX2__
  return y;  // the baseline must not be compiled for it
#endif
#pragma omp parallel for
  for (int64_t i = 0; i < x.numel(); ++i) out[i] = 2 * in[i] + (true MVIT_INSTRUCTION_SETS(AND));
  return y;
}
STABLE_TORCH_LIBRARY_FRAGMENT(mvit_packaging_test, m) { m.def("probe(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(mvit_packaging_test, CPU, m) { m.impl("probe", TORCH_BOX(&probe)); }
"""
PROBE_KERNEL = """
#ifdef __AVX512F__
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
bool JOIN(compiled_for_, MVIT_ISA)() { return vector_bytes == MVIT_VECTOR_BYTES; }
"""


def run(*command: str | Path, cwd: Path, fails: bool = False, **environment: str) -> str:
    """Run `command` in `cwd`; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MVIT_KERNELS_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def python(code: str, cwd: Path) -> str:
    """Run `code` with the modules in `cwd` before all others."""
    path = os.pathsep.join(filter(None, (str(cwd), os.environ.get("PYTHONPATH"))))
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=path).strip()


def add_cmake(project: Path, library: str) -> Path:
    """The build's own files for csrc/`library`, and none of its sources."""
    folder = project / "csrc" / library
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / library / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc" / "cmake", project / "csrc" / "cmake")
    return folder


def add_probe(project: Path) -> None:
    """Probes in place of the sources that CMake finds; those that it lists by name are empty."""
    folder = add_cmake(project, "cpu")
    for listed in re.findall(
        r"^set\((?:ENGINE|NETWORK_KERNELS) ([^)]*)\)", (folder / "CMakeLists.txt").read_text(), re.M
    ):
        for name in listed.split():
            (folder / name).write_text("")
    shutil.copytree(ROOT / "csrc" / "runtime", project / "csrc" / "runtime", ignore=shutil.ignore_patterns("*.cpp"))
    (project / "csrc" / "runtime" / "probe.cpp").write_text("")
    (folder / "probe.cpp").write_text(PROBE)
    (folder / "probe_kernel.cpp").write_text(PROBE_KERNEL)


def build_info(folder: Path) -> dict:
    return json.loads((folder / "lib" / "build_info.json").read_text())
