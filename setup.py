# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries with CMake. Everything else about the package is in pyproject.toml.

    pip install --no-build-isolation .          # with the libraries, compiled against the installed torch
    pip install --no-build-isolation -e .       # the same, with the libraries next to the sources
    python setup.py build_native --inplace      # only the libraries; `make build` runs this

All of them end up in `build_libraries`. It builds the CMake project ``csrc/cpu`` into ``libmvit_kernels_cpu.so`` in
``mvit_kernels/lib/`` and, if there is a CUDA compiler, ``csrc/cuda`` into ``libmvit_kernels_cuda.so``. These are plain
shared libraries without Python symbols, built on LibTorch's stable ABI, so that one binary works with every torch >=
2.10 and every Python. ``build_info.json`` next to them says what was built and how, or why it was not. The package
works without any library, so a failed build does not make the installation fail.

Why --no-build-isolation: the libraries are compiled against torch's headers. pip's isolated build environment has no
torch, and requiring it there would download a second torch, several hundred megabytes, only for its headers. An
isolated ``pip install .`` therefore installs pure Python, and build_info.json says so.

Environment variables:

    MVIT_KERNELS_BUILD   auto (default): build what can be built
                         require: a library that applies to this machine and cannot be built is an error
                         skip: build nothing and keep existing libraries
    CXX                  the C++ compiler (default: the first of c++, g++, clang++)
    MVIT_KERNELS_BUILD_LIBRARIES
                         cpu, cuda or cpu,cuda: build these alone
    CUDA_HOME            the CUDA toolkit, if nvcc is neither on the PATH nor in /usr/local/cuda
    TORCH_CUDA_ARCH_LIST the GPUs to compile for; default "8.0;9.0+PTX". Entries below 8.0 are ignored
    MAX_JOBS             number of files compiled in parallel (default: ninja's choice)
    MVIT_KERNELS_MANYLINUX
                         1: link libraries for a wheel (see csrc/cmake/manylinux.cmake); `make wheel` sets it
    CMAKE_TOOLCHAIN_FILE CMake's own: another processor (see csrc/cmake/aarch64-linux-gnu.cmake)
    MVIT_KERNELS_REPOSITORY
                         the public address that the metadata points at (see release/metadata.py)
    MVIT_KERNELS_SANITIZE
                         1: build_native --inplace compiles with AddressSanitizer and UndefinedBehaviorSanitizer, into
                         build/sanitized instead of the package; `make sanitize` runs tests on that

Without nvcc the CUDA library does not apply to the machine, and is no error, unless it is asked for:
MVIT_KERNELS_BUILD_LIBRARIES names it, or CUDA_HOME, CUDA_PATH or TORCH_CUDA_ARCH_LIST is set.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import setuptools

# Older ones end in a traceback about bdist_wheel or licence expressions. pip looks at pyproject.toml's
# `requires` only where it builds in isolation.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"error: mvit_kernels is built by setuptools 77 or newer, and this environment has {setuptools.__version__}: "
        "pip install -U 'setuptools>=77'"
    )

from setuptools import Command, Distribution, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.sdist import sdist  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip runs this file from elsewhere
from release import metadata  # noqa: E402

# Paths are relative, here and below: setuptools runs this file in the project's folder.
LIBRARY_FOLDER = Path("mvit_kernels", "lib")
SANITIZE = os.environ.get("MVIT_KERNELS_SANITIZE", "") == "1"
BUILD_FOLDER = Path("build", "sanitized" if SANITIZE else "native")
POLICIES = ("auto", "require", "skip")
LIBRARIES = {"cpu": "C++", "cuda": "CUDA"}
# What comes with a library: built in its folder, or a file of the sources.
WITH = {"cpu": ("libmvit_runtime.so", "csrc/runtime/mvit_runtime.h")}
# A change of any of these reconfigures the library from scratch; CMake would keep the values that it found first.
COMMON_SETTINGS = ("CXX", "MVIT_KERNELS_MANYLINUX", "CMAKE_TOOLCHAIN_FILE")
SETTINGS = {
    "cpu": COMMON_SETTINGS,
    "cuda": (*COMMON_SETTINGS, "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"),
}
COMPILERS = ("c++", "g++", "clang++", "nvcc")


class NothingToBuild(Exception):
    """This library does not apply to this machine; never an error."""


class CannotBuild(Exception):
    """This library applies to this machine but could not be built; an error if MVIT_KERNELS_BUILD=require."""


