# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: import, version, wheels, the build, and its optional neighbours."""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mvit_kernels
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


# What the headers of newer compilers take from newer libraries: a shared_ptr, a stringstream, a new[], dlsym.
MODERN = """
#include <dlfcn.h>
#include <memory>
#include <sstream>
#include <string>
std::string told(int n) {
  std::ostringstream stream;
  stream << std::make_shared<int>(n).use_count() << (dlsym(RTLD_DEFAULT, "getenv") != nullptr);
  std::unique_ptr<std::string[]> lines(new std::string[n]);
  return lines[0] + stream.str() + std::move(stream).str();
}
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


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the package's Python files alone: nothing compiled, nothing built."""
    shutil.copytree(PACKAGE, tmp_path / "mvit_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return tmp_path


@pytest.fixture
def project(bare: Path) -> Path:
    """The same with what is needed to build it, and no C++ sources."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, bare)
    shutil.copytree(ROOT / "release", bare / "release")
    (bare / "README.md").write_text("# mvit_kernels\n")
    return bare


def add_cmake(project: Path, library: str) -> Path:
    """The build's own files for csrc/`library`, and none of its sources."""
    folder = project / "csrc" / library
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / library / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc" / "cmake", project / "csrc" / "cmake")
    return folder


def add_probe(project: Path) -> None:
    folder = add_cmake(project, "cpu")
    (folder / "probe.cpp").write_text(PROBE)
    (folder / "probe_kernel.cpp").write_text(PROBE_KERNEL)


def wheel_of(project: Path) -> Path:
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", "out")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=project)
    (wheel,) = (project / "out").glob("*.whl")
    return wheel


def build_info(folder: Path) -> dict:
    return json.loads((folder / "lib" / "build_info.json").read_text())


# -- Importing -------------------------------------------------------------------------------------


def test_import_is_cheap_and_pulls_in_nothing(bare: Path) -> None:
    printed = python(
        """
import pathlib, sys, time, torch
before, start = set(sys.modules), time.process_time()
import mvit_kernels
seconds = time.process_time() - start
assert pathlib.Path(mvit_kernels.__file__).parent == pathlib.Path.cwd() / "mvit_kernels"
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "timm", "transformers", "kornia", "torchvision", "safetensors", "PIL"}, loaded
assert not torch.cuda.is_initialized()
print(seconds)
""",
        bare,
    )
    assert float(printed) < 0.5  # 1 ms as written; torch's own import is a second


def test_everything_public_resolves_with_nothing_compiled_and_nobody_else_installed(bare: Path) -> None:
    printed = python(
        """
import sys
for name in ("triton", "timm", "transformers", "kornia", "torchvision", "safetensors", "matplotlib", "PIL"):
    sys.modules[name] = None
import mvit_kernels, torch
for name in mvit_kernels.__all__:
    assert getattr(mvit_kernels, name) is not None, name
model = mvit_kernels.MobileViT(mode="xxs").eval()
with torch.no_grad():
    print(tuple(mvit_kernels.accelerate(model)(torch.rand(1, 3, 64, 64)).shape))
assert not torch.cuda.is_initialized()
""",
        bare,
    )
    assert printed.splitlines()[-1] == "(1, 320, 2, 2)"


def test_version_is_written_once() -> None:
    literal = re.search(r'^__version__ = "([^"]+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert literal and literal[1] == mvit_kernels.__version__
    assert not re.search(r'^version\s*=\s*"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    try:
        assert importlib.metadata.version("mvit_kernels") == mvit_kernels.__version__
    except importlib.metadata.PackageNotFoundError:
        pass  # run from the sources, not installed


def test_the_build_here_is_told_as_it_is() -> None:
    if not (PACKAGE / "lib" / "build_info.json").exists():
        pytest.skip("nothing was built here: make build")
    for name, entry in build_info(PACKAGE).items():
        library = PACKAGE / "lib" / f"libmvit_kernels_{name}.so"
        assert library.exists() == entry["built"]
        assert entry["library" if entry["built"] else "reason"]


# -- Building --------------------------------------------------------------------------------------


def test_wheel_without_sources_is_pure(project: Path) -> None:
    stale = project / "mvit_kernels" / "lib" / "libmvit_kernels_cpu.so"
    stale.parent.mkdir()
    stale.write_text("built from other sources")
    wheel = wheel_of(project)
    assert wheel.name == f"mvit_kernels-{mvit_kernels.__version__}-py3-none-any.whl"
    dist_info = f"mvit_kernels-{mvit_kernels.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        modules = {str(f.relative_to(ROOT)) for f in PACKAGE.rglob("*.py")}
        assert modules | {"mvit_kernels/py.typed"} <= names
        assert {name.partition("/")[0] for name in names} == {"mvit_kernels", dist_info}
        assert not [name for name in names if name.endswith(".so")]
        info = json.loads(archive.read("mvit_kernels/lib/build_info.json"))
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
        assert f"{dist_info}/licenses/LICENSE" in names
        assert b"mvit-kernels = mvit_kernels.__main__:main" in archive.read(f"{dist_info}/entry_points.txt")
    assert info["cpu"]["built"] is False and "no sources" in info["cpu"]["reason"]
    assert metadata["Version"] == mvit_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["torch>=2.10", "numpy"]


@needs_compiler
def test_wheel_with_sources_holds_a_library_for_every_python(project: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("cmake")
    add_probe(project)
    wheel = wheel_of(project)
    assert re.fullmatch(r"mvit_kernels-[^-]+-py3-none-linux_\w+\.whl", wheel.name)
    unpacked = project / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    library = unpacked / "mvit_kernels" / "lib" / "libmvit_kernels_cpu.so"
    info = build_info(unpacked / "mvit_kernels")["cpu"]
    assert info["built"] and info["compiler"] and info["torch"] and str(project) not in json.dumps(info)
    assert "amx_emulated" not in info["isa"] + info["isa_left_out"]  # for tests alone
    printed = python(
        f"import torch; torch.ops.load_library({str(library)!r});"
        "print(torch.ops.mvit_packaging_test.probe(torch.arange(3.0)).tolist())",
        unpacked,
    )
    assert printed == "[1.0, 3.0, 5.0]"
    assert b"Py_" not in library.read_bytes()


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
    folders = [f"CMakeFiles/kernels_{isa}.dir/probe_kernel.cpp.o" for isa in ("portable", *info["isa"])]
    assert objects.split() == ["CMakeFiles/fronts.dir/probe.cpp.o", *folders]
    order = ["avx", "avx2", "avx512", "avx512bf16", "amx_emulated", "amx"]
    assert info["isa"] == [isa for isa in order if isa in info["isa"]]
    assert sorted(info["isa"] + info["isa_left_out"]) == sorted(order)


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no wheel is made for this processor")
def test_a_library_for_a_wheel_asks_for_nothing_that_manylinux_2_28_lacks(project: Path) -> None:
    """Whatever this machine's glibc and libstdc++; `auditwheel repair` holds the whole libraries to it."""
    from elftools.elf.elffile import ELFFile

    add_probe(project)
    sets = project / "csrc" / "cpu" / "CMakeLists.txt"
    sets.write_text(re.sub(r"^instruction_set\((?!portable)[^)]*\)$", "", sets.read_text(), flags=re.MULTILINE))
    probe = project / "csrc" / "cpu" / "probe.cpp"
    probe.write_text(
        MODERN + probe.read_text().replace("#ifdef __AVX2__", "if (told(1).empty()) return x;\n#ifdef __AVX2__")
    )
    shutil.copytree(ROOT / "csrc" / "manylinux", project / "csrc" / "manylinux")
    build = (sys.executable, "setup.py", "-q", "build_native", "--inplace")
    run(*build, cwd=project, MVIT_KERNELS_BUILD="require", MVIT_KERNELS_MANYLINUX="1")
    newest: dict[str, tuple[int, ...]] = {}
    with open(project / "mvit_kernels" / "lib" / "libmvit_kernels_cpu.so", "rb") as file:
        for _, versions in ELFFile(file).get_section_by_name(".gnu.version_r").iter_versions():
            for version in versions:
                family, _, number = version.name.partition("_")
                parts = tuple(map(int, number.split(".")))
                newest[family] = max(newest.get(family, ()), parts)
    assert newest["GLIBC"] <= (2, 28) and newest["GLIBCXX"] <= (3, 4, 24) and newest["CXXABI"] <= (1, 3, 11), newest


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


# -- The neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "transformers", "kornia"])
def test_missing_neighbour_is_told_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvit_kernels._utils import third_party

    monkeypatch.setitem(sys.modules, name, None)
    sentence = rf"^{name} is not installed: pip install 'mvit_kernels\[\w+\]'$"
    with pytest.raises(ImportError, match=sentence) as error:
        getattr(third_party, f"import_{name}")()
    assert error.value.name == name


def fake_torchvision(folder: Path, body: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "part.py").write_text("")
    (folder / "torchvision" / "__init__.py").write_text(f"from . import part\nimport torch\n{body}\n")


TELL = """
import sys, torch
import mvit_kernels
declared = lambda: hasattr(torch.ops.torchvision, "nms")
try:
    mvit_kernels.prepare_torchvision()
    mvit_kernels.prepare_torchvision()
except RuntimeError as error:
    print("raised:", error)
print("torchvision" in sys.modules, declared())
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        pytest.param("", "True False", id="whole"),
        pytest.param('torch.library.register_fake("torchvision::nms", print)', "True True", id="uncompiled"),
        pytest.param('raise RuntimeError("bad luck")', "raised: bad luck\nFalse False", id="broken"),
    ],
)
def test_torchvision_schemas_are_declared_only_where_missing(bare: Path, body: str, told: str) -> None:
    fake_torchvision(bare, body)
    assert python(TELL, bare) == told
