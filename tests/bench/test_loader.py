# SPDX-License-Identifier: Apache-2.0
"""benchmarks/loader.py: the loader alone beside a training step."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from support import ROOT

pytest.importorskip("timm")


@pytest.fixture
def loader():
    spec = importlib.util.spec_from_file_location("loader_benchmark", ROOT / "benchmarks" / "loader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_loader_and_each_step_has_a_line(loader, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.jpg")
    monkeypatch.setattr(loader, "SIZE", 64)
    options = "--batch 2 --workers 0,1 --seconds 0.05 --rounds 1".split()
    monkeypatch.setattr(sys, "argv", ["loader.py", str(tmp_path), *options])
    loader.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 photos, the first 50 × 40; ")
    assert [line.split("  ")[1] for line in lines[1:4]] == ["read and decode", "transforms", "collate"]
    step, *loaders = [line.split() for line in lines[6:]]
    assert step[:3] == ["step", "of", "own/xxs"] and float(step[4]) > 0
    modes = ["256 px", "multi-scale", "multi-scale, bytes"]
    assert [" ".join(words[1:-5]) for words in loaders] == [mode for mode in modes for _ in range(2)]
    for words in loaders:
        batch, workers, rate, cpu, ratio = map(float, words[-5:])
        assert batch == 2 and workers in (0, 1) and cpu > 0
        assert ratio == pytest.approx(rate / float(step[4]), abs=0.02, rel=0.05)
