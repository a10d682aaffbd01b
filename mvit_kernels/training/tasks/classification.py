# SPDX-License-Identifier: Apache-2.0
"""Classification: photos in a folder a class, any MobileViT with a classifier, accuracy and a confusion matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..._utils.text import some
from ..._utils.third_party import import_torchmetrics, import_torchvision
from ...checkpoints import VARIANT_OF_WIDTH, Checkpoint, convert_state_dict, load_into, read_checkpoint
from ...zoo import logits
from ...zoo.builders import builder, is_huggingface
from ...zoo.images import load_image, preprocess
from ..recipe import Recipe
from ..saving import describe
from ..seeds import held_back
from ..sized import SizedDataset
from . import HELD_BACK, Task
from .photos import check_images, image_files

__all__ = ["Classification", "Photos"]

_HEAD = re.compile(r"(^|\.)(classifier|head)\.")
# After the attention's output projection and after the MLP: timm, Hugging Face, own.
_DROPOUT = re.compile(r"(attn\.proj_drop|mlp\.drop2|\.output\.dropout|\.transformer\.\d+\.dropout)$")
_CLASSIFIER_DROPOUT = ("head.drop", "dropout")  # timm, Hugging Face


class Photos(Dataset):
    """Photos and the indices of their classes: ``photos[index]`` is (RGB image, class).

    Attributes:
        classes: names of the classes.
        names: ``class/file`` of each photo.
    """

    def __init__(self, paths: Sequence[Path], targets: Sequence[int], names: Sequence[str], classes: Sequence[str]):
        self.paths, self.targets, self.names, self.classes = list(paths), list(targets), list(names), tuple(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return load_image(self.paths[index]), self.targets[index]

    def part(self, indices: Iterable[int]) -> Photos:
        """The photos of these indices."""
        indices = list(indices)
        columns = ([column[i] for i in indices] for column in (self.paths, self.targets, self.names))
        return Photos(*columns, self.classes)


class Augmented(NamedTuple):
    """For training: (height, width) -> random resized crop, flips, and the paper's nothing else; see `SizedDataset`."""

    recipe: Recipe

    def __call__(self, size: tuple[int, int]) -> Callable[[Any], Tensor]:
        import_torchvision()
        from torchvision.transforms import v2

        random = self.recipe.augmentation
        whole = random.area == (1.0, 1.0)
        steps = [v2.Resize(size) if whole else v2.RandomResizedCrop(size, random.area, random.ratio)]
        if random.flip:
            steps.append(v2.RandomHorizontalFlip(random.flip))
        if random.vertical_flip:
            steps.append(v2.RandomVerticalFlip(random.vertical_flip))
        if random.photometric:
            steps.append(v2.RandomApply([v2.RandomPhotometricDistort()], random.photometric))
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        return v2.Compose([*steps, v2.Normalize(list(self.recipe.mean), list(self.recipe.std))])


class Plain(NamedTuple):
    """For validation: (height, width) -> resize and centre crop, as ``mvit-kernels classify`` does."""

    recipe: Recipe

    def __call__(self, size: tuple[int, int]) -> Callable[[Any], Tensor]:
        recipe = self.recipe
        resize = recipe.resize if size == recipe.size else None
        return lambda image: preprocess(image, size, resize, recipe.mean, recipe.std)


