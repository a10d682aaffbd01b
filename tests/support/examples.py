# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ on a tiny folder of images: in a process of their own, or in the test's."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
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


def run_apart(*arguments: object, cwd: Path, torchrun: int = 0) -> str:
    """Run an example in a process of its own, or in `torchrun` ones; what it printed."""
    name, *rest = arguments
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
    command = [*(python if torchrun else python[:1]), str(EXAMPLES / str(name)), *map(str, rest)]
    # One thread: on a busy machine two are slower. No GPU: the test is the same everywhere.
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ | settings)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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
