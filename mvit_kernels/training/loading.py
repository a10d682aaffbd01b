# SPDX-License-Identifier: Apache-2.0
"""From samples to batches on the device: for training by the multi-scale sampler, for evaluation in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .assembly import Settings
from .processes import Processes
from .recipe import Recipe
from .sampler import MultiScaleSampler
from .seeds import SeededSamples
from .tasks import Task

__all__ = ["evaluation_loader", "images_to", "to_device", "training_loader", "training_sampler"]


def training_sampler(recipe: Recipe, training: Dataset, group: Processes) -> MultiScaleSampler:
    scales = recipe.multi_scale
    options: dict[str, Any] = {"multi_scale": False}
    if scales is not None:
        options = {"smallest": scales.smallest, "largest": scales.largest, "count": scales.count}
        options |= {"divisor": scales.divisor, "scale_inc": scales.grow > 1, "scale_epochs": scales.grow_at}
        options |= {"smallest_inc": scales.grow - 1, "largest_inc": scales.grow - 1}
    place = {"rank": group.rank, "world_size": group.count}
    return MultiScaleSampler(training, recipe.batch, size=recipe.size, seed=recipe.seed, **options, **place)


def training_loader(
    task: Task, samples: Dataset, sampler: MultiScaleSampler, settings: Settings, group: Processes
) -> DataLoader:
    """Augmented batches as `sampler` cuts them, each sample seeded by the recipe's seed, its epoch and its index."""
    return _loader(SeededSamples(samples, task.recipe.seed), _WithEpoch(sampler), task, settings, group)


def evaluation_loader(task: Task, samples: Dataset, settings: Settings, group: Processes) -> DataLoader:
    """Each sample once over all processes, in order, at the recipe's size."""
    sampler = MultiScaleSampler(
        samples, task.recipe.batch, size=task.recipe.size, training=False, rank=group.rank, world_size=group.count
    )
    return _loader(samples, sampler, task, settings, group)


def _loader(samples: Dataset, batches: Any, task: Task, settings: Settings, group: Processes) -> DataLoader:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = settings.workers
    if workers is None:
        workers = max(1, min(8, processors // group.local_count))
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=task.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=group.device.type == "cuda",
    )


class _WithEpoch:
    """A batch sampler whose indices carry the epoch, for `SeededSamples`."""

    def __init__(self, sampler: MultiScaleSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        epoch = self.sampler.epoch
        return ([(epoch, pair) for pair in batch] for batch in iter(self.sampler))


def images_to(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """A batch of images on the device."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(each, device) for each in value)
    return value
