# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries; all else about the package is in pyproject.toml.

    pip install --no-build-isolation .          # compiled, with the torch that is installed
    pip install --no-build-isolation -e .       # the same, the libraries beside the sources
    python setup.py build_native --inplace      # the libraries alone; `make build` runs this

Every way in goes through `build_libraries`. It compiles ``csrc/cpu/`` to ``libmvit_kernels_cpu.so`` in
``mvit_kernels/lib/``, and where there is a CUDA compiler ``csrc/cuda/`` to ``libmvit_kernels_cuda.so``: plain
shared libraries without Python symbols that speak LibTorch's stable ABI, so that one binary serves every
torch >= 2.10 and every Python. ``build_info.json`` beside them tells what was built, and how, or why it was
not. The package works without any library: a failure to build is no failure to install.

The CUDA library wants nvcc and no more: no GPU, and no torch that was built for CUDA. It has the CUDA runtime
inside and needs nothing but a driver of that CUDA version where it runs; a torch without CUDA loads it too.

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
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

# Relative paths, here and below: setuptools runs this file in the project's folder.
LIBRARY_FOLDER = Path("mvit_kernels", "lib")
BUILD_FOLDER = Path("build", "native")
SANITIZED_FOLDER = Path("build", "sanitized")
POLICIES = ("auto", "require", "skip")


class NothingToBuild(Exception):
    """This library has no place on this machine: never an error."""


class CannotBuild(Exception):
    """This library belongs here and could not be built: an error if MVIT_KERNELS_BUILD=require."""


# -- What is built ---------------------------------------------------------------------------------

# `kernel_avx512.cpp` is compiled with the flags of "avx512"; whether the processor has it is asked when it
# runs. From the lowest level to the highest: the order of linking depends on it (see `write_ninja`).
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    "avx512bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16"
    " -mprefer-vector-width=512",
}
X86_64 = ("x86_64", "amd64")

