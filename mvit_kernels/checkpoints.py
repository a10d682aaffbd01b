# SPDX-License-Identifier: Apache-2.0
"""State dicts of timm, Hugging Face, cvnets and this package, strictly from each into each.

The table of names is in `_checkpoint_keys`. A state dict is read into this package's names ("own") and
written from there.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ._checkpoint_keys import LAYOUTS, Keys, is_counter, network, read_keys, some

__all__ = ["convert_state_dict", "load_checkpoint"]

Layout = Literal["own", "timm", "huggingface", "cvnets"]
Model = TypeVar("Model", bound=nn.Module)

_LAST_OF_STAGES = "stages.4.1.conv_fusion.norm.bias"


def convert_state_dict(state_dict: Mapping[str, Any], to: Layout) -> dict[str, Tensor]:
    """The same network under another library's names.

    Example:
        >>> own = convert_state_dict(timm.create_model("mobilevit_s").state_dict(), to="own")
        >>> MobileViT("s", num_classes=1000).load_state_dict(own)
        <All keys matched successfully>

    Args:
        state_dict: of a timm, Hugging Face, cvnets or own MobileViT of any width, with or without the
            classifier; or a training checkpoint around one, as for `load_checkpoint`. Prefixes of DDP,
            `torch.compile` and task models are taken off.
        to: "own", "timm", "huggingface" or "cvnets". Hugging Face's keys come out as
            `MobileViTForImageClassification` has them if there is a classifier, else as the bare
            `MobileViTModel` has.

    Returns:
        A new dict in the network's order. The tensors are those of `state_dict`, but for Hugging Face's
        query, key and value, which are joined into new tensors or copied out of one.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: an unknown layout; keys that fit none (the message has the nearest and the first that
            differ); keys beside the network, such as a segmentation head's, which have no place elsewhere;
            Kornia's network.
    """
    if to not in LAYOUTS:
        raise ValueError(f"convert_state_dict: to={to!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    what = "convert_state_dict: the state dict"
    state_dict = _unwrap(state_dict, what)
    keys = read_keys(state_dict, what)
    _refuse_extra(keys, what)
    if _LAST_OF_STAGES not in keys.found:
        raise ValueError(f"{what} ends at {list(keys.found)[-1]!r}; all five stages are wanted")
    table = network(to)
    converted: dict[str, Tensor] = {}
    for own, tensor in _own_tensors(state_dict, keys, what).items():
        converted.update(_split(tensor, table[own], what))
    if to == "huggingface" and "classifier.weight" in converted:
        # The task model holds the network as `mobilevit`, beside its classifier.
        return {key if key.startswith("classifier.") else f"mobilevit.{key}": t for key, t in converted.items()}
    return converted


def load_checkpoint(
    model: Model,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    flip_stem_channels: bool = False,
) -> Model:
    """Load a checkpoint of any of the four layouts into a model of any of the four: all of it, or nothing.

    Example:
        >>> model = load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=21), "land_use21.pth")

    Args:
        model: a timm, Hugging Face, cvnets or own MobileViT, accelerated or not, also under DDP,
            `torch.compile` or timm's `features_only`. It keeps its dtype and device.
        path_or_state_dict: a file of `torch.save` (read with `weights_only=True`, never otherwise) or of
            safetensors; or a state dict. Training checkpoints are unwrapped: averaged weights
            (`state_dict_ema`, `model_ema`, …) if there are any, else `state_dict`, `model_state_dict` or
            `model`.
        flip_stem_channels: reverse the stem's three input channels. Hugging Face's published weights expect
            BGR images, timm's and cvnets' RGB.

    A checkpoint may go further than the model: a classifier is dropped where the model has none
    (`num_classes=0`, Hugging Face's `MobileViTModel`), and so are layers beyond the last of a backbone. The
    head of another task loads only into a model that has it under the same names.

    Returns:
        `model`, loaded in place.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path.
        ImportError: a safetensors file, and safetensors is not installed.
        TypeError: neither a path nor a mapping of names to tensors; `model` is no module.
        ValueError: a file that is empty, corrupt or holds more than tensors; keys, the checkpoint's or the
            model's, that fit no layout; another variant, number of classes or of channels; a part of the
            model that the checkpoint lacks; values that are not finite. All is checked first: after an error
            the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(path_or_state_dict, str | os.PathLike):
        path = Path(path_or_state_dict)
        what = f"load_checkpoint: {path}"
        state_dict = read_state_dict(path, what)
    else:
        what = "load_checkpoint: the checkpoint"
        state_dict = _unwrap(path_or_state_dict, what)
    current = model.state_dict()
    values = _fit(state_dict, current, type(model).__name__, flip_stem_channels, what)
    _check_values(values, current, what)
    model.load_state_dict(values)
    return model


def _fit(
    state_dict: dict[str, Tensor],
    current: Mapping[str, Tensor],
    model: str,
    flip_stem_channels: bool,
    what: str,
) -> dict[str, Tensor]:
    """A tensor of the checkpoint, in the right shape, for each key of the model's state dict `current`."""
    source = read_keys(state_dict, what)
    target = read_keys(current, f"load_checkpoint: the model ({model})")
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
    heads = set(source.extra) & set(target.extra)  # of another task, in both, under the same names
    values.update({key: state_dict[key] for key in heads})
    _refuse_extra(source._replace(extra=[key for key in source.extra if key not in heads]), what)

    lacking = [key for key in current if key not in values]
    if lacking:
        if set(lacking) <= set(target.extra):
            advice = "load the network alone, for instance load_checkpoint(model.mobilevit, ...)"
        else:
            advice = "build the model without a classifier (num_classes=0; Hugging Face: MobileViTModel)"
        raise ValueError(f"{what} has no {some(lacking)}, which the model ({model}) has; {advice}")
    wrong = [key for key in current if values[key].shape != current[key].shape]
    if wrong:
        shapes = [f"{key} is {tuple(values[key].shape)}, there {tuple(current[key].shape)}" for key in wrong]
        advice = _shape_advice(own, _own_tensors(current, target, what))
        raise ValueError(f"{what} does not fit the model ({model}): {some(shapes, 3)}. {advice}")
    return values


def _own_tensors(state_dict: Mapping[str, Tensor], keys: Keys, what: str) -> dict[str, Tensor]:
    """own key -> tensor; Hugging Face's query, key and value are joined along axis 0."""
    tensors = {}
    for own, names in keys.found.items():
        parts = [state_dict[name] for name in names]
        if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and parts[0].ndim == 0):
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise ValueError(f"{what}: query, key and value must have one shape; got {shapes}")
        tensors[own] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def _split(tensor: Tensor, names: tuple[str, ...], what: str) -> dict[str, Tensor]:
    """`tensor` under its one name; or in equal parts along axis 0, copied, for safetensors saves no views."""
    if len(names) == 1:
        return {names[0]: tensor}
    if tensor.ndim == 0 or tensor.shape[0] % len(names):
        raise ValueError(f"{what}: qkv of shape {tuple(tensor.shape)} does not split into {', '.join(names)}")
    return {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}


