# SPDX-License-Identifier: Apache-2.0
"""What is known about the compiled libraries: what was built, why one was not, and the command that builds it here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE = Path(__file__).resolve().parent.parent
_COMPILERS = {"cpu": ("c++", "g++", "clang++"), "cuda": ("nvcc", "/usr/local/cuda/bin/nvcc")}
_TOOLS = {"cpu": "a C++ compiler (on Debian and Ubuntu: apt install g++)", "cuda": "a CUDA toolkit"}


def build_info(folder: Path) -> dict[str, dict[str, Any]]:
    """What the build noted in `folder`, the package's ``lib``: for each library, what was built and how, or why not.

    Without a readable note the one entry is called "all" and says so.
    """
    path = folder / "build_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"all": {"built": False, "reason": f"{path} does not exist"}}
    except ValueError:
        return {"all": {"built": False, "reason": f"{path} is damaged; build again"}}


def why_not_built(name: str, folder: Path) -> str:
    """Why `folder` has no library called `name`, "cpu" or "cuda", as the build noted it; "" where it noted nothing.

    What the build said to do about it is left out: `how_to_build` says it for the installed package.
    """
    why = str(build_info(folder).get(name, {}).get("reason", ""))
    before, command, _ = why.partition("`")
    return before.rpartition(":")[0] or before if command else why


def how_to_build(name: str) -> str:
    """What to do for the library `name`, "cpu" or "cuda": a sentence with a command for this very installation.

    Example:
        >>> how_to_build("cpu")
        'to build it, run `python -m pip install --no-build-isolation --no-deps --force-reinstall /src`'
    """
    if os.environ.get("MVIT_KERNELS_LIBRARIES"):
        return "unset MVIT_KERNELS_LIBRARIES, which names another folder of libraries"
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    compilers = (os.environ.get("CXX" if name == "cpu" else "CUDACXX"), *_COMPILERS[name])
    ready = any(compiler and shutil.which(compiler) for compiler in compilers)
    return f"to build it, {'' if ready else f'install {_TOOLS[name]} and '}run `{_command()}`"


def _command() -> str:
    python = os.path.normpath(sys.executable)
    python = "python" if shutil.which("python") == python else shlex.quote(python)
    wanted = [tool for tool in ("cmake", "ninja") if not (importlib.util.find_spec(tool) or shutil.which(tool))]
    if _version("setuptools") < 77:
        wanted.append("'setuptools>=77'")
    tools = f"{python} -m pip install {' '.join(wanted)} && " if wanted else ""
    checkout = PACKAGE.parent
    if (checkout / "setup.py").exists() and (checkout / "csrc").is_dir():
        return f"cd {shlex.quote(str(checkout))} && {tools}{python} setup.py build_native --inplace"
    install = f"{python} -m pip install --no-build-isolation --no-deps --force-reinstall"
    return f"{tools}{install} {_source() or 'FOLDER` with FOLDER that of its source, which has setup.py and csrc`'}"


def _version(package: str) -> int:
    """The first number of an installed package's version; 0 if it is not installed."""
    try:
        return int(importlib.metadata.version(package).partition(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0


def _source() -> str:
    """What pip installed the package from (PEP 610), quoted for a shell, if it has the sources still; else ""."""
    try:
        origin = json.loads(importlib.metadata.distribution("mvit_kernels").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return shlex.quote(f"mvit_kernels @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
    path = Path(url2pathname(urlsplit(url).path))
    if url.startswith("file:") and ((path / "csrc").is_dir() or (path.is_file() and path.suffix == ".gz")):
        return shlex.quote(str(path))
    return ""
