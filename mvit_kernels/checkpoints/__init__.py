# SPDX-License-Identifier: Apache-2.0
"""Strict conversion of state dicts between timm, Hugging Face, cvnets and this package.

The table of names is in `mvit_kernels.checkpoints.table`. A state dict is first read into this package's names ("own")
and then written in the target's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._utils.text import some
from .files import read_file
from .keys import AVERAGED, Keys, is_counter, is_stem, read_keys
from .table import CHILD, HEADS, LAYOUTS, Head, head_keys, network

__all__ = ["convert_state_dict", "load_checkpoint"]

Layout = Literal["own", "timm", "huggingface", "cvnets"]
Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("mvit_kernels")
_LAST_OF_STAGES = "stages.4.1.conv_fusion.norm.bias"


def convert_state_dict(state_dict: Mapping[str, Any], to: Layout) -> dict[str, Tensor]:
    """Rename the keys of a MobileViT state dict to another library's layout.

    Example:
        >>> own = convert_state_dict(timm.create_model("mobilevit_s").state_dict(), to="own")
        >>> MobileViT("s", num_classes=1000).load_state_dict(own)
        <All keys matched successfully>

    Args:
        state_dict: state dict of a timm, Hugging Face, cvnets or own MobileViT of any width, with or without the
            classifier, or of a network for segmentation or detection with MobileViT in it; or a training checkpoint
            that contains one, as for `load_checkpoint`. A prefix common to the network's keys is removed.
        to: "own", "timm", "huggingface" or "cvnets". Hugging Face's keys are those of
            `MobileViTForImageClassification` if there is a classifier, those of `MobileViTForSemanticSegmentation` if
            there is its head, otherwise those of the bare `MobileViTModel`.

    Returns:
        A new dict in the network's order. It shares the tensors of `state_dict`, except Hugging Face's query, key and
        value, which are concatenated into new tensors or copied out of one.

    Raises:
        TypeError: `state_dict` is not a mapping of names to tensors.
        ValueError: an unknown layout; keys that match no layout (the message names the nearest layout and the first
            keys that differ); additional keys, and a head that the other layout has no place for, as timm for
            segmentation; missing stages; Kornia's network.
    """
    if to not in LAYOUTS:
        raise ValueError(f"convert_state_dict: to={to!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    what = "convert_state_dict: the state dict"
    state_dict, remarks = _unwrap(state_dict, what)
    keys = read_keys(state_dict, what)
    _refuse_extra(keys, what)
    _tell(what, keys, keys.aside, remarks)
    if _LAST_OF_STAGES not in keys.found:
        last = [key for key in keys.found if key in network(to)][-1]
        raise ValueError(f"{what} ends at {last!r}; all five stages are wanted")
    table = dict(network(to))
    if keys.head:
        table.update(_head_in(keys.head, to, what))
    converted: dict[str, Tensor] = {}
    for own, tensor in _own_tensors(state_dict, keys, what).items():
        converted.update(_split(tensor, table[own], what))
    if to == "huggingface" and "classifier.weight" in keys.found:
        beside = {"classifier.weight", "classifier.bias"}
    elif keys.head:
        beside = {name for names in head_keys(keys.head, to).values() for name in names}
    else:
        return converted
    # A model for a task holds the network as a child, beside the head.
    return {key if key in beside else CHILD[to] + key: tensor for key, tensor in converted.items()}


def load_checkpoint(
    model: Model,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    flip_stem_channels: bool = False,
) -> Model:
    """Load a checkpoint in any of the four layouts into a model of any of the four: all of it or nothing.

    Example:
        >>> model = load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=21), "land_use21.pth")
        >>> detector = MobileViTSSDLite("s", num_classes=9)
        >>> load_checkpoint(detector.backbone, "mobilevit_s.pth")  # of a classifier: all but its last two layers

    Args:
        model: a timm, Hugging Face, cvnets or own MobileViT, accelerated or not, also under DDP,
            `torch.compile` or timm's `features_only`; or a network for segmentation or detection, such as
            `MobileViTDeepLabV3`. It keeps its dtype and device.
        path_or_state_dict: path of a file written by `torch.save` or in safetensors format, or a state dict. Files of
            `torch.save` are only ever read with `weights_only=True`; objects that training scripts save beside the
            weights are replaced by inert stand-ins. The network is found anywhere in a training checkpoint: averaged
            weights (`state_dict_ema`, `model_ema`, …) if there are any, otherwise `state_dict`, `model_state_dict`,
            `model`, ….
        flip_stem_channels: reverse the stem's three input channels. Hugging Face's published weights expect
            BGR images, timm's and cvnets' RGB.

    The keys of the checkpoint and of the model may have any common prefix: that of DDP, `torch.compile`, a Lightning
    module (`net.`), or a larger network (`backbone.`). Keys beside a network with its classifier (`loss.weight`,
    `teacher.`) are ignored. The logger `mvit_kernels` warns of them, and names the state dict that was chosen if there
    are several.

    A checkpoint may contain more than the model: a classifier is dropped if the model has none (`num_classes=0`,
    Hugging Face's `MobileViTModel`), and so are layers after the last one of a backbone, and the head of a network for
    segmentation or detection if the model is a backbone. The log tells. Any other head is loaded only into a model that
    has it under the same names.

    Returns:
        `model`, loaded in place.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path cannot be read.
        ImportError: the file is in safetensors format, and safetensors is not installed.
        TypeError: `path_or_state_dict` is neither a path nor a mapping of names to tensors; `model` is not a module.
        ValueError: a file that is empty, corrupt (the message names the damaged record of the archive), contains other
            objects than tensors, or has another format; keys of the checkpoint or of the model that match no layout, or
            belong to two networks; another variant, number of classes or of channels; a part of the model that the
            checkpoint lacks; values that are not finite. Everything is checked before loading: after an error the model
            is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(path_or_state_dict, str | os.PathLike):
        path = Path(path_or_state_dict)
        what = f"load_checkpoint: {path}"
        checkpoint = read_checkpoint(path, what)
    else:
        what = "load_checkpoint: the checkpoint"
        checkpoint = _unwrap(path_or_state_dict, what)
    load_into(model, checkpoint, what, flip_stem_channels)
    return model


def load_into(model: nn.Module, checkpoint: Checkpoint, what: str, flip_stem_channels: bool = False) -> None:
    """`load_checkpoint` for a checkpoint that `read_checkpoint` has read; `what` names it in messages."""
    state_dict, remarks = checkpoint
    current = model.state_dict()
    source = read_keys(state_dict, what)
    target = read_keys(current, f"load_checkpoint: the model ({type(model).__name__})")
    values = _fit(state_dict, source, current, target, type(model).__name__, flip_stem_channels, what)
    _check_values(values, current, what)
    model.load_state_dict(values)
    _tell(what, source, [key for key in source.aside if key not in values], remarks)
    dropped = [own for own in source.found if own not in target.found and not is_counter(own)]
    head = source.head
    if head and not target.head:
        logger.warning("%s also has the head of %s, for %s, which is left out", what, head.name, head.task)
    rest = [name for own in dropped if own in network(source.layout) for name in source.found[own]]
    if rest:
        logger.info("%s also has %s, which the model does not have", what, some(rest))


def _tell(what: str, keys: Keys, aside: list[str], remarks: list[str]) -> None:
    """Log what was chosen or ignored as warnings, and a removed prefix as information."""
    if keys.prefix:
        logger.info("%s has the network's keys below %r", what, keys.prefix)
    if aside:
        remarks = [*remarks, f"also has {some(aside)}, which is ignored"]
    for remark in remarks:
        logger.warning("%s %s", what, remark)


def _fit(
    state_dict: dict[str, Tensor],
    source: Keys,
    current: Mapping[str, Tensor],
    target: Keys,
    model: str,
    flip_stem_channels: bool,
    what: str,
) -> dict[str, Tensor]:
    """A tensor of the checkpoint, of the right shape, for each key of the model's state dict `current`."""
    own = _own_tensors(state_dict, source, what)
    if flip_stem_channels:
        stem = own["stem.conv.weight"]
        if stem.ndim != 4 or stem.shape[1] != 3:
            raise ValueError(f"{what} has a stem of shape {tuple(stem.shape)}; flipping needs three input channels")
        own["stem.conv.weight"] = stem.flip(1)

    values: dict[str, Tensor] = {}
    for key, names in target.found.items():
        if key in own:
            values.update(_split(own[key], names, what))
        elif is_counter(key):
            values[names[0]] = torch.zeros((), dtype=torch.long, device="cpu")
    beside = {*target.extra, *target.aside}
    heads = beside.intersection(source.extra + source.aside)  # of another task, under the same names in both
    values.update({key: state_dict[key] for key in heads})
    _refuse_extra(source._replace(extra=[key for key in source.extra if key not in heads]), what)

    lacking = [key for key in current if key not in values]
    if lacking:
        if target.head:
            beside.update(name for own in head_keys(target.head, target.layout) for name in target.found.get(own, ()))
        child = _where(current, target)
        if beside.issuperset(lacking) and child:
            advice = f"load the network alone: load_checkpoint(model.{child}, ...)"
        elif beside.issuperset(lacking):
            advice = "remove them from the model"
        elif source.head:
            advice = (
                "such a network has neither the last convolution nor the classifier: load it into the backbone of one "
                "for that task, or set model.final_conv = torch.nn.Identity() in a MobileViT with num_classes=0 before "
                "(Hugging Face: MobileViTModel(config, expand_output=False))"
            )
        else:
            advice = "build the model without a classifier (num_classes=0; Hugging Face: MobileViTModel)"
        task = f", of {source.head.name} for {source.head.task}," if source.head else ""
        raise ValueError(f"{what}{task} has no {some(lacking)}, which the model ({model}) has; {advice}")
    wrong = [key for key in current if values[key].shape != current[key].shape]
    if wrong:
        shapes = [f"{key} is {tuple(values[key].shape)}, in the model {tuple(current[key].shape)}" for key in wrong]
        advice = _shape_advice(own, _own_tensors(current, target, what), _where(current, target))
        raise ValueError(f"{what} does not fit the model ({model}): {some(shapes, 3)}. {advice}")
    return values


def _head_in(head: Head, layout: str, what: str) -> dict[str, tuple[str, ...]]:
    """The head's keys in `layout`, which must have it."""
    keys = head_keys(head, layout)
    if not keys:
        raise ValueError(
            f"{what} is {head.name}, for {head.task}, which {layout}'s layout does not have (only "
            f"{', '.join(head.layouts)}); to convert the network alone, remove the head's keys"
        )
    return keys


def _where(state_dict: Mapping[str, Tensor], keys: Keys) -> str:
    """The attribute path of the network in a model: what precedes the name of its stem."""
    own, names = next(iter(keys.found.items()))
    return names[0].removesuffix(network(keys.layout)[own][0]).rstrip(".")


def _own_tensors(state_dict: Mapping[str, Tensor], keys: Keys, what: str) -> dict[str, Tensor]:
    """own key -> tensor; Hugging Face's query, key and value are concatenated along axis 0."""
    tensors = {}
    for own, names in keys.found.items():
        parts = [state_dict[name] for name in names]
        if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and parts[0].ndim == 0):
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise ValueError(f"{what}: query, key and value must have one shape; got {shapes}")
        tensors[own] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def _split(tensor: Tensor, names: tuple[str, ...], what: str) -> dict[str, Tensor]:
    """`tensor` under its one name, or split into equal parts along axis 0: copies, since safetensors saves no views."""
    if len(names) == 1:
        return {names[0]: tensor}
    if tensor.ndim == 0 or tensor.shape[0] % len(names):
        raise ValueError(f"{what}: qkv of shape {tuple(tensor.shape)} does not split into {', '.join(names)}")
    return {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}


