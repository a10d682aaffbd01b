# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels classify``: the most probable classes of photos, by an accelerated and frozen model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..zoo import logits
from ..zoo.builders import is_huggingface
from . import add_command, print_json
from .labels import read_labels
from .models import add_model_arguments, check_size, load_model, positive
from .photos import add_photo_arguments, each_photo

if TYPE_CHECKING:
    from torch import Tensor, nn

_EXAMPLES = """\
  mvit-kernels classify cat.jpg dog.jpg --checkpoint mobilevit_s.safetensors --labels imagenet.txt
  mvit-kernels classify cat.jpg --model apple/mobilevit-small --pretrained
  mvit-kernels classify photos/*.png --checkpoint land_use.pth --labels class_indices.json --size 224 \\
      --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

The exit code is 0, 1 if some photos could not be read, 2 for any other error."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "classify",
        run,
        summary="the most probable classes of each photo",
        description="Classifies photos with an accelerated and frozen model. As the published models "
        "require, photos are resized, cropped at the centre and scaled to 0 … 1; a model that was "
        "trained otherwise needs --mean and --std.",
        examples=_EXAMPLES,
    )
    add_model_arguments(parser)
    photos, result = add_photo_arguments(parser)
    photos.add_argument(
        "--resize",
        type=positive,
        metavar="N",
        help="short side before the crop to --size (default: size × 256 / 224)",
    )
    result.add_argument("--topk", type=positive, metavar="K", default=5, help="how many classes (default: 5)")


def run(args: argparse.Namespace) -> int:
    if not (args.checkpoint or args.pretrained):
        raise ValueError("no weights were given; give --checkpoint FILE, or --model NAME --pretrained")
    import torch

    from .. import accelerate, freeze
    from ..zoo.images import preprocess

    check_size(args, len(args.images))
    labels = read_labels(args.labels) if args.labels else None
    bgr = is_huggingface(args.model) and args.pretrained if args.bgr is None else args.bgr
    # All photos before the model, so that a broken one is reported at once.
    failed: list[str] = []
    images, inputs = [], []
    for place, image in each_photo(args.images, failed):
        images.append(args.images[place])
        inputs.append(preprocess(image, args.size, args.resize, args.mean, args.std, bgr))
    photos = torch.stack(inputs)
    model = accelerate(load_model(args), backend=args.backend)
    names = _names(model, labels, args.pretrained)
    if not args.no_freeze:
        model = freeze(model)
    probabilities = _probabilities(model, photos.to(getattr(torch, args.dtype)), args.batch, args.device)
    if labels is not None and len(labels) != probabilities.shape[1]:
        classes = probabilities.shape[1]
        background = " (is the first one the background, which TensorFlow's lists begin with?)"
        raise ValueError(
            f"{args.labels} has {len(labels)} labels, and the model {classes} classes; give the labels that belong to "
            f"the model{background if len(labels) == classes + 1 else ''}"
        )

    results = []
    for path, row in zip(images, probabilities, strict=True):
        top = row.topk(min(args.topk, len(row)))
        predictions = [
            {"index": index, "label": names.get(index, str(index)), "probability": probability}
            for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        results.append({"image": path, "predictions": predictions})
    if args.json:
        print_json(results)
    else:
        print("\n".join(map(_text, results)))
    return 1 if failed else 0


def _names(model: nn.Module, labels: dict[int, str] | None, pretrained: bool) -> Mapping[int, str]:
    """The labels that were given, or those that a model with published weights knows, or none."""
    from ..freezing.description import known_labels

    if labels is not None:
        return labels
    return dict(enumerate(known_labels(model) or ())) if pretrained else {}


def _probabilities(model: nn.Module, photos: Tensor, batch: int, device: str) -> Tensor:
    """Probabilities, (photos, classes), float32 on the CPU."""
    import torch

    with torch.inference_mode():
        parts = [logits(model(part.to(device))).float().cpu() for part in photos.split(batch)]
    scores = torch.cat(parts)
    if scores.ndim != 2:
        raise ValueError(f"the model returns maps of shape {tuple(scores.shape[1:])}: it has no classifier")
    if not torch.isfinite(scores).all():
        raise ValueError("the model returned logits that are not finite; try --dtype float32, or other weights")
    return scores.softmax(dim=1)


def _text(result: dict[str, Any]) -> str:
    lines = [result["image"]]
    for each in result["predictions"]:
        lines.append(f"  {each['probability']:7.2%}  {each['label']}")
    return "\n".join(lines)