def find_tool(name: str, folder: str) -> str:
    """The executable of the Python package `name`, even in an environment not activated; else the one on the PATH."""
    with contextlib.suppress(ImportError):
        packaged = Path(getattr(importlib.import_module(name), folder), name)
        if packaged.exists():
            return str(packaged)
    found = shutil.which(name)
    if not found:
        raise CannotBuild(f"{name} was not found: `pip install {name}`")
    return found


def run(command: list[str], quiet: bool = False) -> tuple[int, str]:
    """Run `command` and return its exit status and output. Unless `quiet`, the output is also shown as it arrives."""
    # `make -j` puts its job server here, whose file descriptors are not passed down to us.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    printed = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            printed.append(line)
            if not quiet and "no work to do" not in line:
                print(line, end="", flush=True)
    return process.returncode, "".join(printed)


def configure(name: str, folder: Path, cmake: str, ninja: str, for_tests: bool) -> dict[str, object]:
    """Run CMake for csrc/`name` and return what it reports about the library, for build_info.json."""
    settings: dict[str, object] = {variable: os.environ.get(variable, "") for variable in SETTINGS[name]}
    settings |= {compiler: shutil.which(compiler) for compiler in COMPILERS}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        settings["torch"] = importlib.metadata.version("torch")
    settings |= {"folder": str(Path.cwd()), "cmake": cmake, "ninja": ninja}
    key, told = folder / "settings.json", folder / "build_info.json"
    anew = not key.exists() or key.read_text() != json.dumps(settings)
    for file in (told, *([key] if anew else [])):
        file.unlink(missing_ok=True)
    command = [cmake, "-G", "Ninja", "-S", f"csrc/{name}", "-B", str(folder), *(["--fresh"] if anew else [])]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    if name == "cpu":
        command += [f"-DMVIT_SETS_FOR_TESTS={'ON' if for_tests else 'OFF'}"]
    status, printed = run([*command, f"-DCMAKE_BUILD_TYPE={'Sanitize' if SANITIZE else 'Release'}"], quiet=True)
    info = json.loads(told.read_text()) if told.exists() else {}
    if status:
        if info.get("needed") is False:
            raise NothingToBuild(info["reason"])
        # One of CMake's own errors: its location, then a paragraph broken into lines.
        paragraph = printed.partition("CMake Error")[2].partition(":\n")[2].partition("\n\n")[0]
        raise CannotBuild(info.get("reason") or f"cmake: {' '.join(paragraph.split()) or printed.strip()[-200:]}")
    key.write_text(json.dumps(settings))
    return info


def compile_library(folder: Path, ninja: str) -> None:
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise CannotBuild(f"MAX_JOBS must be a whole number above 0, and it is {jobs!r}")
    status, printed = run([ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])])
    if status:
        lines = (line.strip() for line in printed.splitlines())
        first = next((line for line in lines if "error:" in line or "undefined reference" in line), "")
        raise CannotBuild(f"compile error: {first.replace(f'{Path.cwd()}/', '') or 'see the output of `make build`'}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allow one build at a time in `folder`. ninja does not lock: two builds would overwrite each other's files."""
    import fcntl  # Unix only; elsewhere nothing is built

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wanted_libraries() -> list[str]:
    """The libraries to build: those that MVIT_KERNELS_BUILD_LIBRARIES names, or all."""
    value = os.environ.get("MVIT_KERNELS_BUILD_LIBRARIES", "")
    named = [name.strip() for name in value.split(",") if name.strip()]
    if not set(named) <= set(LIBRARIES):
        raise SystemExit(f"error: MVIT_KERNELS_BUILD_LIBRARIES is {value!r}; {', '.join(LIBRARIES)} or both are wanted")
    return named or list(LIBRARIES)


def install(built: Path, installed: Path) -> None:
    """Copy a file unless it is there already; atomically, since a process that has the old one mapped keeps it."""
    if not installed.exists() or installed.read_bytes() != built.read_bytes():
        shutil.copy2(built, installed.with_suffix(".new"))
        os.replace(installed.with_suffix(".new"), installed)


def build_library(name: str, destination: Path, for_tests: bool) -> dict[str, object]:
    """Build one library into `destination` and return its entry in build_info.json."""
    if not Path("csrc", name, "CMakeLists.txt").exists():
        raise NothingToBuild(f"no sources: there is no csrc/{name}/CMakeLists.txt")
    if sys.platform != "linux":
        raise NothingToBuild(f"the {LIBRARIES[name]} library is built on Linux only, and this is {sys.platform}")
    if SANITIZE and name != "cpu":
        raise NothingToBuild("sanitizers are for the C++ library")
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    target, folder = f"libmvit_kernels_{name}.so", BUILD_FOLDER / name
    with locked(folder):
        info = configure(name, folder, cmake, ninja, for_tests)
        compile_library(folder, ninja)
        install(folder / target, destination / target)
        for file in map(Path, WITH.get(name, ())):
            install(file if file.exists() else folder / file, destination / file.name)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((folder / target).stat().st_mtime))
    return {"built": True, "library": target, "time": when, **info}