def _refuse_extra(keys: Keys, what: str) -> None:
    if keys.extra:
        heads = sorted({key.split(".")[0] for key in keys.extra})
        raise ValueError(
            f"{what} has a MobileViT in {keys.layout}'s layout, and also {some(keys.extra)}, with no "
            f"counterpart; to load the network alone, remove the keys that start with {some(heads)}"
        )


VARIANT_OF_WIDTH = {96: "xxs", 144: "xs", 240: "s"}  # the transformer's width in the last stage


def _shape_advice(own: Mapping[str, Tensor], current: Mapping[str, Tensor], child: str) -> str:
    """An explanation of the shapes that differ between checkpoint and model, and what to do about it."""
    width = "stages.4.1.norm.weight"
    source, target = (
        VARIANT_OF_WIDTH.get(tensors[width].numel()) if width in tensors else None for tensors in (own, current)
    )
    if source and target and source != target:
        there = f"the model a MobileViT-{target.upper()}"
        return f"The checkpoint is a MobileViT-{source.upper()}, {there}: build the model as {source!r}"
    differ = {key for key in own.keys() & current.keys() if own[key].shape != current[key].shape}
    if differ <= {"classifier.weight", "classifier.bias"}:
        classes = own["classifier.bias"].numel()
        return (
            f"The checkpoint has {classes} classes: build the model with as many (num_classes={classes}; "
            f"Hugging Face: num_labels={classes}), or without a classifier to take the rest"
        )
    for head in HEADS:
        if differ and differ <= head_keys(head, "own").keys():
            theirs, ours = (head.classes(tensors) for tensors in (own, current))
            if theirs == ours or not theirs or not ours:
                return f"The heads differ in more than the classes: build the model as published for {head.name}"
            return (
                f"The checkpoint has {theirs} classes, the model {ours}: build the model with as many "
                f"(num_classes={theirs}; Hugging Face: num_labels={theirs}), or load the network alone: "
                f"load_checkpoint(model.{child}, ...)"
            )
    if differ == {"stem.conv.weight"}:
        return "The images' channels differ: build the model with as many input channels as the checkpoint has"
    advice = "Build the model with the checkpoint's widths"
    return f"{advice} (Hugging Face: hidden_sizes, neck_hidden_sizes, expand_ratio in the config)"


