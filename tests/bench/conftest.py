# SPDX-License-Identifier: Apache-2.0
"""What the tests of measurements share."""

import importlib
import sys

import pytest

from mvit_kernels.bench import ceilings
from support import ROOT


@pytest.fixture
def quick_ceilings(monkeypatch):
    """The machine's rates, measured in no time."""
    monkeypatch.setattr(ceilings, "SQUARES", {"cpu": (32, 64)})
    monkeypatch.setattr(ceilings, "CONVOLUTION", (8, 6))
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(ceilings, "SECONDS", {"cpu": 0.01})


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ as a module."""
    yield from _importing(ROOT / "benchmarks", monkeypatch)


@pytest.fixture
def part(monkeypatch):
    """Import a part of the script for GPUs as a module."""
    yield from _importing(ROOT / "benchmarks" / "gpu_run", monkeypatch)


def _importing(folder, monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
