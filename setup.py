# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries by CMake; all else about the package is in pyproject.toml.

    pip install --no-build-isolation .          # compiled, with the torch that is installed
    pip install --no-build-isolation -e .       # the same, the libraries beside the sources
    python setup.py build_native --inplace      # the libraries alone; `make build` runs this

Every way in goes through `build_libraries`. It builds the CMake project ``csrc/cpu`` to ``libmvit_kernels_cpu.so`` in
``mvit_kernels/lib/``, and where there is a CUDA compiler ``csrc/cuda`` to ``libmvit_kernels_cuda.so``: plain shared
libraries without Python symbols that speak LibTorch's stable ABI, so that one binary serves every torch >= 2.10 and
every Python. ``build_info.json`` beside them tells what was built, and how, or why it was not. The package works
without any library: a failure to build is no failure to install.

Why --no-build-isolation: the libraries are compiled against torch's headers. pip's isolated build environment
has no torch, and asking for one there would download a second torch, several hundred megabytes, for its
headers alone. An isolated ``pip install .`` therefore installs pure Python, and build_info.json says so.

The environment:

    MVIT_KERNELS_BUILD   auto (default): build what can be built
                         require: what belongs here and cannot be built is an error
                         skip: build nothing, and leave alone what is there
    CXX                  the C++ compiler (else the first of c++, g++, clang++)
    CUDA_HOME            the CUDA toolkit, if nvcc is neither on the PATH nor in /usr/local/cuda
    TORCH_CUDA_ARCH_LIST the GPUs to compile for, such as "8.0;9.0+PTX" (the default); those below 8.0 are left out
    MAX_JOBS             how many files are compiled at once (else what ninja thinks best)
    MVIT_KERNELS_SANITIZE
                         1: build_native --inplace compiles for AddressSanitizer and UndefinedBehaviorSanitizer, into
                         build/sanitized and not into the package; `make sanitize` runs tests on that
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

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

# Relative paths, here and below: setuptools runs this file in the project's folder.
LIBRARY_FOLDER = Path("mvit_kernels", "lib")
SANITIZE = os.environ.get("MVIT_KERNELS_SANITIZE", "") == "1"
BUILD_FOLDER = Path("build", "sanitized" if SANITIZE else "native")
POLICIES = ("auto", "require", "skip")
LIBRARIES = {"cpu": "C++", "cuda": "CUDA"}
# What, when it changes, has a library compiled anew; CMake would keep what it found the first time.
SETTINGS = {"cpu": ("CXX",), "cuda": ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}
COMPILERS = ("c++", "g++", "clang++", "nvcc")


class NothingToBuild(Exception):
    """This library has no place on this machine: never an error."""


class CannotBuild(Exception):
    """This library belongs here and could not be built: an error if MVIT_KERNELS_BUILD=require."""


def find_tool(name: str, folder: str) -> str:
    """The Python package's cmake or ninja, which is not on the PATH of an environment not activated, or another."""
    with contextlib.suppress(ImportError):
        packaged = Path(getattr(importlib.import_module(name), folder), name)
        if packaged.exists():
            return str(packaged)
    found = shutil.which(name)
    if not found:
        raise CannotBuild(f"{name} was not found: `pip install {name}`")
    return found


def run(command: list[str], quiet: bool = False) -> tuple[int, str]:
    """Run `command`; return its exit status and all that it printed, which is shown as it comes unless `quiet`."""
    # `make -j` leaves the name of its job server here, which does not reach through to us.
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


def configure(name: str, folder: Path, cmake: str, ninja: str) -> dict[str, object]:
    """Run CMake; return what csrc/`name` tells of the library, for build_info.json."""
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
    status, printed = run([*command, f"-DCMAKE_BUILD_TYPE={'Sanitize' if SANITIZE else 'Release'}"], quiet=True)
    info = json.loads(told.read_text()) if told.exists() else {}
    if status:
        if info.get("needed") is False:
            raise NothingToBuild(info["reason"])
        # CMake's own error: a paragraph after its place, broken into lines.
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
    """Let one build at a time into `folder`: ninja itself lets in two, which spoil each other's files."""
    import fcntl  # where there is no such module, nothing is built

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_library(name: str, destination: Path) -> dict[str, object]:
    """Build one library into `destination`; return its entry of build_info.json."""
    if not Path("csrc", name, "CMakeLists.txt").exists():
        raise NothingToBuild(f"no sources: there is no csrc/{name}/CMakeLists.txt")
    if sys.platform != "linux":
        raise NothingToBuild(f"the {LIBRARIES[name]} library is built on Linux only, and this is {sys.platform}")
    if SANITIZE and name != "cpu":
        raise NothingToBuild("sanitizers are for the C++ library")
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    target, folder = f"libmvit_kernels_{name}.so", BUILD_FOLDER / name
    with locked(folder):
        info = configure(name, folder, cmake, ninja)
        compile_library(folder, ninja)
        built, installed = folder / target, destination / target
        if not installed.exists() or installed.read_bytes() != built.read_bytes():
            # Replaced as a whole: a process that has the old library mapped keeps the old one.
            shutil.copy2(built, installed.with_suffix(".new"))
            os.replace(installed.with_suffix(".new"), installed)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built.stat().st_mtime))
    return {"built": True, "library": target, "time": when, **info}


def build_libraries(destination: Path, policy: str) -> bool:
    """Build every library into `destination` and write build_info.json there; return whether any was built.

    A library that is not built is removed: an old one would be taken for the sources' own.
    """
    if policy not in POLICIES:
        raise SystemExit(f"error: MVIT_KERNELS_BUILD is {policy!r}, and must be one of {', '.join(POLICIES)}")
    destination.mkdir(parents=True, exist_ok=True)
    info: dict[str, dict[str, object]] = {}
    failed = False
    for name in LIBRARIES:
        try:
            if policy == "skip":
                raise NothingToBuild("skipped: MVIT_KERNELS_BUILD=skip")
            info[name] = build_library(name, destination)
            print(f"mvit_kernels: the {name} library is built")
        except (NothingToBuild, CannotBuild) as why:
            failed |= isinstance(why, CannotBuild)
            info[name] = {"built": False, "reason": str(why)}
            (destination / f"libmvit_kernels_{name}.so").unlink(missing_ok=True)
            print(f"mvit_kernels: the {name} library is not built: {why}")
    (destination / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    if failed and policy == "require":
        raise SystemExit("error: MVIT_KERNELS_BUILD=require, and a library could not be built (see above)")
    return any(entry["built"] for entry in info.values())


# -- setuptools ------------------------------------------------------------------------------------


class BuildNative(Command):
    """The sub-command of `build` that makes the libraries (see setuptools' SubCommand protocol)."""

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
            return  # what an earlier build left there stays
        base = Path() if beside_sources else Path(self.build_lib)
        destination = BUILD_FOLDER if SANITIZE else base / LIBRARY_FOLDER
        self.distribution.has_libraries = build_libraries(destination, policy)

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
    """Tags the wheel py3-none-<platform> when it holds a library and py3-none-any when it does not."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=NativeDistribution,
    cmdclass={"build": BuildWithNative, "build_native": BuildNative, "bdist_wheel": NativeWheel},
)
