# SPDX-License-Identifier: Apache-2.0
"""Detection as a training task: SSDLite on photos with boxes, by torchvision's transforms and torchmetrics' mAP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._utils.third_party import import_torchmetrics
from . import Task, bare
from .boxes import BoxSet, Photo, read_boxes
from .networks import build_network, steady_norms
from .parts import Part, read_parts
from .pixels import gathered, normalised, read_pixels, transforms, tv_tensors

if TYPE_CHECKING:
    from torch import nn

    from ..recipe import Recipe

_FIGURES = {"map50": "map_50", "map": "map", "map75": "map_75"}  # our names and torchmetrics'


class Detection(Task):
    """Trains `mvit_kernels.MobileViTSSDLite`.

    Example:
        >>> task = Detection(read_recipe("ssdlite_finetune"))
        >>> training, validation = task.open(Path("raccoon"), validation=0.33)

    A target of training has `boxes` (n, 4), left, top, right, bottom in pixels of the network's input, and `labels`
    (n,), from 1: 0 is the background. One of validation has these too, and those of the photo itself beside.
    """

    name = "detection"
    metric = "map50"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._names: tuple[str, ...] = ()

    def open(self, folder: Path, *, validation: float | None) -> tuple[Dataset, Dataset]:
        def read(part: Part, classes: Sequence[str] | None) -> BoxSet:
            annotations = self.annotations or part.annotations
            return read_boxes(part.folder, annotations=annotations, classes=classes, stems=part.stems)

        training, held, remark = read_parts(
            folder, None if self.annotations else "Main", read, validation, self.classes
        )
        self.remarks += [remark] if remark else []
        self._names = classes = (training or held).classes
        samples = [photo for photo in (training.samples if training else ()) if _trains(photo)]
        if training and not samples:
            raise ValueError(f"{folder} has no box to train on among its {len(training.samples)} training photos")
        if training and len(samples) < len(training.samples):
            self.remarks.append(f"left out of training, without a box: {len(training.samples) - len(samples)} photos")
        return (
            _Photos(samples, classes, self.recipe, training=True),
            _Photos(held.samples if held else (), classes, self.recipe, training=False),
        )

    def build(self, classes: Sequence[str], checkpoint: Path | None) -> nn.Module:
        self._names = tuple(classes)
        return build_network(self, "ssdlite", classes, checkpoint)

    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        return torch.stack([image for image, _ in samples]), [target for _, target in samples]

    def losses(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        network = bare(model)
        with steady_norms([network.extra, network.heads], len(images)):
            return network.loss(model(images), targets, tuple(images.shape[-2:]))

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Any]], device: torch.device) -> dict[str, Any]:
        """mAP as COCO counts it, in pixels of the photos; VOC's difficult objects and COCO's crowds count neither way.

        Returns:
            map50, map (mean over IoU 0.5 to 0.95) and map75; of each class the first two as lists, `per_class` and
            `per_class_map`, with None for a class of which there is no object.
        """
        found = []
        for images, targets in batches:
            size = tuple(images.shape[-2:])
            with torch.inference_mode():
                detections = bare(model).detect(model(images.to(device)), size)
            found += [_pair(detected, target, size) for detected, target in zip(detections, targets, strict=True)]
        return average_precision(gathered(found), self._names)


def average_precision(found: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]], classes: Sequence[str]) -> dict:
    """mAP over photos from torchmetrics, with faster-coco-eval.

    Args:
        found: of each photo what was detected (boxes, scores, labels) and what is there (boxes, labels, iscrowd).
        classes: their names; labels count from 1.
    """
    import_torchmetrics()
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric = MeanAveragePrecision(backend="faster_coco_eval", extended_summary=True, sync_on_compute=False)
    except ImportError as error:  # of torchmetrics, in other words
        raise ImportError(
            "faster-coco-eval, which scores detection, is not installed: pip install 'mvit_kernels[train]'",
            name="faster_coco_eval",
        ) from error
    metric.warn_on_many_detections = False  # the network gives 200 a photo, and COCO counts the best 100
    for detected, there in found:
        metric.update([detected], [there])
    if not found:
        nothing = dict.fromkeys(_FIGURES, 0.0)
        return nothing | {key: [None] * len(classes) for key in ("per_class", "per_class_map")}
    computed = metric.compute()
    # (IoU thresholds, recalls, classes that occur, areas, most detections); -1 where there is no object.
    precision = computed["precision"][..., 0, -1]
    of_class = {int(label): k for k, label in enumerate(computed["classes"].reshape(-1).tolist())}

    def mean(label: int, thresholds: slice) -> float | None:
        values = precision[thresholds, :, of_class[label]] if label in of_class else precision[:0]
        values = values[values > -1]
        return values.mean().item() if values.numel() else None

    labels = range(1, len(classes) + 1)
    return {
        **{ours: max(0.0, computed[theirs].item()) for ours, theirs in _FIGURES.items()},
        "per_class": [mean(label, slice(1)) for label in labels],
        "per_class_map": [mean(label, slice(None)) for label in labels],
    }


def _pair(
    detected: dict[str, Tensor], target: dict[str, Tensor], size: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was detected, in pixels of the photo, and what is there."""
    height, width = target["size"].tolist()
    scale = torch.tensor([width / size[1], height / size[0]] * 2, device="cpu")
    return (
        {
            "boxes": detected["boxes"].float().cpu() * scale,
            "scores": detected["scores"].float().cpu(),
            "labels": detected["labels"].cpu(),
        },
        {"boxes": target["photo_boxes"], "labels": target["photo_labels"], "iscrowd": target["uncounted"]},
    )


