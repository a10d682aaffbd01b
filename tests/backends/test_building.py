# SPDX-License-Identifier: Apache-2.0
"""The command that builds the libraries: one that works where the package lies, and nothing that is there already."""

import importlib.metadata
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from mvit_kernels.backends import building
from mvit_kernels.backends.building import how_to_build, why_not_built
from support import ROOT


@pytest.fixture(autouse=True)
def everything_else_is_there(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("MVIT_KERNELS_LIBRARIES", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if name == "python" else f"/usr/bin/{name}")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "80.1")


def installed_from(monkeypatch, tmp_path, origin):
    """The package in a site-packages, as pip installs it from `origin`."""
    monkeypatch.setattr(building, "PACKAGE", tmp_path / "site-packages" / "mvit_kernels")
    distribution = SimpleNamespace(read_text=lambda name: origin and json.dumps(origin))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)


def test_in_a_checkout():
    assert how_to_build("cpu") == f"to build it, run `cd {ROOT} && python setup.py build_native --inplace`"


INSTALL = "python -m pip install --no-build-isolation --no-deps --force-reinstall"


def test_installed_from_a_folder(monkeypatch, tmp_path):
    source = tmp_path / "a folder"
    (source / "csrc").mkdir(parents=True)
    installed_from(monkeypatch, tmp_path, {"url": source.as_uri(), "dir_info": {}})
    assert how_to_build("cpu") == f"to build it, run `{INSTALL} '{source}'`"
    (source / "csrc").rmdir()  # it was moved since
    assert how_to_build("cpu").startswith(f"to build it, run `{INSTALL} FOLDER`")


def test_installed_from_elsewhere(monkeypatch, tmp_path):
    vcs = {"url": "https://host/repository", "vcs_info": {"vcs": "git", "commit_id": "1234"}}
    installed_from(monkeypatch, tmp_path, vcs)
    assert how_to_build("cpu").endswith(f"{INSTALL} 'mvit_kernels @ git+https://host/repository@1234'`")
    installed_from(monkeypatch, tmp_path, None)  # from an index
    assert "with FOLDER that of its source" in how_to_build("cuda")


def test_only_what_is_missing_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "65.5.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    told = how_to_build("cpu")
    assert told.startswith("to build it, install a C++ compiler") and "apt install g++" in told
    assert f"&& {sys.executable} -m pip install cmake ninja 'setuptools>=77' && {sys.executable} setup.py" in told
    assert "install a CUDA toolkit and run" in how_to_build("cuda")


def test_where_no_command_helps(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert how_to_build("cpu") == "it is built on Linux only, and this is darwin"
    monkeypatch.setenv("MVIT_KERNELS_LIBRARIES", "/nowhere")
    assert how_to_build("cpu").startswith("unset MVIT_KERNELS_LIBRARIES")


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        ("cmake was not found: `pip install cmake`", "cmake was not found"),
        ("no torch: install it, then `pip install .` (pip's has none)", "no torch"),
        ("compile error: a.cpp:3: error: no", "compile error: a.cpp:3: error: no"),
    ],
)
def test_why_it_was_not_built(tmp_path, noted, told):
    """Without the build's own advice, which is not about the installed package."""
    (tmp_path / "build_info.json").write_text(json.dumps({"cpu": {"built": False, "reason": noted}}))
    assert why_not_built("cpu", tmp_path) == told and why_not_built("cuda", tmp_path) == ""
