# SPDX-License-Identifier: Apache-2.0
"""Single-shot detection around a network: default boxes, the multibox loss, and boxes from the network's output.

The pieces are torchvision's (`DefaultBoxGenerator`, `BoxCoder`, `Matcher`, `batched_nms`), with the settings that
were published with MobileViT. It is imported at the first call: the network's forward pass does without it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.third_party import import_torchvision

__all__ = ["SSDOutput", "anchors_per_cell", "default_boxes", "detections", "multibox_loss"]

# Beside two squares, each map has a wide and a tall box of each aspect ratio; scales of the maps, and one beyond.
_ASPECT_RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))
_SMALLEST, _LARGEST = 0.1, 1.05
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # the inverse of the variances: 0.1 of the centre, 0.2 of the size
_MATCH_IOU = 0.5
_NEGATIVES = 3  # for each anchor with an object, of the same image


class SSDOutput(NamedTuple):
    """What a single-shot detector says of a batch: A anchors, K classes, of which class 0 is the background."""

    logits: Tensor  # (B, A, K)
    offsets: Tensor  # (B, A, 4): from the anchor to the box, in `BoxCoder`'s code


def anchors_per_cell() -> tuple[int, ...]:
    """The number of anchors at each pixel of each of the six maps."""
    return tuple(2 + 2 * len(ratios) for ratios in _ASPECT_RATIOS)


def default_boxes(
    maps: Sequence[tuple[int, int]], size: tuple[int, int], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """The anchors of six maps.

    Example:
        >>> default_boxes([(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)], (320, 320), "cpu", torch.float32).shape
        torch.Size([3232, 4])

    Args:
        maps: (height, width) of each map.
        size: (height, width) of the images.
        device, dtype: of the result.

    Returns:
        `(A, 4)`, x1, y1, x2, y2 in pixels: map by map, pixel by pixel, in the order of the network's outputs. It is
        kept for the next call; do not write to it.

    Raises:
        ImportError: torchvision is not installed.

    Liu et al. 2016, arXiv:1512.02325, section 2.2.
    """
    return _default_boxes(tuple(maps), tuple(size), torch.device(device), dtype)


@functools.lru_cache(maxsize=64)  # multi-scale training has some ten sizes
def _default_boxes(
    maps: tuple[tuple[int, int], ...], size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    import_torchvision()
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    # An inference tensor could not be used in training later, nor one of a device that is the default only now.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        steps = len(_ASPECT_RATIOS)
        scales = [_SMALLEST + (_LARGEST - _SMALLEST) * step / steps for step in range(steps + 1)]
        generator = DefaultBoxGenerator([list(ratios) for ratios in _ASPECT_RATIOS], scales=scales, clip=True)
        # Of images and maps it reads the sizes, the dtype and the device.
        image = torch.empty(1, dtype=torch.float64, device="cpu")
        images = ImageList(image.expand(1, 1, *size), [size])
        return generator(images, [image.expand(1, 1, *each) for each in maps])[0].to(device=device, dtype=dtype)


def multibox_loss(
    output: SSDOutput, targets: Sequence[Mapping[str, Any]], anchors: Tensor, *, where: str = "multibox_loss"
) -> dict[str, Tensor]:
    """The loss of single-shot detection.

    Example:
        >>> target = {"boxes": torch.tensor([[40.0, 60.0, 200.0, 240.0]]), "labels": torch.tensor([3])}
        >>> multibox_loss(model(images), [target] * len(images), model.anchors(320, 320))["loss"].backward()

    An anchor belongs to the box with which its IoU is largest, if that is 0.5 or more; the anchor with the largest IoU
    of all belongs to a box in any case (if it is that of several boxes, to the last of them). Anchors of no box belong
    to the background. The loss has two terms, both divided by the number of anchors that have a box (by 1 if none has
    one): smooth L1 of these anchors' offsets, and cross-entropy of these anchors and of three times as many of the
    background's in the same image, those with the largest loss. An image without boxes adds nothing.

    Args:
        output: of the network for B images, in any floating dtype; computed in float32, or float64 if it is float64.
        targets: for each image a mapping with `boxes`, (n, 4), x1, y1, x2, y2 in the anchors' pixels, and `labels`,
            (n,), 1 to K - 1. They are moved to the output's device; n may be 0.
        anchors: (A, 4).
        where: names the caller in messages.

    Returns:
        `loss`, and its terms `classification` and `localization`: scalars.

    Raises:
        ValueError: there is not one target for each image; boxes that are not (n, 4), not finite, or without extent
            (x2 <= x1 or y2 <= y1); labels outside 1 to K - 1.
        TypeError: a target that is not a mapping with tensors of these names; labels that are not integers.
        ImportError: torchvision is not installed.

    Liu et al. 2016, arXiv:1512.02325, section 2.2, equations 1 to 3.
    """
    import_torchvision()
    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.ops import box_iou

    logits, offsets = map(_at_least_float32, output)
    boxes, labels = _checked_targets(targets, logits, where)
    anchors = anchors.to(logits)
    batch, count, classes = logits.shape
    with torch.autocast(logits.device.type, enabled=False):
        matcher = Matcher(_MATCH_IOU, _MATCH_IOU)
        box_of = torch.full((batch, count), -1, device=logits.device)  # index into all boxes; -1: the background
        start = 0
        for image, own in enumerate(boxes):
            if len(own):
                iou = box_iou(own, anchors)
                match = matcher(iou)
                # As SSDMatcher, which on a GPU leaves open which one of several boxes with one best anchor it keeps.
                last = torch.full_like(match, -1)
                last.scatter_reduce_(0, iou.argmax(1), torch.arange(len(own), device=match.device), "amax")
                match = torch.where(last >= 0, last, match)
                box_of[image] = torch.where(match >= 0, match + start, -1)
                start += len(own)
        positive = box_of >= 0
        chosen = box_of[positive]
        total = positive.sum().clamp(min=1)

        wanted = BoxCoder(_BOX_WEIGHTS).encode_single(torch.cat(boxes)[chosen], anchors.expand(batch, -1, -1)[positive])
        localization = F.smooth_l1_loss(offsets[positive], wanted, reduction="sum") / total

        label_of = torch.zeros_like(box_of)
        label_of[positive] = torch.cat(labels)[chosen]
        entropy = F.cross_entropy(logits.flatten(0, 1), label_of.flatten(), reduction="none").view(batch, count)
        hardness = entropy.detach().masked_fill(positive, -torch.inf)
        rank = hardness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        counted = positive | (rank < _NEGATIVES * positive.sum(1, keepdim=True))
        classification = entropy[counted].sum() / total
    return {
        "loss": classification + localization,
        "classification": classification,
        "localization": localization,
    }


@torch.no_grad()
def detections(
    output: SSDOutput,
    anchors: Tensor,
    size: tuple[int, int],
    *,
    score: float = 0.01,
    iou: float = 0.5,
    top: int = 400,
    most: int = 200,
    where: str = "detections",
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels from a single-shot detector's output.

    Example:
        >>> detections(model(images), model.anchors(320, 320), (320, 320), score=0.5)[0]["boxes"].shape
        torch.Size([2, 4])

    Per class, the `top` best of the boxes with a larger softmax than `score` remain, and of boxes that overlap by more
    than `iou` the better one (non-maximum suppression). The best `most` boxes of all classes are returned, cut to the
    image. The defaults are the published ones, for computing mAP; to show boxes, take a score of about 0.5.

    Args:
        output: of the network for B images, in any floating dtype.
        anchors: (A, 4).
        size: (height, width) of the images, in the anchors' pixels.
        score: scores must be larger than this.
        iou: largest overlap of two boxes of a class.
        top: most boxes of a class of an image before suppression.
        most: most boxes of an image.
        where: names the caller in messages.

    Returns:
        For each image a dict of `boxes`, (n, 4), x1, y1, x2, y2 in pixels, float32, `scores`, (n,), float32, falling,
        and `labels`, (n,), int64, 1 to K - 1.

    Raises:
        ValueError: `score` or `iou` outside 0 to 1, `top` or `most` below 1.
        ImportError: torchvision is not installed.
    """
    import_torchvision()
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import batched_nms, clip_boxes_to_image

    for name, value in {"score": score, "iou": iou}.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{where}: {name}={value} is no share; give 0 <= {name} <= 1")
    for name, value in {"top": top, "most": most}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name}={value!r} is not a count; give an integer of 1 or more")
    coder = BoxCoder(_BOX_WEIGHTS)
    results = []
    with torch.autocast(output.logits.device.type, enabled=False):
        for logits, offsets in zip(output.logits.float(), output.offsets.float(), strict=True):
            boxes = coder.decode_single(offsets, anchors.to(offsets))
            scores = logits.softmax(-1)[:, 1:].t().contiguous()  # (K - 1, A)
            passing = scores > score
            if passing.shape[1] > top and passing.sum(1).max() > top:
                best = torch.zeros_like(passing).scatter_(1, scores.topk(top, dim=1).indices, True)
                passing &= best
            classes, anchor = passing.nonzero(as_tuple=True)
            found, boxes = scores[classes, anchor], boxes[anchor]
            keep = batched_nms(boxes, found, classes, iou)[:most]
            boxes = clip_boxes_to_image(boxes[keep], size)
            results.append({"boxes": boxes, "scores": found[keep], "labels": classes[keep] + 1})
    return results


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _checked_targets(
    targets: Sequence[Mapping[str, Any]], logits: Tensor, where: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Each image's boxes, in the dtype and on the device of `logits`, and labels; everything in them is checked."""
    batch, _, classes = logits.shape
    if isinstance(targets, Mapping) or not isinstance(targets, Sequence):
        raise TypeError(f"{where}: targets is {type(targets).__name__}; a list of dicts is wanted, one for each image")
    if len(targets) != batch:
        raise ValueError(f"{where}: there are {len(targets)} targets and {batch} images; give one for each image")
    boxes, labels = [], []
    for image, target in enumerate(targets):
        name = f"{where}: targets[{image}]"
        if not isinstance(target, Mapping):
            raise TypeError(f"{name} is {type(target).__name__}; a dict of 'boxes' and 'labels' is wanted")
        for key in ("boxes", "labels"):
            if not isinstance(target.get(key), Tensor):
                kind = type(target[key]).__name__ if key in target else "missing"
                raise TypeError(f"{name}[{key!r}] is {kind}; a tensor is wanted")
        own, kinds = target["boxes"], target["labels"]
        form = getattr(own, "format", None)  # torchvision's tv_tensors.BoundingBoxes
        if form is not None and form.value != "XYXY":
            raise ValueError(f"{name}['boxes'] is in the format {form.value}; convert it to XYXY")
        own, kinds = own.as_subclass(Tensor), kinds.as_subclass(Tensor)
        if kinds.dim() != 1 or own.shape != (len(kinds), 4):
            raise ValueError(
                f"{name} has boxes of shape {tuple(own.shape)} and labels of shape {tuple(kinds.shape)}; (n, 4) and "
                "(n,) are wanted (without objects (0, 4) and (0,))"
            )
        if kinds.is_floating_point() or kinds.is_complex() or kinds.dtype == torch.bool:
            raise TypeError(f"{name}['labels'] is {kinds.dtype}; integers are wanted")
        boxes.append(own.to(logits))
        labels.append(kinds.to(logits.device, torch.int64))
    _check_values(torch.cat(boxes), torch.cat(labels), [len(own) for own in boxes], classes, where)
    return boxes, labels


def _check_values(boxes: Tensor, labels: Tensor, lengths: list[int], classes: int, where: str) -> None:
    """Refuse boxes without extent or not finite, and labels of no class; a GPU is waited for once."""
    sound = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    known = (labels >= 1) & (labels < classes)
    wrong = ~(sound & known)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    image, index = 0, first
    while index >= lengths[image]:
        index -= lengths[image]
        image += 1
    if sound[first]:
        label = int(labels[first])
        hint = "; class 0 is the background, so count the objects' classes from 1" if label == 0 else ""
        raise ValueError(f"{where}: targets[{image}]['labels'][{index}] is {label}; 1 to {classes - 1} is wanted{hint}")
    raise ValueError(
        f"{where}: targets[{image}]['boxes'][{index}] is {[round(value, 3) for value in boxes[first].tolist()]}; "
        "finite x1, y1, x2, y2 with x1 < x2 and y1 < y2 are wanted, in pixels (remove what was cropped away)"
    )
