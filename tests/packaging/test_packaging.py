# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: version and wheels."""

from __future__ import annotations

import email
import importlib.metadata
import json
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import mvit_kernels
from support import ROOT
from support.builds import PACKAGE, add_probe, build_info, needs_compiler, python, run

# What the headers of newer compilers take from newer libraries: a shared_ptr, a stringstream, a new[], dlsym.
MODERN = """
#include <condition_variable>
#include <dlfcn.h>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
std::string told(int n) {
  std::ostringstream stream;
  stream << std::make_shared<int>(n).use_count() << (dlsym(RTLD_DEFAULT, "getenv") != nullptr);
  std::unique_ptr<std::string[]> lines(new std::string[n]);
  std::mutex mutex;
  std::condition_variable woken;
  std::unique_lock lock(mutex);
  if (n > 1) woken.wait(lock);
  try {
    const std::exception_ptr error = n > 2 ? std::make_exception_ptr(n) : nullptr, copy = error;
    if (copy) std::rethrow_exception(copy);
  } catch (int thrown) {
    stream << thrown;
  }
  return lines[0] + stream.str() + std::move(stream).str();
}
"""


def wheel_of(project: Path) -> Path:
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", "out")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=project)
    (wheel,) = (project / "out").glob("*.whl")
    return wheel


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
        elf = ELFFile(file)
        # torch exports these, so they have no version here. Where it is not, only a newer libstdc++ does.
        own = (
            "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv",
            "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv",
        )
        assert not {symbol.name for symbol in elf.get_section_by_name(".dynsym").iter_symbols()} & set(own)
        for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
            for version in versions:
                family, _, number = version.name.partition("_")
                parts = tuple(map(int, number.split(".")))
                newest[family] = max(newest.get(family, ()), parts)
    assert newest["GLIBC"] <= (2, 28) and newest["GLIBCXX"] <= (3, 4, 24) and newest["CXXABI"] <= (1, 3, 11), newest