# -O0: a third of the time of -O1 to compile, and no access is optimised away. An error ends the process.
OPTIMISED = ["-O3"]
SANITIZED = ["-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Plan:
    """How one library is compiled: everything `write_ninja` and build_info.json need."""

    objects: list[tuple[Path, str]]  # source, and its compile command up to input and output; in link order
    link: str
    info: dict[str, object]  # what build_info.json tells about it


def plan_cpu() -> Plan:
    """csrc/cpu/*.cpp with the C++ compiler; the baseline is the compiler's own, never -march=native."""
    sources = sorted(Path("csrc", "cpu").glob("*.cpp"))
    if not sources:
        raise NothingToBuild("no sources: csrc/cpu has no .cpp file")
    if sys.platform != "linux":
        raise NothingToBuild(f"the C++ library is built on Linux only, and this is {sys.platform}")
    torch_folder, torch_version = find_torch()
    compiler = find_compiler()

    levels = {source: isa_level(source) for source in sources}
    wanted = [level for level in ISA_FLAGS if level in levels.values()]
    built = [level for level in wanted if takes_flags(compiler, ISA_FLAGS[level])]
    # The dispatching source asks `#if MVIT_HAVE_AVX512`: defined iff files of that level are in the library.
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    defines += [f"-DMVIT_HAVE_{level.upper()}=1" for level in built]
    mode = SANITIZED if sanitizing() else OPTIMISED
    flags = [*mode, "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", *defines]
    # -isystem: torch's headers, kept from our warnings
    headers = [f"-isystem{torch_folder / 'include' / sub}" for sub in (".", "torch/csrc/api/include")]

    def command(level: str | None) -> str:
        return f"{shlex.join([*compiler, *flags, *headers])} {ISA_FLAGS[level] if level else ''}".rstrip()

    order: list[str | None] = [None, *built]
    objects = [(s, command(level)) for level in order for s in sources if levels[s] == level]
    # No rpath: the process that loads the library has torch, whose libtorch_cpu.so bears the name asked for.
    # With -z defs a symbol that torch does not have fails here and not at the user's.
    link = shlex.join([*compiler, *mode, "-shared", "-fopenmp", "-Wl,-z,defs", "-Wl,--as-needed"])
    link_libraries = shlex.join([f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
    info = {
        "compiler": first_line([*compiler, "--version"]),
        "flags": flags,
        "isa": built,
        "isa_left_out": [level for level in wanted if level not in built],
        "torch": torch_version,
    }
    return Plan(objects, f"{link} $in {link_libraries} -o $out", info)


# Ampere's code runs on all of 8.x, Hopper's on 9.0; what is newer gets its own from PTX by the driver, once. A minute
# of compiling on two cores; each further architecture is half a minute.
ARCHITECTURES = "8.0;9.0+PTX"


def plan_cuda() -> Plan:
    """csrc/cuda: kernels in .cu files with nvcc, which never sees torch's headers (7 s a file), their bindings in .cpp
    files with the C++ compiler."""
    kernels, bindings = (sorted(Path("csrc", "cuda").glob(pattern)) for pattern in ("*.cu", "*.cpp"))
    if not kernels:
        raise NothingToBuild("no sources: csrc/cuda has no .cu file")
    if sys.platform != "linux":
        raise NothingToBuild(f"the CUDA library is built on Linux only, and this is {sys.platform}")
    if sanitizing():
        raise NothingToBuild("sanitizers are for the C++ library")
    nvcc = find_nvcc()
    torch_folder, torch_version = find_torch()
    compiler = find_compiler()
    architectures = cuda_architectures()
    toolkit = toolkit_paths(nvcc)

    code = [f"-gencode=arch=compute_{a},code=[{','.join(codes)}]" for a, codes in architectures.items()]
    kernel_flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]
    flags = ["-std=c++20", *OPTIMISED, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    headers = [f"-isystem{torch_folder / 'include' / sub}" for sub in (".", "torch/csrc/api/include")]
    headers += [f"-isystem{path}" for path in toolkit["INCLUDES"]]
    # nvcc's -ccbin is the path of a compiler, and takes no arguments.
    compile_kernel = shlex.join([nvcc, f"-ccbin={shutil.which(compiler[-1])}", *kernel_flags])
    compile_binding = shlex.join([*compiler, *flags, *headers])
    objects = [(s, compile_kernel) for s in kernels] + [(s, compile_binding) for s in bindings]
    # CUDA's runtime is linked in, with its names kept to ourselves: another version may be in the process, of torch's,
    # and the library is to load where there is none. torch's CUDA part is reached through libtorch.so, which a torch
    # without CUDA has too; what only the former defines is declared weak (csrc/cuda/tensors.h), so that -z defs lets it
    # be and the library loads beside the latter.
    link = [*compiler, *OPTIMISED, "-shared", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    libraries += [*(f"-L{path}" for path in toolkit["LIBRARIES"]), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    info = {
        "compiler": f"{nvcc_version(nvcc)} and {first_line([*compiler, '--version'])}",
        "flags": [*kernel_flags, *flags],
        "architectures": [name for codes in architectures.values() for name in codes],
        "torch": torch_version,
    }
    return Plan(objects, f"{shlex.join(link)} $in {shlex.join(libraries)} -o $out", info)


# A library's name and the function that plans it.
LIBRARIES: dict[str, Callable[[], Plan]] = {"cpu": plan_cpu, "cuda": plan_cuda}


def sanitizing() -> bool:
    return os.environ.get("MVIT_KERNELS_SANITIZE", "") == "1"


# -- What it is built with -------------------------------------------------------------------------


def isa_level(source: Path) -> str | None:
    """The level of ISA_FLAGS that the file's name ends in, or None for a file every processor runs."""
    level = source.stem.rpartition("_")[2]
    return level if level in ISA_FLAGS else None


def find_torch() -> tuple[Path, str]:
    """torch's folder and version, found without the second that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch is not importable in the build's environment: install torch first, then "
            "`pip install --no-build-isolation .` (pip's isolated environment has no torch)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise CannotBuild(f"torch {version} lacks the stable ABI that is needed: install torch 2.10 or newer")
    return Path(spec.submodule_search_locations[0]), version


def find_compiler() -> list[str]:
    """$CXX, which may carry arguments ("ccache g++"), else the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise CannotBuild(f"no C++ compiler: CXX names {named[0]!r}, which is not on the PATH")
    compiler = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise CannotBuild("no C++ compiler: none of c++, g++, clang++ is on the PATH (or set CXX)")
    return compiler


def find_nvcc() -> str:
    """CUDA's compiler: of $CUDA_HOME or $CUDA_PATH, the PATH, or the usual folder."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        nvcc = Path(named, "bin", "nvcc")
        if not nvcc.exists():
            raise CannotBuild(f"no CUDA compiler: CUDA_HOME is {named!r}, and there is no {nvcc}")
        return str(nvcc)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise NothingToBuild(
            "no CUDA compiler: nvcc is neither on the PATH nor in /usr/local/cuda (or set CUDA_HOME); the kernels in "
            "CUDA C++ want a CUDA toolkit, and nothing else does"
        )
    return nvcc


def nvcc_version(nvcc: str) -> str:
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next((f"nvcc {part[1:]}" for part in printed.split() if part.startswith("V")), "nvcc")


def toolkit_paths(nvcc: str) -> dict[str, list[str]]:
    """The toolkit's folders of headers and libraries, as nvcc itself would name them to the C++ compiler."""
    command = [nvcc, "-dryrun", "-E", "-x", "cu", os.devnull]
    printed = subprocess.run(command, capture_output=True, text=True).stderr
    paths: dict[str, list[str]] = {"INCLUDES": [], "LIBRARIES": []}
    for line in printed.splitlines():
        name, equals, value = line.removeprefix("#$ ").partition("=")
        if equals and name in paths:
            paths[name] = [os.path.normpath(option[2:]) for option in shlex.split(value)]
    if not all(paths.values()):
        raise CannotBuild(f"{nvcc} does not tell where its headers and libraries are: {printed.strip()[-200:]!r}")
    return paths


def cuda_architectures() -> dict[str, list[str]]:
    """$TORCH_CUDA_ARCH_LIST, as the code to generate for each virtual architecture."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    found: dict[str, list[str]] = {}
    for entry in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; numbers such as 8.0 or 9.0+PTX are wanted, between semicolons"
            )
        major, minor, variant, ptx = match.groups()
        if int(major) < 8:
            continue
        number = f"{major}{minor}{variant}"
        found[number] = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
    if not found:
        raise NothingToBuild(
            f"TORCH_CUDA_ARCH_LIST is {wanted!r}, and the kernels want compute capability 8.0 or newer"
        )
    return found


def takes_flags(compiler: list[str], flags: str) -> bool:
    """Whether the compiler knows these flags for this processor: old ones lack avx512bf16, Arm has none."""
    if platform.machine().lower() not in X86_64:
        return False
    command = [*compiler, *flags.split(), "-Werror", "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def find_ninja() -> str:
    """The Python package's ninja, which is not on the PATH of an environment not activated, or another."""
    with contextlib.suppress(ImportError):
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.exists():
            return str(packaged)
    found = shutil.which("ninja")
    if not found:
        raise CannotBuild("ninja was not found: `pip install ninja`")
    return found


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


# -- Building --------------------------------------------------------------------------------------


def write_ninja(path: Path, plan: Plan, target: str) -> None:
    """Write the ninja file; ninja rebuilds what a changed source, header (torch's too) or command touches.

    Files are linked from the lowest instruction set to the highest. Of an inline function that several files
    compile (from a header of ours, of torch or of the C++ library) the linker keeps the first: in this order
    the one that every processor which gets there can run.
    """

    def quoted(file: Path) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(text: str) -> str:
        return text.replace("$", "$$").replace("$$in", "$in").replace("$$out", "$out")

    folder = path.parent
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {quoted(folder)}",
        "rule compile",
        "  command = $compile -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $in",
        "rule link",
        f"  command = {command(plan.link)}",
        "  description = linking $out",
    ]
    objects = []
    for source, compile_command in plan.objects:
        objects.append(quoted(folder / f"{source.name}.o"))
        lines += [f"build {objects[-1]}: compile {quoted(source)}", f"  compile = {command(compile_command)}"]
    lines.append(f"build {quoted(folder / target)}: link {' '.join(objects)}")
    path.write_text("\n".join(lines) + "\n")


def run_ninja(ninja_file: Path) -> None:
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise CannotBuild(f"MAX_JOBS must be a whole number above 0, and it is {jobs!r}")
    command = [find_ninja(), "-f", str(ninja_file), *(["-j", jobs] if jobs else [])]
    # `make -j` leaves the name of its job server here, which does not reach through to us.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    first_error = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if "no work to do" not in line:
                print(line, end="", flush=True)
            if not first_error and ("error:" in line or "undefined reference" in line):
                first_error = line.strip()
    if process.returncode:
        raise CannotBuild(f"compile error: {first_error or 'see the output of `make build`'}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one build at a time into `folder`: ninja itself lets in two, which spoil each other's files."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_library(name: str, destination: Path) -> dict[str, object]:
    """Build one library into `destination`; return its entry of build_info.json."""
    plan = LIBRARIES[name]()
    target = f"libmvit_kernels_{name}.so"
    folder = (SANITIZED_FOLDER if sanitizing() else BUILD_FOLDER) / name
    with locked(folder):
        write_ninja(folder / "build.ninja", plan, target)
        run_ninja(folder / "build.ninja")
        built, installed = folder / target, destination / target
        if not installed.exists() or installed.read_bytes() != built.read_bytes():
            # Replaced as a whole: a process that has the old library mapped keeps the old one.
            shutil.copy2(built, installed.with_suffix(".new"))
            os.replace(installed.with_suffix(".new"), installed)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built.stat().st_mtime))
    return {"built": True, "library": target, "time": when, **plan.info}


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
        destination = SANITIZED_FOLDER if sanitizing() else base / LIBRARY_FOLDER
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
