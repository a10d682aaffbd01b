# SPDX-License-Identifier: Apache-2.0
"""What detection and segmentation share below their transforms: torchvision, pixels as tensors, several processes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..._utils.third_party import import_torchvision
from ...zoo.images import load_image

if TYPE_CHECKING:
    from ..recipe import Recipe

Item = TypeVar("Item")


def transforms() -> ModuleType:
    """torchvision.transforms.v2."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2


def tv_tensors() -> ModuleType:
    """torchvision.tv_tensors."""
    import_torchvision()
    from torchvision import tv_tensors

    return tv_tensors


def read_pixels(path: Path) -> Tensor:
    """The photo, upright and in RGB, as a tv_tensors.Image, uint8 (3, height, width)."""
    return transforms().functional.pil_to_tensor(load_image(path)).as_subclass(tv_tensors().Image)


def normalised(image: Tensor, recipe: Recipe) -> Tensor:
    """uint8 pixels as the network's input: in [0, 1], minus the recipe's mean over its std, a plain float32 tensor."""
    image = image.as_subclass(Tensor).float() / 255
    mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in (recipe.mean, recipe.std))
    return ((image - mean) / std).contiguous()


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, in the order of their ranks; those of this one where there is no other.

    By objects, not by torchmetrics: a process may have none, and photos have different numbers of boxes.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return items
    parts: list[list[Item]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
