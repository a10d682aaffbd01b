# SPDX-License-Identifier: Apache-2.0
"""Segmentation as a training task: DeepLabv3 on photos with index masks, by torchvision's transforms and mIoU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._utils.third_party import import_torchmetrics
from . import Task, bare
from .masks import IGNORED, MaskSet, Pair, read_mask, read_masks
from .networks import build_network, steady_norms
from .parts import Part, read_parts
from .pixels import normalised, read_pixels, transforms, tv_tensors

if TYPE_CHECKING:
    from torch import nn

    from ..recipe import Recipe


class Segmentation(Task):
    """Trains `mvit_kernels.MobileViTDeepLabV3`.

    Example:
        >>> task = Segmentation(read_recipe("deeplabv3_finetune"))
        >>> training, validation = task.open(Path("camvid"), validation=0.25)

    A target is a mask of numbers of classes, int64, 255 for none: in training of the network's input's size, in
    validation of the photo's own, in which it is scored.
    """

    name = "segmentation"
    metric = "miou"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._names: tuple[str, ...] = ()

    def open(self, folder: Path, *, validation: float | None) -> tuple[Dataset, Dataset]:
        def read(part: Part, classes: Sequence[str] | None) -> MaskSet:
            return read_masks(part.folder, classes=classes, stems=part.stems)

        training, held, remark = read_parts(folder, "Segmentation", read, validation, self.classes)
        self.remarks += [remark] if remark else []
        self._names = classes = (training or held).classes
        return (
            _Photos(training.samples if training else (), classes, self.recipe, training=True),
            _Photos(held.samples if held else (), classes, self.recipe, training=False),
        )

    def build(self, classes: Sequence[str], checkpoint: Path | None) -> nn.Module:
        self._names = tuple(classes)
        return build_network(self, "deeplabv3", classes, checkpoint)

    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        return torch.stack([image for image, _ in samples]), [mask for _, mask in samples]

    def losses(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        masks, network = torch.stack(list(targets)).to(images.device), bare(model)
        with steady_norms([network.aspp.pool], len(images)):
            return network.loss(model(images), masks, ignore_index=IGNORED)

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Any]], device: torch.device) -> dict[str, Any]:
        """Intersection over union, of all pixels of a class in all photos, at the size of the photos' own masks.

        Returns:
            miou, the mean over the classes that occur; pixel_accuracy; `per_class`, the IoU of each, None where it
            neither occurs nor was predicted; and the confusion matrix.
        """
        matrix = import_torchmetrics().classification.MulticlassConfusionMatrix
        metric = matrix(len(self._names), ignore_index=IGNORED, validate_args=False).to(device)
        for images, masks in batches:
            with torch.inference_mode():
                logits = model(images.to(device))
                for i, mask in enumerate(masks):
                    predicted = bare(model).segment(logits[i : i + 1], tuple(mask.shape))
                    metric.update(predicted, mask[None].to(device))
        return figures(metric.compute().cpu())


def figures(confusion: Tensor) -> dict[str, Any]:
    """Figures from numbers of pixels: rows are true classes, columns predicted ones."""
    pixels = confusion.double()
    right, union = pixels.diagonal(), pixels.sum(0) + pixels.sum(1) - pixels.diagonal()
    iou = torch.where(union > 0, right / union, torch.nan)
    return {
        "miou": iou.nanmean().item() if (union > 0).any() else 0.0,
        "pixel_accuracy": (right.sum() / pixels.sum().clamp(min=1)).item(),
        "per_class": [value if seen else None for value, seen in zip(iou.tolist(), union.tolist(), strict=True)],
        "confusion": confusion.tolist(),
    }


class _Photos(Dataset):
    """Photos and masks at the size that each is asked for at."""

    def __init__(self, samples: Sequence[Pair], classes: tuple[str, ...], recipe: Recipe, training: bool) -> None:
        self.samples = samples
        self.classes = classes
        self.names = [pair.image.name for pair in samples]
        self.recipe = recipe
        self.training = training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> tuple[Tensor, Tensor]:
        index, size = key
        pair = self.samples[index]
        image = read_pixels(pair.image)
        mask = torch.from_numpy(read_mask(pair.mask))
        if self.training:
            image, mask = _augmented(image, mask.to(torch.uint8), size, self.recipe)
        else:
            image = transforms().functional.resize(image, list(size), antialias=True)
        return normalised(image, self.recipe), mask.as_subclass(Tensor).long()


def _augmented(image: Tensor, mask: Tensor, size: tuple[int, int], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Resized by a random factor, padded and cropped to `size`, flipped and distorted, as published.

    The recipe's range of the short side is for its own size; at another size of the multi-scale sampler it scales with
    it.
    """
    v2, chance = transforms(), recipe.augmentation
    low, high = chance.short_side
    short = torch.empty((), device="cpu").uniform_(low, high).item() * min(size) / min(recipe.size)
    scale = short / min(image.shape[-2:])
    resized = [max(1, round(side * scale)) for side in image.shape[-2:]]
    image = v2.functional.resize(image, resized, antialias=True)
    # "Exact" has its pixels where the image has them; torchvision's own choice for masks is off by half a pixel.
    exact = v2.InterpolationMode.NEAREST_EXACT
    mask = tv_tensors().Mask(v2.functional.resize(mask[None], resized, exact)[0])
    fill = {tv_tensors().Image: [255 * value for value in recipe.mean], tv_tensors().Mask: IGNORED}
    image, mask = v2.RandomCrop(list(size), pad_if_needed=True, fill=fill)(image, mask)
    image, mask = v2.RandomHorizontalFlip(chance.flip)(image, mask)
    image, mask = v2.RandomVerticalFlip(chance.vertical_flip)(image, mask)
    if chance.photometric:
        image = v2.RandomPhotometricDistort(p=chance.photometric)(image)
    return image, mask
