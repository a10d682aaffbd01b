# SPDX-License-Identifier: Apache-2.0
"""The sources that include torch's headers, compiled with those of the oldest versions: `make test-oldest`.

pip downloads each wheel (PyPI's has 900 MB; the cache of pip keeps it), of which the headers stay in
``build/torch_headers``. Nothing is linked: that the libraries need no newer symbol, torch-abi-audit says
(tests/packaging/test_release.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import ROOT
from support.torch_names import LIST, OLDEST, used, words

HEADERS = ROOT / "build" / "torch_headers"
# And the one after it, whose headers differ in other places.
VERSIONS = (OLDEST, "2.11.0")
TARGETS = {"cpu": "fronts", "cuda": "bindings"}  # the objects that include torch's headers, of each project


@pytest.fixture(scope="module", params=VERSIONS)
def headers(request) -> Path:
    """A folder that has torch's headers, and that CMake takes for an installed torch of that version."""
    folder = HEADERS / request.param
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"torch=={request.param}"]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as file:
            wanted = re.compile(r"torch/include/torch/|torch/version\.py$|torch-[^/]*\.dist-info/METADATA$")
            file.extractall(folder, [name for name in file.namelist() if wanted.match(name)])
        wheel.unlink()
        (folder / "torch" / "__init__.py").touch()  # else an installed torch is found before this folder
        (folder / "complete").touch()
    return folder


@pytest.mark.parametrize("project", TARGETS)
def test_it_compiles(headers, project):
    build = ROOT / "build" / "oldest" / headers.name / project
    environment = {**os.environ, "PYTHONPATH": str(headers)}
    cmake = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        ROOT / "csrc" / project,
        "-B",
        build,
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    done = subprocess.run(cmake, env=environment, capture_output=True, text=True)
    if project == "cuda" and "no CUDA compiler" in done.stdout + done.stderr:
        pytest.skip("no CUDA compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'"torch" : "{headers.name}' in (build / "build_info.json").read_text()
    done = subprocess.run(["ninja", "-C", build, TARGETS[project]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]


def test_the_names_that_the_sources_use(headers):
    """All are declared there; the list of those that the oldest has is written anew."""
    names = used()
    assert not {name: files for name, files in names.items() if name not in words(headers / "torch" / "include")}
    if headers.name == OLDEST:
        LIST.write_text("".join(f"{name}\n" for name in sorted(names)))