def _check_values(values: dict[str, Tensor], current: Mapping[str, Tensor], what: str) -> None:
    """Reject meta tensors, integer weights, and values that are not finite, as saved or in the model's dtype."""
    if any(tensor.is_meta for tensor in current.values()):
        raise ValueError(f"{what} cannot be loaded into a model on the meta device; call model.to_empty() first")
    kinds = [k for k, value in values.items() if value.is_floating_point() != current[k].is_floating_point()]
    if kinds:
        dtypes = (f"{key} in {values[key].dtype}" for key in kinds)
        raise ValueError(f"{what} has {some(dtypes)}; weights of floating point are wanted, not quantised ones")
    broken = [key for key, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{what} has NaN or infinite values in {some(broken)}; take an earlier checkpoint")
    beyond = [key for key, value in values.items() if not torch.isfinite(value.to(current[key].dtype)).all()]
    if beyond:
        raise ValueError(
            f"{what} has values beyond {current[beyond[0]].dtype}, the model's dtype, in {some(beyond)}; "
            "load it into a float32 or bfloat16 model"
        )


# Names under which training scripts keep the state dict, in order of preference.
_PLACES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("params", "weights", "backbone", "encoder"),
)


class Checkpoint(NamedTuple):
    """A state dict, and remarks for the log on how it was found; none for a plain state dict."""

    state_dict: dict[str, Tensor]
    remarks: list[str]