def build_libraries(destination: Path, policy: str, for_tests: bool) -> bool:
    """Build every library into `destination` and write build_info.json there; return whether any was built.

    A library that is not built is removed, since an old one would not match the sources. Libraries `for_tests` have
    instruction sets that nobody else needs.
    """
    if policy not in POLICIES:
        raise SystemExit(f"error: MVIT_KERNELS_BUILD is {policy!r}, and must be one of {', '.join(POLICIES)}")
    wanted = wanted_libraries()
    destination.mkdir(parents=True, exist_ok=True)
    info: dict[str, dict[str, object]] = {}
    failed = False
    for name in LIBRARIES:
        try:
            if policy == "skip":
                raise NothingToBuild("skipped: MVIT_KERNELS_BUILD=skip")
            if name not in wanted:
                raise NothingToBuild(f"skipped: MVIT_KERNELS_BUILD_LIBRARIES={','.join(wanted)}")
            info[name] = build_library(name, destination, for_tests)
            print(f"mvit_kernels: the {name} library is built")
        except (NothingToBuild, CannotBuild) as why:
            failed |= isinstance(why, CannotBuild)
            info[name] = {"built": False, "reason": str(why)}
            for file in (f"libmvit_kernels_{name}.so", *WITH.get(name, ())):
                (destination / Path(file).name).unlink(missing_ok=True)
            print(f"mvit_kernels: the {name} library is not built: {why}")
    sources = {"version": metadata.version(), "commit": metadata.commit()}
    info = {name: {**entry, **sources} for name, entry in info.items()}
    (destination / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    if failed and policy == "require":
        raise SystemExit("error: MVIT_KERNELS_BUILD=require, and a library could not be built (see above)")
    return any(entry["built"] for entry in info.values())


# -- setuptools ------------------------------------------------------------------------------------


class BuildNative(Command):
    """The sub-command of `build` that builds the libraries (see setuptools' SubCommand protocol)."""

    description = "compile csrc/ into mvit_kernels/lib"
    user_options = [("build-lib=", "b", "folder to build into"), ("inplace", "i", "build beside the sources")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        policy = os.environ.get("MVIT_KERNELS_BUILD", "") or "auto"
        beside_sources = self.inplace or self.editable_mode
        if policy == "skip" and beside_sources:
            return  # keep what an earlier build left there
        base = Path() if beside_sources else Path(self.build_lib)
        destination = BUILD_FOLDER if SANITIZE else base / LIBRARY_FOLDER
        self.distribution.has_libraries = build_libraries(destination, policy, for_tests=beside_sources)

    def get_source_files(self) -> list[str]:
        return sorted(str(file) for file in Path("csrc").rglob("*") if file.is_file())

    def get_outputs(self) -> list[str]:
        return sorted(str(file) for file in Path(self.build_lib, LIBRARY_FOLDER).glob("*") if file.is_file())

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWithNative(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    has_libraries = False  # known once build_native has run

    def has_ext_modules(self) -> bool:
        return self.has_libraries


class NativeWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform> if it contains a library, py3-none-any if not."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class SourceDistribution(sdist):
    """Notes the commit, which the files alone do not know."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        noted = Path(base_dir, metadata.COMMIT_FILE)
        noted.unlink(missing_ok=True)  # it may be a hard link to the one in this folder
        noted.write_text(metadata.commit() + "\n", encoding="ascii")


setup(
    distclass=NativeDistribution,
    cmdclass={
        "build": BuildWithNative,
        "build_native": BuildNative,
        "bdist_wheel": NativeWheel,
        "sdist": SourceDistribution,
    },
    long_description=metadata.long_description(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls=metadata.urls(),
)
