# SPDX-License-Identifier: Apache-2.0
"""What ``classify``, ``detect`` and ``segment`` share: arguments about photos, and photos one by one; and for the last
two the network, its names, and files."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._utils.files import write_bytes, write_json
from ..zoo import checked_device, load
from ..zoo.builders import VARIANTS, is_huggingface
from . import print_json
from .labels import read_names
from .models import add_model_arguments, check_size, three_numbers

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from ..training.recipe import Recipe

_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def add_photo_arguments(
    parser: argparse.ArgumentParser, mean: str = "0,0,0", std: str = "1,1,1", labels: str = "their numbers"
) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Add what all three commands ask about photos and results; return both groups, for what one asks beside.

    Args:
        parser: of the command.
        mean, std, labels: help on the defaults.
    """
    parser.add_argument("images", nargs="+", metavar="PHOTO", help="a photo in any format that Pillow reads")
    photos = parser.add_argument_group("photos")
    photos.add_argument(
        "--mean", type=three_numbers, metavar="R,G,B", help=f"subtracted from the channels (default: {mean})"
    )
    photos.add_argument(
        "--std", type=three_numbers, metavar="R,G,B", help=f"divisors of the channels, after --mean (default: {std})"
    )
    photos.add_argument(
        "--bgr",
        action=argparse.BooleanOptionalAction,
        help="channels in the order B, G, R (default: for Hugging Face's published weights only)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: JSON (a list, index to name, name to index, a config.json), CSV, or text, one a "
        f"line (default: {labels})",
    )
    result.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else")
    result.add_argument("--no-freeze", action="store_true", help="run the accelerated model without freezing it")
    return photos, result


def add_network_arguments(parser: argparse.ArgumentParser, names: str, out: str, size: int) -> argparse._ArgumentGroup:
    """Add the arguments of ``detect`` and ``segment``; return the group for those of one: results.

    Args:
        parser: of the command.
        names: help on the names of models.
        out: default of --out.
        size: of the network's input, where the checkpoint does not say.
    """
    add_model_arguments(parser, names, None, f"as the checkpoint was trained, else {size}")
    mean = "as the checkpoint was trained, else 0,0,0"
    _, result = add_photo_arguments(parser, mean, "likewise", "the checkpoint's")
    result.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path(out),
        help=f"the pictures, and the results as JSON, are written there (default: {out})",
    )
    return result


class Network(NamedTuple):
    """A model and how photos become its input."""

    model: nn.Module  # frozen, unless --no-freeze
    names: list[str] | None  # of the classes, as the checkpoint or --labels gives them
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    bgr: bool

    def input(self, image: Image.Image, device: str) -> Tensor:
        """The photo as the network's input, (1, 3, height, width): resized whole, not cropped."""
        import numpy as np
        import torch
        from PIL import Image

        resized = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(values, device="cpu")[None, :, None, None] for values in (self.mean, self.std))
        x = (x - mean) / std
        dtype = next((each.dtype for each in self.model.parameters()), torch.float32)
        return (x.flip(1) if self.bgr else x).to(device=device, dtype=dtype)