def _trains(photo: Photo) -> bool:
    return any(not box.crowd for box in photo.boxes)


class _Photos(Dataset):
    """Photos and targets at the size that each is asked for at."""

    def __init__(self, samples: Sequence[Photo], classes: tuple[str, ...], recipe: Recipe, training: bool) -> None:
        self.samples = samples
        self.classes = classes
        self.names = [photo.path.name for photo in samples]
        self.recipe = recipe
        self.training = training
        self.augment = _Augment(recipe) if training else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
        index, size = key
        photo = self.samples[index]
        image = read_pixels(photo.path)
        boxes = [box for box in photo.boxes if not box.crowd]
        target = {
            "boxes": _boxes([box.edges for box in boxes], image.shape[-2:]),
            "labels": torch.tensor([box.label + 1 for box in boxes], dtype=torch.int64, device="cpu"),
        }
        if self.augment is not None:
            image, target = self.augment(image, target, size)
        else:
            image, target = transforms().Resize(list(size), antialias=True)(image, target)
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        if not self.training:
            target |= {
                "photo_boxes": torch.tensor([box.edges for box in photo.boxes], device="cpu").reshape(-1, 4),
                "photo_labels": torch.tensor([box.label + 1 for box in photo.boxes], dtype=torch.int64, device="cpu"),
                "uncounted": torch.tensor(
                    [box.crowd or box.difficult for box in photo.boxes], dtype=torch.int64, device="cpu"
                ),
                "size": torch.tensor([photo.size[1], photo.size[0]], device="cpu"),
            }
        return normalised(image, self.recipe), target


class _Augment:
    """SSD's crop, flips, the resize and SSD's photometric distortion, as published but for the order.

    The distortion comes last: of 320 × 320 pixels it costs a fraction of what it does of a whole photo, and it treats
    each pixel alone.
    """

    def __init__(self, recipe: Recipe) -> None:
        v2, chance = transforms(), recipe.augmentation
        self.before = v2.Compose(
            [
                v2.RandomApply([v2.RandomIoUCrop()], p=chance.ssd_crop),
                v2.RandomHorizontalFlip(chance.flip),
                v2.RandomVerticalFlip(chance.vertical_flip),
            ]
        )
        distort = [v2.RandomPhotometricDistort(p=chance.photometric)] if chance.photometric else []
        self.after = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1), *distort])

    def __call__(
        self, image: Tensor, target: dict[str, Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.before(image, target)
        return self.after(*transforms().Resize(list(size), antialias=True)(image, target))


def _boxes(edges: Sequence[tuple[float, ...]], canvas: Sequence[int]) -> Tensor:
    data = torch.tensor(edges, dtype=torch.float32, device="cpu").reshape(-1, 4)
    return tv_tensors().BoundingBoxes(data, format="XYXY", canvas_size=tuple(canvas))
