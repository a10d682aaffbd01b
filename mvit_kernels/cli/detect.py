# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels detect``: boxes around the objects on photos, by an accelerated and frozen SSDLite."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import add_command
from .models import positive, share
from .photos import Network, add_network_arguments, each_photo, finish, load_network, outputs, save_picture

if TYPE_CHECKING:
    from PIL import Image

_EXAMPLES = """\
  mvit-kernels detect street.jpg --checkpoint runs/detection/best.pth
  mvit-kernels detect photos/*.jpg --checkpoint ssdlite_s.pt --labels coco.txt --score 0.5 --out found
  mvit-kernels detect street.jpg --checkpoint best.pth --json > street.json

The exit code is 0, 1 if some photos could not be read, 2 for any other error."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "detect",
        run,
        summary="boxes, names and scores of the objects on photos",
        description="Finds objects on photos with an accelerated and frozen SSDLite. Writes each photo with "
        "boxes, names and scores, and all of them as JSON, in pixels of the photo.",
        examples=_EXAMPLES,
    )
    result = add_network_arguments(
        parser, "ssdlite/xxs, ssdlite/xs, ssdlite/s (or xxs, xs, s; default: the checkpoint's variant)", "detected", 320
    )
    result.add_argument("--score", type=share, metavar="S", default=0.3, help="least score of a box (default: 0.3)")
    result.add_argument(
        "--iou",
        type=share,
        metavar="S",
        default=0.5,
        help="of two boxes of a class that overlap more, the better one is kept (default: 0.5)",
    )
    result.add_argument("--most", type=positive, metavar="N", default=100, help="boxes of a photo (default: 100)")


def run(args: argparse.Namespace) -> int:
    from .pictures import draw_boxes

    if args.pretrained:
        raise ValueError("--pretrained: no weights of a detector are published on the hub; give --checkpoint FILE")
    paths = outputs(args.images, args.out)
    network = load_network(args, "detection", "ssdlite", "detect", 320)
    names = _names(args, network)
    args.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    results = []
    for place, image in each_photo(args.images, failed):
        objects = _detect(args, network, image, names)
        picture = draw_boxes(
            image,
            [each["box"] for each in objects],
            [each["label"] - 1 for each in objects],
            [f"{each['name']} {each['score']:.0%}" for each in objects],
        )
        save_picture(paths[place][0], picture)
        results.append(
            {
                "image": args.images[place],
                "width": image.width,
                "height": image.height,
                "picture": str(paths[place][0]),
                "objects": objects,
            }
        )
    finish(args, "detections.json", results, _text)
    return 1 if failed else 0


def _detect(args: argparse.Namespace, network: Network, image: Image.Image, names: list[str]) -> list[dict[str, Any]]:
    """The objects on a photo, the most certain first."""
    import torch

    with torch.inference_mode():
        output = network.model(network.input(image, args.device))
        if not all(torch.isfinite(each).all() for each in output):
            raise ValueError("the model returned values that are not finite; try --dtype float32, or other weights")
        found = network.model.detect(output, network.size, score=args.score, iou=args.iou, most=args.most)[0]
    scale = torch.tensor([image.width / network.size[1], image.height / network.size[0]] * 2, device="cpu")
    boxes = (found["boxes"].float().cpu() * scale).tolist()
    return [
        {
            "label": label,
            "name": names[label - 1],
            "score": round(score, 4),
            "box": [round(edge, 2) for edge in box],
        }
        for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True)
    ]


def _names(args: argparse.Namespace, network: Network) -> list[str]:
    """A name for each class but the background."""
    count = network.model.num_classes - 1
    names = network.names
    if names is None:
        return [f"class {number}" for number in range(1, count + 1)]
    if len(names) == count + 1 and names[0].strip("_ ").lower() in ("background", "bg"):
        names = names[1:]
    if len(names) != count:
        raise ValueError(
            f"{args.labels or args.checkpoint} has {len(names)} labels, and the model {count} classes beside the "
            "background; give the labels that belong to the model"
        )
    return names


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['image']} -> {result['picture']}"]
    for each in result["objects"]:
        box = ", ".join(f"{edge:.0f}" for edge in each["box"])
        lines.append(f"  {each['score']:7.2%}  {each['name']}  [{box}]")
    return "\n".join(lines if result["objects"] else [*lines, "  nothing"])