def load_network(args: argparse.Namespace, task: str, library: str, method: str, size: int) -> Network:
    """The network that the arguments ask for.

    Args:
        args: of `add_network_arguments`.
        task, library: what it must be.
        method: that our own networks for the task have.
        size: of its input, where neither --size nor the checkpoint says.

    Raises:
        ValueError: no weights, weights of another task, labels that cannot be read, an impossible size.
    """
    if not (args.checkpoint or args.pretrained):
        raise ValueError("no weights were given; give --checkpoint FILE")
    import torch

    from .. import accelerate, freeze
    from ..freezing.description import known_labels
    from ..training.saving import Described, describe

    described = describe(args.checkpoint) if args.checkpoint else Described()
    if described.task not in (None, task):
        command = {"classification": "classify", "detection": "detect", "segmentation": "segment"}[described.task]
        raise ValueError(f"{args.checkpoint} is of {described.task}, not of {task}: try mvit-kernels {command}")
    recipe = described.recipe
    args.size = args.size or (recipe.size if recipe else (size, size))
    check_size(argparse.Namespace(**{**vars(args), "batch": 1}))
    if args.std is not None and 0 in args.std:
        raise ValueError(f"--std is {','.join(f'{value:g}' for value in args.std)}; numbers above 0 are wanted")
    names = read_names(args.labels) or list(described.classes or ()) or None
    if args.threads:
        torch.set_num_threads(args.threads)
    name = f"{library}/{args.model}" if args.model in VARIANTS else args.model
    if recipe:
        model = _as_trained(args, name, recipe, described.classes or ())
    else:
        model = load(name, pretrained=args.pretrained, checkpoint=args.checkpoint, device=args.device)
    huggingfaces = task == "segmentation" and type(model).__name__.endswith("SemanticSegmentation")
    if not hasattr(model, method) and not huggingfaces:
        raise ValueError(
            f"{args.checkpoint or args.model} is a {type(model).__name__}, and no network for {task}; train one from "
            f"it: mvit-kernels train DIR --task {task} --checkpoint FILE"
        )
    model = model.to(getattr(torch, args.dtype))
    if names is None and args.pretrained:
        names = known_labels(model)
    model = accelerate(model, backend=None if args.backend == "auto" else args.backend)
    bgr = bool(is_huggingface(args.model) and args.pretrained) if args.bgr is None else args.bgr
    mean = args.mean or (recipe.mean if recipe else (0.0, 0.0, 0.0))
    std = args.std or (recipe.std if recipe else (1.0, 1.0, 1.0))
    return Network(model if args.no_freeze else freeze(model), names, args.size, mean, std, bgr)


def _as_trained(args: argparse.Namespace, name: str | None, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
    """The network of a training's checkpoint: its weights are the same at any output stride, its outputs are not."""
    from ..training.tasks import task_of

    task = task_of(dataclasses.replace(recipe, model=name or recipe.model, pretrained=False))
    task.new_head = False
    return task.build(classes, args.checkpoint).eval().to(checked_device(args.device))


def outputs(images: Sequence[str], folder: Path, endings: Sequence[str] = ("",)) -> list[list[Path]]:
    """Paths in `folder` for each photo, one with each of `endings` before its suffix.

    A photo's name is kept; where two have one, the later is numbered. Endings after the first are for PNG files.

    Raises:
        ValueError: a path is that of a photo, which would be overwritten, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder")
    given = {Path(image).resolve() for image in images}
    taken: set[str] = set()
    paths = []
    for image in images:
        source = Path(image)
        suffix = source.suffix if source.suffix.lower() in _PICTURE_SUFFIXES else ".png"
        stem, number = source.stem, 1
        while stem.lower() in taken:  # of any suffix: the endings and the JSON file have one
            number += 1
            stem = f"{source.stem}-{number}"
        taken.add(stem.lower())
        names = [f"{stem}{ending}{'.png' if place else suffix}" for place, ending in enumerate(endings)]
        paths.append([folder / name for name in names])
    overwritten = [str(path) for each in paths for path in each if path.resolve() in given]
    if overwritten:
        raise ValueError(f"--out {folder} would overwrite {', '.join(overwritten)}; name another folder")
    return paths


def each_photo(images: Sequence[str], failed: list[str]) -> Iterator[tuple[int, Image.Image]]:
    """Place and photo, one after another; one that cannot be read is told on stderr and added to `failed`.

    Raises:
        OSError, ValueError: none can be read.
    """
    from ..zoo.images import load_image

    for place, path in enumerate(images):
        try:
            image = load_image(path)
        except (OSError, ValueError) as error:
            failed.append(path)
            if len(images) == 1:
                raise
            named = f"{path}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
            print(f"mvit-kernels: error: {named}", file=sys.stderr, flush=True)
        else:
            yield place, image
    if len(failed) == len(images):
        raise ValueError(f"none of the {len(images)} photos could be read; see above")


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of the path's suffix."""
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    data = io.BytesIO()
    picture.save(data, kind, **({} if kind == "PNG" else {"quality": 92}))
    write_bytes(path, data.getvalue())


def finish(
    args: argparse.Namespace, name: str, results: list[dict[str, Any]], text: Callable[[dict[str, Any]], str]
) -> None:
    """Write all results as JSON into --out, and print them."""
    write_json(args.out / name, results)
    if args.json:
        print_json(results)
    else:
        print("\n".join(map(text, results)))
