# SPDX-License-Identifier: Apache-2.0
"""The networks of detection and segmentation, built from a recipe and started from a checkpoint of any task."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..._utils.text import some
from ...checkpoints import VARIANT_OF_WIDTH, Checkpoint, convert_state_dict, load_into, read_checkpoint
from ...nn import MobileViTDeepLabV3, MobileViTSSDLite
from ..saving import describe

if TYPE_CHECKING:
    from . import Task

_VARIANTS = ("xxs", "xs", "s")
_LAST_NORM = re.compile(r"(^|\.)stages\.4\.1\.norm\.weight$")


class _Kind(NamedTuple):
    """A network with a head: how its convolutions that know of classes are laid out."""

    network: type[nn.Module]
    title: str
    own: re.Pattern[str]  # a key that only this head has, in our layout
    predicts: re.Pattern[str]  # weights and biases with a row for each class
    before: int  # rows of another meaning before the classes' in each group: an anchor's offsets
    background: int  # classes that the samples do not name


_KINDS = {
    "ssdlite": _Kind(
        MobileViTSSDLite, "SSDLite", re.compile(r"^heads\."), re.compile(r"^heads\.\d+\.layers\.predict\."), 4, 1
    ),
    "deeplabv3": _Kind(MobileViTDeepLabV3, "DeepLabv3", re.compile(r"^aspp\."), re.compile(r"^classifier\."), 0, 0),
}


def build_network(task: Task, library: str, classes: Sequence[str], checkpoint: Path | None) -> nn.Module:
    """The network of `task` for `classes`, with the weights of `checkpoint`; see `Task.build`.

    A checkpoint of the same network is taken whole. Where its classes are others, those of the same name keep what
    predicts them, and the others begin anew. Of any other network with a MobileViT the backbone is taken.

    Args:
        task: its recipe says the rest; it gets the remarks.
        library: "ssdlite" or "deeplabv3".
        classes: without a background that the samples do not name.
        checkpoint: in any layout that `load_checkpoint` reads, or None for random weights.

    Raises:
        ValueError: as `Task.build`.
    """
    kind, recipe = _KINDS[library], task.recipe
    if recipe.pretrained:
        raise ValueError(f"pretrained: no weights of {library} of ours are on the hub; give --checkpoint FILE")
    named = _variant(recipe.model, library)
    settings = {"dropout": recipe.dropout, "output_stride": recipe.output_stride}
    if library == "deeplabv3":
        settings["classifier_dropout"] = recipe.classifier_dropout
    settings = {key: value for key, value in settings.items() if value is not None}

    def build(variant: str) -> nn.Module:
        return kind.network(variant, len(classes) + kind.background, **settings)

    if checkpoint is None:
        return build(named or "s")
    what = f"--checkpoint {checkpoint}"
    read = read_checkpoint(checkpoint, what)
    own = convert_state_dict(read.state_dict, "own")
    width = next((tensor.numel() for key, tensor in own.items() if _LAST_NORM.search(key)), 0)
    model = build(named or VARIANT_OF_WIDTH.get(width, "s"))
    if any(map(kind.own.search, own)):
        _fit_head(task, kind, own, model, classes, checkpoint)
        load_into(model, Checkpoint(own, read.remarks), what)
    elif task.new_head is False:
        advice = f"train one first: mvit-kernels train --task {task.name}"
        raise ValueError(f"{checkpoint} has no head of {kind.title}; {advice}")
    else:
        load_into(model.backbone, read, what)
        task.remarks.append(f"the backbone is the checkpoint's, and the head of {kind.title} is new")
    return model


def _variant(name: str | None, library: str) -> str | None:
    """The variant in a model's name, or None where the checkpoint decides.

    Raises:
        ValueError: it is no model of `library`.
    """
    if name is None:
        return None
    before, slash, variant = name.rpartition("/")
    if variant not in _VARIANTS or (slash and before != library):
        known = ", ".join(f"{library}/{each}" for each in _VARIANTS)
        raise ValueError(f"model {name!r} is not one of {known}")
    return variant


def _fit_head(
    task: Task, kind: _Kind, own: dict[str, Tensor], model: nn.Module, classes: Sequence[str], path: Path
) -> None:
    """Make what predicts classes in `own` fit `model`: rows of the checkpoint where it has the class, else new ones."""
    fresh = model.state_dict()
    predicts = [key for key in fresh if kind.predicts.search(key)]
    count = _classes_in(kind, own, fresh, predicts, len(classes) + kind.background) - kind.background
    names = task.labels or describe(path).classes
    if names is not None and len(names) != count:
        raise ValueError(f"{path} has a head of {count} classes, and {len(names)} names for them")
    if names is None and count == len(classes) and not task.new_head:
        task.remarks.append(f"the checkpoint has {count} classes without names: they are taken for the samples'")
        return
    known = {} if names is None or task.new_head else {name: row for row, name in enumerate(names)}
    if known and tuple(names) == tuple(classes):
        return
    strange = [name for name in classes if name not in known]
    if strange and task.new_head is False:
        raise ValueError(
            f"{path} has {count} classes{'' if names else ' without names'}, and the samples {len(classes)}, among "
            f"them {some(strange)}; name the checkpoint's with --labels FILE, or train it on these"
        )
    before, first = kind.before, kind.background
    rows = {first + place: first + known[name] for place, name in enumerate(classes) if name in known}
    rows |= {place: place for place in range(first)}
    for key in predicts:
        new, old = fresh[key].clone(), own[key]
        groups = new.shape[0] // (before + len(classes) + kind.background)  # anchors of a pixel
        new_rows, old_rows = (each.reshape(groups, -1, *each.shape[1:]) for each in (new, old))
        new_rows[:, :before] = old_rows[:, :before]
        for to, origin in rows.items():
            new_rows[:, before + to] = old_rows[:, before + origin]
        own[key] = new_rows.reshape(new.shape)
    if not known:
        task.remarks.append(f"the head is the checkpoint's, but new for {len(classes)} classes instead of its {count}")
        return
    kept = f"{len(classes) - len(strange)} of {len(classes)} classes are predicted as the checkpoint does"
    task.remarks.append(f"{kept}, new is {some(strange)}" if strange else f"{kept}, found by name among its {count}")


def _classes_in(
    kind: _Kind, own: Mapping[str, Tensor], fresh: Mapping[str, Tensor], predicts: list[str], count: int
) -> int:
    """The number of classes, with the background, of the head in `own`; that of the model is `count`."""
    key = next(key for key in predicts if key.endswith(".bias"))
    groups = fresh[key].numel() // (kind.before + count)
    return own[key].numel() // groups - kind.before


@contextlib.contextmanager
def steady_norms(parts: Sequence[nn.Module], batch: int) -> Iterator[None]:
    """In training on a batch of one image, let the batch norms of pooled maps in `parts` use their running statistics.

    They have one value a channel then, of which there is no variance. An epoch's last batch may be of one image.
    """
    norms = [
        module
        for part in parts
        for module in part.modules()
        if batch == 1 and isinstance(module, nn.BatchNorm2d) and module.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
