# SPDX-License-Identifier: Apache-2.0
"""Real photos and a real checkpoint for the tests, which skip with the reason where these are absent."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from . import ROOT

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def data_path(*parts: str) -> Path:
    """A path in the test data, which must exist, or the test is skipped."""
    default = ROOT / ".." / "shared" / "data"
    path = Path(os.environ.get("MVIT_KERNELS_TEST_DATA", default)).resolve().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs test data at {path}; set MVIT_KERNELS_TEST_DATA to the folder that has it")
    return path


def land_use_checkpoint() -> Path:
    """A trained MobileViT-XXS with cvnets' keys and 21 classes, which gets all ten photos right."""
    return data_path("land_use", "mobilevit_xxs_land_use21.pth")


@functools.cache
def land_use_classes() -> tuple[str, ...]:
    """The names of its 21 classes."""
    names = json.loads(data_path("land_use", "class_indices.json").read_text())
    return tuple(names[str(index)] for index in range(len(names)))


@functools.cache
def land_use_photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten photos as the checkpoint wants them, (10, 3, 224, 224), and their labels, (10,); read only."""
    paths = sorted(data_path("land_use", "photos").glob("*.png"))
    labels = [land_use_classes().index(path.stem.rstrip("0123456789")) for path in paths]
    return torch.stack([preprocess(path) for path in paths]), torch.tensor(labels)


def preprocess(path: Path, size: int = 224, resize: int = 256) -> torch.Tensor:
    """RGB, short side to `resize` (bilinear), centre crop, ImageNet mean and deviation: (3, size, size)."""
    image = Image.open(path).convert("RGB")
    scale = resize / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1).contiguous()
