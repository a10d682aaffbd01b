# SPDX-License-Identifier: Apache-2.0
"""`make test-wheel`: the wheel in dist/, installed into a clean environment and used from an empty folder.

    python release/try_wheel.py                                            # this Python, pip's newest torch
    python release/try_wheel.py --python python3.10 --torch 2.10.0         # the oldest pair
    python release/try_wheel.py --environment .venv                        # an environment that has torch

pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, …) decide which build of torch it is; PyPI's, for CUDA, takes several
gigabytes. An environment that this made is removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path | None = None) -> None:
    # Neither this checkout nor what it is set to may reach the installed package.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MVIT_KERNELS_")) and name != "VIRTUAL_ENV"
    }
    status = subprocess.run([str(word) for word in command], cwd=cwd, env=environment).returncode
    if status:
        raise SystemExit(f"error: {' '.join(map(str, command))}: exit status {status} (see above)")


def find_wheel(folder: Path) -> Path:
    """The newest wheel in `folder` for this processor."""
    wheels = sorted(folder.glob(f"mvit_kernels-*-py3-none-*_{platform.machine()}.whl"), key=os.path.getmtime)
    if not wheels:
        raise SystemExit(f"error: there is no wheel for {platform.machine()} in {folder}: make wheel")
    return wheels[-1]


def try_wheel(wheel: Path, python: Path, torch: str | None) -> None:
    """Install `wheel` into the environment of `python`, with `torch` if that is a requirement, and use it."""
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    if torch:
        run(*pip, torch, wheel)
    else:  # the environment has what it needs
        run(*pip, "--no-deps", "--force-reinstall", wheel)
    with tempfile.TemporaryDirectory() as empty:
        run(python, "-I", ROOT / "release" / "first_use.py", cwd=Path(empty))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="default: the newest in dist/ for this processor")
    parser.add_argument("--python", default=sys.executable, help="makes the environment; default: this one")
    parser.add_argument("--torch", default="", help="its version, such as 2.10.0; default: pip's newest")
    parser.add_argument("--environment", type=Path, help="use this one, which has torch and numpy, and leave it there")
    arguments = parser.parse_args()
    wheel = arguments.wheel or find_wheel(ROOT / "dist")
    if not wheel.is_file():
        raise SystemExit(f"error: --wheel: there is no file {wheel}")
    if arguments.environment:
        python = arguments.environment.absolute() / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"error: --environment: there is no {python}")
        try_wheel(wheel.resolve(), python, None)
        return
    folder = ROOT / "build" / "environment-of-test-wheel"
    try:
        run(arguments.python, "-m", "venv", "--clear", folder)
        try_wheel(
            wheel.resolve(), folder / "bin" / "python", f"torch=={arguments.torch}" if arguments.torch else "torch"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
