# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels segment``: the class of every pixel of photos, by an accelerated and frozen DeepLabv3."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import add_command
from .photos import Network, add_network_arguments, each_photo, finish, load_network, outputs, save_picture

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_EXAMPLES = """\
  mvit-kernels segment street.jpg --checkpoint runs/segmentation/best.pth
  mvit-kernels segment photos/*.jpg --checkpoint deeplabv3.safetensors --labels config.json --bgr --masks
  mvit-kernels segment street.jpg --checkpoint best.pth --json > street.json

The exit code is 0, 1 if some photos could not be read, 2 for any other error."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "segment",
        run,
        summary="the class of every pixel of photos, as a picture with a legend",
        description="Finds the class of every pixel of photos with an accelerated and frozen DeepLabv3. Writes "
        "each photo under the classes' colours beside a legend, and the classes' shares as JSON.",
        examples=_EXAMPLES,
    )
    result = add_network_arguments(
        parser,
        "deeplabv3/xxs, deeplabv3/xs, deeplabv3/s (or xxs, xs, s; default: the checkpoint's variant), or with "
        "--pretrained the hub's name, such as apple/deeplabv3-mobilevit-small",
        "segmented",
        512,
    )
    result.add_argument(
        "--masks", action="store_true", help="also write NAME_mask.png, whose pixels are the numbers of the classes"
    )


def run(args: argparse.Namespace) -> int:
    from .pictures import class_shares, draw_mask, index_image

    paths = outputs(args.images, args.out, ("", "_mask") if args.masks else ("",))
    network = load_network(args, "segmentation", "deeplabv3", "segment", 512)
    names = _names(args, network)
    args.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    results = []
    for place, image in each_photo(args.images, failed):
        mask = _segment(args, network, image)
        picture, *others = paths[place]
        save_picture(picture, draw_mask(image, mask, names))
        for path in others:
            save_picture(path, index_image(mask, len(names)))
        shares = class_shares(mask, len(names))
        present = sorted((index for index in range(len(names)) if shares[index]), key=lambda index: -shares[index])
        results.append(
            {
                "image": args.images[place],
                "width": image.width,
                "height": image.height,
                "picture": str(picture),
                **({"mask": str(others[0])} if others else {}),
                "classes": [{"index": i, "name": names[i], "share": round(shares[i], 6)} for i in present],
            }
        )
    finish(args, "segments.json", results, _text)
    return 1 if failed else 0


def _segment(args: argparse.Namespace, network: Network, image: Image.Image) -> np.ndarray:
    """The class of each of the photo's pixels, (height, width)."""
    import torch
    import torch.nn.functional as F

    from ..zoo import logits

    size = (image.height, image.width)
    with torch.inference_mode():
        output = logits(network.model(network.input(image, args.device)))
        if not torch.isfinite(output).all():
            raise ValueError("the model returned values that are not finite; try --dtype float32, or other weights")
        if hasattr(network.model, "segment"):
            mask = network.model.segment(output, size)
        else:  # Hugging Face's own model
            mask = F.interpolate(output.float(), size=size, mode="bilinear", align_corners=False).argmax(1)
    return mask[0].cpu().numpy()


def _names(args: argparse.Namespace, network: Network) -> list[str]:
    """A name for each class."""
    model, names = network.model, network.names
    classes = model.num_classes if hasattr(model, "num_classes") else model.config.num_labels
    if names is None:
        return [f"class {number}" for number in range(classes)]
    if len(names) != classes:
        raise ValueError(
            f"{args.labels or args.checkpoint} has {len(names)} labels, and the model {classes} classes; give the "
            f"labels that belong to the model{' (is the background missing?)' if len(names) == classes - 1 else ''}"
        )
    return names


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['image']} -> {result['picture']}"]
    for each in result["classes"]:
        lines.append(f"  {each['share']:7.2%}  {each['name']}")
    return "\n".join(lines)
