# SPDX-License-Identifier: Apache-2.0
"""What `export` says where the library of a phone's target is not installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import mvit_kernels
from support import models

LIBRARIES = {
    "coreml": ("mlpackage", "coremltools"),
    "ncnn": ("param", "pnnx"),
    "litert": ("tflite", "litert_torch"),
    "executorch": ("pte", "executorch"),
}


@pytest.mark.parametrize("target", LIBRARIES)
def test_an_absent_library_is_named_with_its_extra(target, tmp_path, monkeypatch):
    suffix, library = LIBRARIES[target]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == library else found(name, *rest)
    )
    monkeypatch.delitem(sys.modules, library, raising=False)
    with pytest.raises(ImportError, match=rf"{library} is not installed: pip install 'mvit_kernels\[{target}\]'"):
        mvit_kernels.export(models.build("own"), tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())
