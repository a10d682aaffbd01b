# SPDX-License-Identifier: Apache-2.0
"""What a task is to the training loop: its data, its network, its losses and its figures."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from ..recipe import Recipe

__all__ = ["HELD_BACK", "TASKS", "Task", "bare", "task_of"]

TASKS = ("classification", "detection", "segmentation")
HELD_BACK = 0.2  # share of the samples, where the folder has no validation samples of its own


class Task(ABC):
    """One kind of training, for `mvit_kernels.training.loop`.

    Attributes:
        name: as in a recipe.
        metric: the figure of `evaluate` that decides which weights are best; higher is better.
        recipe: as given.
        classes: if set before `open`, the classes in this order: those of a checkpoint that is evaluated. The samples'
            classes must be among them, and need not be all of them.
        labels: names of the checkpoint's classes where they are known from elsewhere (``--labels``), by index.
        new_head: replace the checkpoint's classifier whatever it is; False never to replace it, and to raise instead;
            None to replace one for other classes, with a remark.
        annotations: of detection, the COCO file where it is not in the folder (``--annotations``).
        remarks: sentences for the user, appended by `open` and `build`: what was held back, replaced or left out.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.classes: Sequence[str] | None = None
        self.labels: Sequence[str] | None = None
        self.new_head: bool | None = None
        self.annotations: Path | None = None
        self.remarks: list[str] = []

    @abstractmethod
    def open(self, folder: Path, *, validation: float | None) -> tuple[Dataset, Dataset]:
        """The training and the validation samples. Everything that can be wrong with them is found here.

        Args:
            folder: as the user gives it.
            validation: share of the samples that is held back where the folder has no validation samples of its own,
                chosen by `mvit_kernels.training.seeds.held_back`; 0 for none, 1 for all of them (then no training
                sample is needed, as for ``mvit-kernels evaluate``); None for `HELD_BACK`.

        Returns:
            Two datasets (either may be empty) with ``classes: tuple[str, ...]`` (without the background), for which
            ``dataset[index, (height, width)]`` is an image, float32 (3, height, width), minus the recipe's mean over
            its std, and a target; augmented if it is for training. Random draws come from Python's ``random``, NumPy's
            and PyTorch's global CPU generators alone, which the loop seeds for each sample. They may have
            ``names: Sequence[str]``, by which a resumed training knows that it has the same samples.

        Raises:
            ValueError: no samples, classes without samples, files that cannot be read (all of them counted, the first
                few named), targets that do not fit; a share given where the folder has validation samples.
        """

    @abstractmethod
    def build(self, classes: Sequence[str], checkpoint: Path | None) -> nn.Module:
        """The network for these classes, on the CPU in float32, with the checkpoint's weights.

        A head for other classes is replaced, and a remark says so.

        Raises:
            ValueError: an unknown model, or a checkpoint that does not fit it or the classes.
        """

    @abstractmethod
    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """Samples as a batch: images (B, 3, h, w), and targets: tensors, or lists or dicts of them."""

    @abstractmethod
    def losses(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """ "loss", which is minimised, and others to be logged. It calls `model` itself, which DDP may wrap, once.

        Methods of the network are found on ``bare(model)``. It runs under autocast if the recipe says so.
        """

    def is_head(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the head, which learns at `head_lr_factor` times the rate."""
        return not name.startswith("backbone.")

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Any]], device: torch.device) -> dict[str, Any]:
        """Figures of a model in evaluation mode: `metric` and others, as floats, lists, or dicts of them.

        Args:
            model: the network, or a frozen copy.
            batches: validation batches, on the CPU. Under DDP each process has its own share of the samples, perhaps
                none, and torchmetrics brings the figures together: every process must get to ``compute``.
            device: of the model.

        A key "confusion" with a list of rows (true class) of columns (predicted class) is written to a file of its own.
        """


def bare(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if inner is None:
            return model
        model = inner


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    module = importlib.import_module(f"{__name__}.{recipe.task}")
    return getattr(module, recipe.task.capitalize())(recipe)
