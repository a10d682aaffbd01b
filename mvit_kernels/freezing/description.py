# SPDX-License-Identifier: Apache-2.0
"""What a model knows of itself beside its weights: its library, its classes' names, how photos become its input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._utils.plain import is_own
from ..checkpoints import VARIANT_OF_WIDTH
from .block import FrozenMobileViTBlock

# name of the kind -> package of its models
_PACKAGES = {
    "timm": "timm",
    "huggingface": "transformers",
    "kornia": "kornia",
    "cvnets": "cvnets",
    "own": "mvit_kernels",
}
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_PUBLISHED_MARGIN = 32  # pixels by which the published networks' photos are resized larger than the crop: 288 for 256
_SEGMENTERS = ("MobileViTDeepLabV3", "MobileViTForSemanticSegmentation")


def describe(model: nn.Module, *, labels: Sequence[str] | None = None, processor: Any = None) -> dict[str, Any]:
    """What is known of a frozen model beside its weights, as JSON can hold it; a key is absent where nothing is known.

    Example:
        >>> describe(freeze(timm.create_model("mobilevit_xxs", pretrained=True)))
        {'kind': 'timm', 'architecture': 'mobilevit_xxs', 'num_classes': 1000, 'labels': ['tench, Tinca tinca', …],
         'preprocessing': {'size': [256, 256], 'shortest_edge': 284, 'interpolation': 'bicubic', 'rescale': 0.0039…,
         'mean': [0.0, 0.0, 0.0], 'std': [1.0, 1.0, 1.0], 'channel_order': 'RGB'}}

    ========================  =======================================================================================
    ``kind``                  "timm", "huggingface", "kornia", "cvnets" or "own"
    ``architecture``          timm's name of the model; else "mobilevit_xxs" and so on, by the transformers' widths,
                              with ``"deeplabv3_"`` before it for segmentation
    ``num_classes``           of logits; 0 for a backbone
    ``labels``                names of the classes in order: those that were given, Hugging Face's ``config.id2label``,
                              timm's configuration; of ImageNet-1k for timm's weights of it
    ``preprocessing``         ``size`` of the input, [height, width]; ``shortest_edge`` that a photo is resized to
                              before the crop at its center; ``interpolation``; ``rescale``, by which bytes are
                              multiplied; ``mean`` and ``std``, in the order R, G, B; ``channel_order`` of the input,
                              "RGB" or "BGR"
    ``multiple``              of which both sides of an image must be multiples (Kornia's)
    ========================  =======================================================================================

    The preprocessing of timm's models, and of ours in timm, is that of their ``pretrained_cfg``. That of Hugging Face's
    is that of `processor`, or as the published models want it: BGR in [0, 1], cropped from 32 pixels more than the
    input's size. cvnets' is the same in an order that depends on its release, and is absent; that of our own networks
    is the same in RGB. Of Kornia's no weights are published, so nothing is known. All of this is what the published
    weights want: a model does not know whether it has these or others.

    Args:
        model: what `freeze` returned; another model is described too.
        labels: names of the classes in order, instead of those that the model knows.
        processor: the model's Hugging Face image processor.

    Raises:
        ValueError: there are not as many labels as classes.
        TypeError: a label is no string.
    """
    facts: dict[str, Any] = {}
    kind = _kind(model)
    if kind is not None:
        facts["kind"] = kind
    architecture = _architecture(model)
    if architecture is not None:
        facts["architecture"] = architecture
    classes = _num_classes(model)
    if classes is not None:
        facts["num_classes"] = classes
    names = _checked(labels, classes) if labels is not None else known_labels(model)
    if names is not None:
        facts["labels"] = names
    preprocessing = _of_processor(processor) if processor is not None else _preprocessing(model, kind)
    if preprocessing is not None:
        facts["preprocessing"] = preprocessing
    if kind == "kornia":
        sides = [32 * side for block in _blocks(model)[:1] for side in block.patch_size]
        facts["multiple"] = math.lcm(*sides) if sides else 64
    return facts


def known_labels(model: nn.Module) -> list[str] | None:
    """The names of a model's classes in order, as far as the model knows them; None if it does not.

    Example:
        >>> known_labels(transformers.MobileViTForImageClassification.from_pretrained("apple/mobilevit-small"))[0]
        'tench, Tinca tinca'
    """
    classes = _num_classes(model)
    if not classes:
        return None
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping):
        names = [str(named[index]) for index in sorted(named, key=int)]
        invented = [f"LABEL_{index}" for index in range(classes)]  # by transformers, where it was told none
        return names if len(names) == classes and names != invented else None
    cfg = _timm_cfg(model)
    if cfg.get("num_classes") != classes:
        return None
    names = cfg.get("label_names")
    if isinstance(names, Sequence) and len(names) == classes:
        described = cfg.get("label_descriptions") or {}
        return [str(described.get(name, name)) for name in names]
    if classes == 1000 and str(cfg.get("tag") or "").endswith("in1k"):
        from timm.data import ImageNetInfo  # the model is timm's

        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(classes)]
    return None


def _kind(model: nn.Module) -> str | None:
    packages = type(model).__module__.split(".")
    for kind, package in _PACKAGES.items():
        if package in packages and "freezing" not in packages:
            return kind
    copied = type(model).__name__ == "MobileViT" and {"conv_1", "layer_5", "conv_1x1_exp"} <= model._modules.keys()
    return "cvnets" if copied else None


def _blocks(model: nn.Module) -> list[FrozenMobileViTBlock]:
    return [module for module in model.modules() if isinstance(module, FrozenMobileViTBlock)]


def _architecture(model: nn.Module) -> str | None:
    named = _timm_cfg(model).get("architecture")
    if named:
        return str(named)
    blocks = _blocks(model)
    variant = VARIANT_OF_WIDTH.get(blocks[-1].layers()[0].proj_weight.shape[0]) if len(blocks) == 3 else None
    if variant is None:
        return None
    return f"{'deeplabv3_' if type(model).__name__ in _SEGMENTERS else ''}mobilevit_{variant}"


def _num_classes(model: nn.Module) -> int | None:
    if is_own(model, "transformers", "MobileViTModel") or is_own(model, "kornia", "MobileViT"):
        return 0
    if hasattr(model, "num_labels") and hasattr(model, "config"):
        return int(model.num_labels)
    if hasattr(model, "num_classes"):
        return int(model.num_classes)
    classifier = model._modules.get("classifier")
    last = list(classifier.children())[-1:] if classifier is not None else []
    weights = [module._parameters.get("weight") for module in last]
    return next((len(weight) for weight in weights if weight is not None), None)


def _timm_cfg(model: nn.Module) -> Mapping[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg if isinstance(cfg, Mapping) else getattr(cfg, "to_dict", dict)()


def _checked(labels: Sequence[str], classes: int | None) -> list[str]:
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"describe: labels is {labels!r:.60}; a list of names is wanted, one a class")
    if classes is not None and len(labels) != classes:
        raise ValueError(f"describe: there are {len(labels)} labels and {classes} classes; give one label a class")
    return list(labels)


# -- from photos to inputs


def _preprocessing(model: nn.Module, kind: str | None) -> dict[str, Any] | None:
    cfg = _timm_cfg(model)
    if cfg.get("input_size"):
        _, *size = cfg["input_size"]
        known = {"size": size, "interpolation": cfg.get("interpolation", "bicubic"), "crop": cfg.get("crop_mode")}
        edge = math.floor(max(size) / (cfg.get("crop_pct") or 1.0))
        return _as_json(edge, mean=cfg.get("mean"), std=cfg.get("std"), **known)
    if kind == "huggingface":
        size = getattr(model.config, "image_size", 256)
        sides = [size, size] if isinstance(size, int) else list(size)
        return _as_json(max(sides) + _PUBLISHED_MARGIN, size=sides, order="BGR")
    if kind == "cvnets":
        return _as_json(256 + _PUBLISHED_MARGIN, size=[256, 256], order=None)
    if kind == "own":
        side = 512 if type(model).__name__ in _SEGMENTERS else 256
        return _as_json(side + _PUBLISHED_MARGIN, size=[side, side])
    return None


def _of_processor(processor: Any) -> dict[str, Any]:
    """What a Hugging Face image processor does."""

    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    normalizes, resample = bool(getattr(processor, "do_normalize", False)), getattr(processor, "resample", None)
    return _as_json(
        size.get("shortest_edge") if getattr(processor, "do_resize", True) else None,
        size=[crop["height"], crop["width"]] if crop.get("height") else None,
        interpolation=None if resample is None else _INTERPOLATIONS.get(int(resample)),
        rescale=processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0,
        mean=processor.image_mean if normalizes else None,
        std=processor.image_std if normalizes else None,
        order="BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB",
    )


def _as_json(
    shortest_edge: int | None,
    *,
    size: Sequence[int] | None,
    interpolation: str | None = "bilinear",
    rescale: float = 1 / 255,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    order: str | None = "RGB",
    crop: str | None = None,
) -> dict[str, Any]:
    facts = {
        "size": None if size is None else [int(side) for side in size],
        "shortest_edge": shortest_edge,
        "interpolation": interpolation,
        "rescale": float(rescale),
        "mean": [float(value) for value in mean or (0.0, 0.0, 0.0)],
        "std": [float(value) for value in std or (1.0, 1.0, 1.0)],
        "channel_order": order,
        "crop_mode": None if crop == "center" else crop,
    }
    return {name: value for name, value in facts.items() if value is not None}