class Classification(Task):
    """A folder ``DIR/train/<class>/…`` with ``DIR/val/<class>/…``, or ``DIR/<class>/…`` with a part held back."""

    name = "classification"
    metric = "top1"

    def open(self, folder: Path, *, validation: float | None) -> tuple[Dataset, Dataset]:
        import_torchmetrics()  # that it is missing should not be found after the first epoch
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give the folder that has train/ and val/, or a folder a class")
        train_folder, val_folder = _layout(folder)
        classes = tuple(self.classes or _classes(train_folder or val_folder))
        train = _photos(train_folder, classes, self.classes is None) if train_folder else Photos([], [], [], classes)
        if val_folder:
            if validation is not None and 0 < validation < 1:
                raise ValueError(
                    f"{folder} has photos for validation in {val_folder.name}/; leave out --validation {validation:g}"
                )
            val = _photos(val_folder, classes, False)
        else:
            share = HELD_BACK if validation is None else validation
            chosen = _chosen(train, share)
            val, train = train.part(sorted(chosen)), train.part(i for i in range(len(train)) if i not in chosen)
            if 0 < share < 1:
                self.remarks.append(
                    f"{len(val)} of {len(train) + len(val)} photos are held back for validation, {share:.0%} a class"
                )
        if not len(train) and validation != 1:
            raise ValueError(f"{folder} has no photo to train with; give more photos, or a smaller --validation")
        check_images([*train.paths, *val.paths])
        return SizedDataset(train, Augmented(self.recipe)), SizedDataset(val, Plain(self.recipe))

    def build(self, classes: Sequence[str], checkpoint: Path | None) -> nn.Module:
        recipe = self.recipe
        if checkpoint is None:  # else it has better weights than the hub: those of a resumed training
            model = builder(recipe.model or "own/s", recipe.pretrained)(len(classes))
            if recipe.pretrained and is_huggingface(recipe.model):
                stem = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
                stem.data = stem.data.flip(1)
                self.remarks.append(f"{recipe.model} wants BGR images: its stem's channels are flipped to take RGB")
            _set_dropout(model, recipe)
            return model
        what = f"--checkpoint {checkpoint}"
        read, described = read_checkpoint(checkpoint, what), describe(checkpoint)
        own = convert_state_dict(read.state_dict, "own")
        variant = VARIANT_OF_WIDTH.get(own["stages.4.1.norm.weight"].numel())
        model = builder(recipe.model or f"own/{variant or 's'}", False)(len(classes))
        _set_dropout(model, recipe)
        self._fit_classifier(own, model, classes, self.labels or described.classes, checkpoint)
        # Our own files have averaged weights beside the last ones, which need not be told.
        load_into(model, Checkpoint(own, read.remarks if described.recipe is None else []), what)
        return model

    def _fit_classifier(
        self,
        own: dict[str, Tensor],
        model: nn.Module,
        classes: Sequence[str],
        names: Sequence[str] | None,
        path: Path,
    ) -> None:
        """Make the classifier in `own`, of the classes `names`, one for `classes`: its rows by name, or a new one."""
        count = len(own["classifier.bias"]) if "classifier.bias" in own else 0
        if names is not None and len(names) != count:
            raise ValueError(f"{path} has a classifier of {count} classes, and {len(names)} names for them")
        if not self.new_head and count:
            if names is not None and set(classes) <= set(names):
                if tuple(names) != tuple(classes):
                    rows = [list(names).index(name) for name in classes]
                    for key in ("classifier.weight", "classifier.bias"):
                        own[key] = own[key][rows]
                    self.remarks.append(
                        f"the classifier's rows are taken by name from the checkpoint's {count} classes"
                    )
                return
            common = set(names or ()).intersection(classes)
            if names is not None and (common or count == len(classes) or self.new_head is False):
                strange = [name for name in classes if name not in names]
                raise ValueError(
                    f"{path} knows {count} classes, and not {some(strange)} of the folder's {len(classes)}; rename the "
                    "folders, or train a new classifier with --new-head"
                )
            if names is None and count == len(classes):
                self.remarks.append(
                    f"the checkpoint has {count} classes without names: they are taken for the folder's, in its order"
                )
                return
        if self.new_head is False:
            raise ValueError(
                f"{path} has {count or 'no'} classes and the folder {len(classes)}; name the checkpoint's with "
                "--labels FILE, or fine-tune it first"
            )
        fresh = convert_state_dict(model.state_dict(), "own")
        own.update({key: fresh[key] for key in ("classifier.weight", "classifier.bias")})
        before = f"of the checkpoint's {count} classes is replaced by a new one" if count else "is new"
        self.remarks.append(f"the classifier {before} for {len(classes)}")

    def is_head(self, name: str) -> bool:
        return _HEAD.search(name) is not None

    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        images, targets = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(targets, device="cpu")

    def losses(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        scores = logits(model(images)).float()
        return {"loss": F.cross_entropy(scores, targets, label_smoothing=self.recipe.label_smoothing)}

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Any]], device: torch.device) -> dict[str, Any]:
        metrics = import_torchmetrics()
        confusion, mean, top5 = None, metrics.MeanMetric().to(device), None
        for images, targets in batches:
            scores, targets = logits(model(images.to(device))).float(), targets.to(device)
            if confusion is None:
                confusion, top5 = _metrics(metrics, scores.shape[1], device)
            confusion.update(scores, targets)
            top5.update(scores, targets)
            mean.update(F.cross_entropy(scores, targets), len(targets))
        if confusion is None:  # a share without photos, of more processes than photos
            confusion, top5 = _metrics(metrics, len(self.classes or ()) or _count_classes(model), device)
        matrix, loss, best5 = confusion.compute().cpu(), mean.compute().item(), top5.compute().item()
        right, photos = matrix.diagonal().double(), matrix.sum(1)
        each = [(r / n).item() if n else None for r, n in zip(right, photos, strict=True)]
        figures = {"top1": (right.sum() / photos.sum()).item(), "top5": best5, "loss": loss}
        return {**figures, "per_class": each, "confusion": matrix.tolist()}