def read_checkpoint(path: Path, what: str) -> Checkpoint:
    """The state dict in a file that `load_checkpoint` accepts, in any layout; `what` names it in error messages."""
    return _unwrap(read_file(path), what)


def _unwrap(checkpoint: object, what: str) -> Checkpoint:
    """The state dict in a training checkpoint; all its values are tensors."""
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise TypeError(f"{what} must be a state dict, names to tensors, or the path of one; got {kind}")
    place, chosen, others = _choose(checkpoint, what)
    # torch.optim.swa_utils.AveragedModel stores this count beside the weights.
    state_dict = {key: value for key, value in chosen.items() if key != "n_averaged"}
    if not state_dict:
        raise ValueError(f"{what} is an empty state dict")
    foreign = [repr(k) for k, v in state_dict.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if foreign:
        raise TypeError(f"{what} must hold names and tensors only; remove {some(foreign)}, or pass its state dict")
    remarks = [f"has weights in {place!r} (used) and in {some(map(repr, others))} (ignored)"] if others else []
    return Checkpoint(state_dict, remarks)


def _choose(checkpoint: Mapping[str, Any], what: str) -> tuple[str, Mapping[str, Any], list[str]]:
    """The state dict in a training checkpoint: its place, the dict, and the places of others that might be meant."""
    found = dict(_state_dicts(checkpoint, ()))
    networks = {place: each for place, each in found.items() if any(map(is_stem, each))} or found
    if not networks:  # no state dict, or one without tensors: the caller's errors name what is there
        inner = next((name for name in _PLACES if isinstance(checkpoint.get(name), Mapping)), None)
        return "", checkpoint if inner is None else checkpoint[inner], []

    def rank(place: tuple[str, ...]) -> int:
        if any(map(AVERAGED.search, place)):  # averaged weights are the ones that were evaluated
            return 0
        return 1 + next((i for i, name in enumerate(_PLACES) if name in place), len(_PLACES))

    places = sorted(networks, key=rank)
    names = [".".join(place) for place in places]
    if len(places) > 1 and rank(places[0]) in (rank(places[1]), 1 + len(_PLACES)):
        raise ValueError(
            f"{what} has several state dicts, in {some(map(repr, names))}; pass the one that you mean, as "
            f"checkpoint{''.join(f'[{name!r}]' for name in places[0])}"
        )
    return names[0], networks[places[0]], names[1:]


def _state_dicts(mapping: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Every mapping of names to tensors in `mapping`, except an optimizer's, with its place."""
    if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in mapping.items()):
        yield place, mapping
    if len(place) < 5:
        for key, value in mapping.items():
            if isinstance(key, str) and isinstance(value, Mapping) and "optim" not in key.lower():
                yield from _state_dicts(value, (*place, key))
