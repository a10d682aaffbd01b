# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ on a tiny folder of images, in the test's process."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image

from . import ROOT

EXAMPLES = ROOT / "examples"


def image_folder(root: Path, count: int = 4, side: int = 64) -> Path:
    """Two classes, reddish and bluish, of `count` noisy images each."""
    rng = np.random.default_rng(0)
    for name, colour in {"blue": (30, 30, 200), "red": (200, 30, 30)}.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(colour + rng.normal(0, 30, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def run_here(monkeypatch, name: str, *arguments: object) -> dict:
    """Run an example in this process, which has imported its libraries; the names that it defined."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with mock.patch.dict(os.environ):  # Hugging Face's Trainer leaves its precision there, for the next one
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def load(name: str) -> ModuleType:
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
