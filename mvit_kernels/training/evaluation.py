# SPDX-License-Identifier: Apache-2.0
"""Figures of a checkpoint on a folder: plain, accelerated or frozen."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import accelerate, freeze, restore
from .assembly import Settings
from .loading import evaluation_loader
from .processes import processes
from .recipe import Recipe, changed
from .saving import describe
from .tasks import task_of

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    figures: dict[str, Any]  # of the task, such as "top1", "per_class" and "confusion"
    classes: tuple[str, ...]
    samples: int
    seconds: float  # of the evaluation, images' loading included
    recipe: Recipe
    remarks: tuple[str, ...]


def evaluate(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    task: str | None = None,
    changes: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
) -> Evaluation:
    """Score a checkpoint on the samples in `folder`: those of val/, or all where there is no split.

    Example:
        >>> evaluate("photos", "runs/photos/best.pth", frozen=True).figures["top1"]
        0.96

    Args:
        folder: as for training.
        checkpoint: of a training by this package, or weights in any layout.
        task: "classification", "detection" or "segmentation"; None for the checkpoint's.
        changes: to the recipe's keys, such as size, mean, std or model; see `read_recipe`.
        labels: names of the checkpoint's classes, by index; by default those that it has, or the folder's.
        frozen: evaluate `mvit_kernels.freeze` of the model.
        dtype: of weights and images.
        settings: device, workers, accelerate, backend and validation count; a share for the latter evaluates the part
            that a training with this share holds back.

    Raises:
        ValueError: samples or a checkpoint that cannot be used, or that do not fit each other.
        OSError, ImportError: as `mvit_kernels.load_checkpoint`.
    """
    path, settings = Path(checkpoint), settings or Settings()
    described = describe(path)
    if task is not None and described.task not in (None, task):
        raise ValueError(f"--task {task}: {path} is of {described.task}")
    recipe = described.recipe or Recipe(task or described.task or "classification")
    recipe = changed(recipe, changes or {}, str(path))
    with processes(settings.device) as group:
        doing = task_of(recipe)
        doing.labels = doing.classes = labels or described.classes
        doing.new_head, doing.annotations = False, settings.annotations
        share = 1.0 if settings.validation is None else settings.validation
        _, samples = doing.open(Path(folder), validation=share)
        if not len(samples):
            raise ValueError(f"{folder} has no sample to evaluate")
        model = doing.build(samples.classes, path).eval()
        model = accelerate(model, backend=settings.backend) if settings.accelerate else restore(model)
        layout = torch.channels_last if settings.channels_last else torch.preserve_format
        model = model.to(group.device, dtype, memory_format=layout)
        if frozen:
            model = freeze(model)
        batches = evaluation_loader(doing, samples, settings, group)
        start = time.perf_counter()
        with torch.no_grad():
            figures = doing.evaluate(model, ((images.to(dtype), targets) for images, targets in batches), group.device)
        seconds = time.perf_counter() - start
    return Evaluation(figures, tuple(samples.classes), len(samples), seconds, recipe, tuple(doing.remarks))