def _metrics(metrics: Any, count: int, device: torch.device) -> tuple[Any, Any]:
    task = metrics.classification
    top5 = task.MulticlassAccuracy(count, top_k=min(5, count), average="micro")
    return task.MulticlassConfusionMatrix(count).to(device), top5.to(device)


def _count_classes(model: nn.Module) -> int:
    return [module.out_features for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _layout(folder: Path) -> tuple[Path | None, Path | None]:
    """The folders with the classes of training and of validation; the same folder stands for both until it is split."""
    train = folder / "train"
    val = next((folder / name for name in ("val", "validation", "valid") if (folder / name).is_dir()), None)
    if train.is_dir():
        return train, val
    return (None, val) if val else (folder, None)


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        found = f"one class, {names[0]}" if names else "no folder in it"
        raise ValueError(f"{folder} has {found}; a folder for each of two or more classes is wanted, with its photos")
    return tuple(names)


def _photos(folder: Path, classes: Sequence[str], all_of_them: bool) -> Photos:
    """The photos of the classes in `folder`; `all_of_them`: each class must have some."""
    names = _classes(folder)
    strange = [name for name in names if name not in classes]
    if strange:
        raise ValueError(
            f"{folder} has {some(strange)}, which {'is' if len(strange) == 1 else 'are'} not among the "
            f"{len(classes)} classes {some(classes)}; rename or remove them"
        )
    paths, targets = [], []
    files = {name: image_files(folder / name) for name in names}
    empty = [name for name, found in files.items() if not found]
    if empty and (all_of_them or len(empty) == len(names)):
        raise ValueError(
            f"{folder} has no photos of {len(empty)} of {len(names)} classes: {some(empty)}; add some, or remove the "
            "folders"
        )
    for name, found in files.items():
        paths += found
        targets += [list(classes).index(name)] * len(found)
    return Photos(paths, targets, [path.relative_to(folder).as_posix() for path in paths], classes)


def _chosen(photos: Photos, share: float) -> set[int]:
    """The indices held back: a share of each class."""
    chosen: set[int] = set()
    for target in range(len(photos.classes)):
        own = [index for index, each in enumerate(photos.targets) if each == target]
        if own:
            chosen.update(own[i] for i in held_back([photos.names[index] for index in own], share))
    return chosen


def _set_dropout(model: nn.Module, recipe: Recipe) -> None:
    """The recipe's dropout in a model of any library; None leaves what it has."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            if recipe.dropout is not None and _DROPOUT.search(f".{name}"):
                module.p = recipe.dropout
            elif recipe.classifier_dropout is not None and name in _CLASSIFIER_DROPOUT:
                module.p = recipe.classifier_dropout
    if recipe.classifier_dropout is not None and hasattr(model, "classifier_dropout"):
        model.classifier_dropout = recipe.classifier_dropout