def _refuse_extra(keys: Keys, what: str) -> None:
    if keys.extra:
        heads = sorted({key.split(".")[0] for key in keys.extra})
        raise ValueError(
            f"{what} has a MobileViT in {keys.layout}'s layout, and beside it {some(keys.extra)}, for which "
            f"there is no place; to take the network alone, leave out the keys that start with {some(heads)}"
        )


VARIANT_OF_WIDTH = {96: "xxs", 144: "xs", 240: "s"}  # the transformer's width in the last stage


def _shape_advice(own: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> str:
    """What explains the shapes that differ between checkpoint and model, and what to do about it."""
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
    if differ == {"stem.conv.weight"}:
        return "The images' channels differ: build the model with as many input channels as the checkpoint has"
    advice = "Build the model with the checkpoint's widths"
    return f"{advice} (Hugging Face: hidden_sizes, neck_hidden_sizes, expand_ratio in the config)"


def _check_values(values: dict[str, Tensor], current: Mapping[str, Tensor], what: str) -> None:
    """What could still go wrong: meta tensors, integers for weights, values not finite here or there."""
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


# Where training scripts keep the state dict. Averaged weights come first: they are what was evaluated.
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model"),
)


def read_state_dict(path: Path, what: str) -> dict[str, Tensor]:
    """The state dict in a file, as `load_checkpoint` takes it, of any layout; `what` is what errors call it."""
    return _unwrap(_read_file(path), what)


def _unwrap(checkpoint: object, what: str) -> dict[str, Tensor]:
    """The state dict in a training checkpoint; all its values are tensors."""
    while isinstance(checkpoint, Mapping):
        inner = next((name for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)), None)
        if inner is None:
            break
        checkpoint = checkpoint[inner]
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise TypeError(f"{what} must be a state dict, names to tensors, or the path of one; got {kind}")
    # torch.optim.swa_utils.AveragedModel keeps this count beside the weights.
    state_dict = {key: value for key, value in checkpoint.items() if key != "n_averaged"}
    if not state_dict:
        raise ValueError(f"{what} is an empty state dict")
    others = [repr(k) for k, v in state_dict.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if others:
        raise TypeError(f"{what} must hold names and tensors only; take {some(others)} out, or pass its state dict")
    return state_dict


def _read_file(path: Path) -> object:
    """What the file holds, on the CPU. Nothing in the file is run."""
    if path.is_dir():
        raise IsADirectoryError(f"load_checkpoint: {path} is a directory; give the file inside it")
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: there is no file {path}")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise ValueError(f"load_checkpoint: {path} is empty (0 bytes); fetch it again")
    if head.startswith(b"version https://"):
        raise ValueError(f"load_checkpoint: {path} is a Git LFS pointer, not the weights; run 'git lfs pull'")
    # safetensors: 8 bytes of header length, then the header in JSON. PyTorch's files start with PK or \x80.
    is_safetensors = head[8:9] == b"{" or (path.suffix == ".safetensors" and head[:1] not in (b"P", b"\x80"))
    kind = "safetensors file" if is_safetensors else "file of torch.save"
    try:
        if is_safetensors:
            return _safetensors().load_file(path, device="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # the parsers of both raise many kinds
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"load_checkpoint: {path} holds Python objects besides tensors and is not read, since that "
                "could run code; where it was made, save torch.save(model.state_dict(), path)"
            ) from error
        raise ValueError(f"load_checkpoint: {path} is corrupt or no {kind}; fetch or save it again") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("load_checkpoint: to read safetensors, install it: pip install safetensors") from error
    return safetensors.torch
