# SPDX-License-Identifier: Apache-2.0
"""The build of the compiled libraries: when it compiles, what it tells, and what it needs."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.builds import add_cmake, add_probe, build_info, needs_compiler, run


@needs_compiler
def test_build_is_incremental_and_fails_as_asked(project: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("cmake")
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    package = project / "mvit_kernels"
    library = package / "lib" / "libmvit_kernels_cpu.so"
    add_probe(project)
    assert "Building CXX object" in run(*build, cwd=project, MVIT_KERNELS_BUILD="require")
    assert library.exists()
    again = run(*build, cwd=project, MVIT_KERNELS_BUILD="require")
    assert "Building" not in again and "Linking" not in again

    broken = project / "csrc" / "cpu" / "probe_kernel.cpp"
    broken.write_text(broken.read_text() + "this is no C++\n")
    run(*build, cwd=project, MVIT_KERNELS_BUILD="skip")
    assert library.exists()
    run(*build, cwd=project)
    assert not library.exists()  # it would be taken for the broken sources'
    reason = build_info(package)["cpu"]["reason"]
    assert reason.startswith("compile error: csrc/cpu/probe_kernel.cpp")
    strict = run(*build, cwd=project, fails=True, MVIT_KERNELS_BUILD="require")
    assert "error: MVIT_KERNELS_BUILD=require" in strict

    for environment, told in (
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS"),
    ):
        assert told in run(*build, cwd=project, **environment)
        assert told in build_info(package)["cpu"]["reason"]
    assert "auto, require, skip" in run(*build, cwd=project, fails=True, MVIT_KERNELS_BUILD="always")


@needs_compiler
def test_another_compiler_compiles_anew(project: Path) -> None:
    """CXX may carry a launcher and arguments; CMake by itself would keep the compiler that it found first."""
    add_probe(project)
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    run(*build, cwd=project, MVIT_KERNELS_BUILD="require")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    path = os.pathsep.join([pytest.importorskip("ninja").BIN_DIR, os.environ["PATH"]])
    launched = f"env {compiler} -DPROBED=1"
    assert "Building CXX object" in run(*build, cwd=project, MVIT_KERNELS_BUILD="require", CXX=launched)
    commands = run("ninja", "-C", "build/native/cpu", "-t", "commands", cwd=project, PATH=path)
    assert len(re.findall(rf"\benv {re.escape(compiler)}\s+-DPROBED=1 .* -c ", commands)) >= 2


@needs_compiler
def test_objects_are_linked_from_the_lowest_instruction_set_to_the_highest(project: Path) -> None:
    """Of an inline function that several have the linker keeps the first: it must be one that every processor runs.
    And one line adds a set."""
    add_probe(project)
    sets = project / "csrc" / "cpu" / "CMakeLists.txt"
    line = "instruction_set(avx VECTOR_BYTES 16 FLAGS -mavx)\ninstruction_set(avx2 "
    sets.write_text(sets.read_text().replace("instruction_set(avx2 ", line))
    run(sys.executable, "setup.py", "-q", "build_native", "--inplace", cwd=project, MVIT_KERNELS_BUILD="require")
    ninja_file = (project / "build" / "native" / "cpu" / "build.ninja").read_text()
    (objects,) = re.findall(r"^build libmvit_kernels_cpu\.so: \S+ ([^|]*)", ninja_file, re.MULTILINE)
    info = build_info(project / "mvit_kernels")["cpu"]
    sets = ("portable", *info["isa"])
    targets = [re.search(r"CMakeFiles/(\w+)\.dir/", name)[1] for name in objects.split()]
    expected = [f"{kind}_{isa}" for isa in sets for kind in ("network_kernels", "kernels")]
    assert list(dict.fromkeys(targets)) == ["fronts", "engine", *expected]
    (objects,) = re.findall(r"^build libmvit_runtime\.so: \S+ ([^|]*)", ninja_file, re.MULTILINE)
    targets = [re.search(r"CMakeFiles/(\w+)\.dir/", name)[1] for name in objects.split()]
    assert list(dict.fromkeys(targets)) == ["runtime", "engine", *(f"network_kernels_{isa}" for isa in sets)]
    order = ["avx", "avx2", "avx512", "avx512bf16", "amx_emulated", "amx"]
    assert info["isa"] == [isa for isa in order if isa in info["isa"]]
    assert sorted(info["isa"] + info["isa_left_out"]) == sorted(order)


@needs_compiler
@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("cmake", "cmake was not found: `pip install cmake`"),
        ("ninja", "ninja was not found: `pip install ninja`"),
        ("torch", "torch is not importable in the build's environment: install torch first, then `pip install"),
        ("c++", "no C++ compiler: none of c++, g++, clang++ is on the PATH (or set CXX)"),
    ],
)
def test_what_is_missing_is_told_and_how_to_get_it(project: Path, missing: str, told: str) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("cmake")
    add_probe(project)
    programs = project / "programs"  # all of the PATH
    programs.mkdir()
    if missing != "c++":
        (programs / "c++").symlink_to(next(filter(None, map(shutil.which, ("c++", "g++", "clang++")))))
    modules = project / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    environment = {"PATH": str(programs), "PYTHONPATH": str(modules), "CXX": ""}
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    assert told in run(*build, cwd=project, **environment)
    reason = build_info(project / "mvit_kernels")["cpu"]["reason"]
    assert reason.startswith(told) and "\n" not in reason
    run(*build, cwd=project, fails=True, MVIT_KERNELS_BUILD="require", **environment)


@needs_compiler
@pytest.mark.parametrize(
    ("home", "architectures", "told"),
    [
        ("no-such-folder", "", "no CUDA compiler: CUDA_HOME is 'no-such-folder'"),
        ("toolkit", "9.0;Hopper", "TORCH_CUDA_ARCH_LIST has 'Hopper'"),
        ("toolkit", "6.0 7.5+PTX", "the kernels want compute capability 8.0 or newer"),
        ("toolkit", "7.5;9.0a;10.0+PTX", "does not tell where its headers and libraries are"),
    ],
)
def test_cuda_library_tells_what_it_wants(project: Path, home: str, architectures: str, told: str) -> None:
    add_cmake(project, "cuda")
    nvcc = project / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")  # no compiler: it prints nothing
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": architectures}
    assert told in run(sys.executable, "setup.py", "-q", "build_native", "--inplace", cwd=project, **environment)
    info = build_info(project / "mvit_kernels")
    assert info["cuda"]["built"] is False and told in info["cuda"]["reason"]


@needs_compiler
@pytest.mark.parametrize("asks", ["MVIT_KERNELS_BUILD_LIBRARIES", "TORCH_CUDA_ARCH_LIST", None])
def test_an_absent_nvcc_is_an_error_only_where_it_was_asked_for(project: Path, asks: str | None) -> None:
    toolkit = add_cmake(project, "cuda").parent / "cmake" / "cuda_toolkit.cmake"
    toolkit.write_text(toolkit.read_text().replace("/usr/local/cuda/bin", "/nowhere"))
    (project / "programs").mkdir()
    environment = dict.fromkeys(("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"), "")
    environment |= {"PATH": str(project / "programs"), "MVIT_KERNELS_BUILD": "require"}
    if asks:
        environment[asks] = {"MVIT_KERNELS_BUILD_LIBRARIES": "cpu,cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}[asks]
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    printed = run(*build, cwd=project, fails=asks is not None, **environment)
    assert "no CUDA compiler: nvcc is neither on the PATH nor in /usr/local/cuda" in printed
    assert asks is None or f"{asks}={environment[asks]} asks for the CUDA library" in printed


def test_libraries_are_built_as_named(project: Path) -> None:
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    run(*build, cwd=project, MVIT_KERNELS_BUILD_LIBRARIES="cuda")
    info = build_info(project / "mvit_kernels")
    assert info["cpu"]["reason"] == "skipped: MVIT_KERNELS_BUILD_LIBRARIES=cuda"
    assert info["cuda"]["reason"].startswith("no sources")
    wrong = run(*build, cwd=project, fails=True, MVIT_KERNELS_BUILD_LIBRARIES="cpu,rocm")
    assert "error: MVIT_KERNELS_BUILD_LIBRARIES is 'cpu,rocm'; cpu, cuda or both are wanted" in wrong


def test_old_setuptools_is_told_in_one_sentence(project: Path) -> None:
    (project / "setuptools.py").write_text('__version__ = "68.0.0"\n')
    printed = run(sys.executable, "setup.py", "build", cwd=project, fails=True)
    assert printed.startswith("error: mvit_kernels is built by setuptools 77 or newer, and this environment has 68.0.0")
    assert "Traceback" not in printed
