# SPDX-License-Identifier: Apache-2.0
"""Copies of the package, for the tests of its imports, builds and wheels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import ROOT
from support.builds import PACKAGE


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
