# SPDX-License-Identifier: Apache-2.0
"""From a model's name to the function that builds it, for timm, Hugging Face, Kornia and our own models."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

VARIANTS = ("xxs", "xs", "s")
_HUB_NAMES = {"xxs": "apple/mobilevit-xx-small", "xs": "apple/mobilevit-x-small", "s": "apple/mobilevit-small"}
_HUB_SEGMENTATION = {variant: name.replace("mobilevit", "deeplabv3-mobilevit") for variant, name in _HUB_NAMES.items()}
# Our networks for other tasks than classification: library of their names -> class in `mvit_kernels.nn`.
_TASKS = {"deeplabv3": "MobileViTDeepLabV3", "ssdlite": "MobileViTSSDLite"}

Build = Callable[["int | None"], "nn.Module"]  # takes the number of classes: 0 for none, None for the default


def is_huggingface(name: str | None) -> bool:
    """Whether `name` is a model of Hugging Face transformers."""
    library, slash, _ = (name or "").partition("/")
    return bool(slash) and library not in ("own", "timm", "kornia", *_TASKS)


def network_of(name: str) -> str:
    """The network that `name` is: "deeplabv3", "ssdlite", or "mobilevit" for a classifier or a backbone."""
    library = name.partition("/")[0]
    if library in _TASKS:
        return library
    return "deeplabv3" if name in _HUB_SEGMENTATION.values() else "mobilevit"


def builder(name: str, pretrained: bool) -> Build:
    """The function that builds the model of this name.

    Raises:
        ValueError: an unknown name; with `pretrained`, a model without published weights.
        ImportError: timm is wanted and not installed.
    """
    library, slash, variant = name.partition("/")
    if is_huggingface(name):
        return _huggingface(name, pretrained)
    if library in VARIANTS and not slash:
        library, variant = "own", library
    if library not in ("own", "kornia", *_TASKS) and (variant or not slash):
        return _timm(variant if library == "timm" and slash else name, pretrained)
    if variant not in VARIANTS:
        raise _unknown(name)
    if pretrained:
        raise ValueError(f"--pretrained: no weights are published for {library}/{variant}; give --checkpoint FILE")
    if library in _TASKS:
        return _for_task(library, variant)
    return _own(variant) if library == "own" else _kornia(variant)


def _for_task(library: str, variant: str) -> Build:
    def build(num_classes: int | None) -> nn.Module:
        from .. import nn as networks

        network = getattr(networks, _TASKS[library])
        return network(variant) if num_classes is None else network(variant, num_classes)

    return build


def _own(variant: str) -> Build:
    def build(num_classes: int | None) -> nn.Module:
        from ..nn import MobileViT

        return MobileViT(variant, num_classes=1000 if num_classes is None else num_classes)

    return build


def _kornia(variant: str) -> Build:
    def build(num_classes: int | None) -> nn.Module:
        from .._utils.third_party import import_kornia

        if num_classes:
            raise ValueError(f"kornia/{variant} is a backbone and has no classifier for {num_classes} classes")
        import_kornia()
        try:
            home = importlib.import_module("kornia.models.vit_mobile")  # since 0.8.3
        except ModuleNotFoundError:
            home = importlib.import_module("kornia.contrib")
        return home.MobileViT(mode=variant)

    return build


def _timm(name: str, pretrained: bool) -> Build:
    from .._utils.third_party import import_timm
    from ..nn import register_timm_models

    timm = import_timm()
    register_timm_models()
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(name)

    def build(num_classes: int | None) -> nn.Module:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        if not pretrained:
            return timm.create_model(name, **classes)
        return _fetched(name, lambda: timm.create_model(name, pretrained=True, **classes))

    return build


def _huggingface(name: str, pretrained: bool) -> Build:
    library, _, variant = name.partition("/")
    if library == "huggingface" and variant not in VARIANTS:
        raise _unknown(name)
    hub_name = _HUB_NAMES[variant] if library == "huggingface" else name
    published = {name: variant for names in (_HUB_NAMES, _HUB_SEGMENTATION) for variant, name in names.items()}
    if not pretrained and hub_name not in published:
        raise _unknown(name, " (with --pretrained it is looked for on the Hugging Face hub)")

    def build(num_classes: int | None) -> nn.Module:
        from .._utils.third_party import import_transformers

        transformers = import_transformers()
        labels = {"num_labels": num_classes} if num_classes else {}
        if pretrained:
            return _fetched(name, lambda: _from_hub(transformers, hub_name, labels))
        widths = _huggingface_widths(published[hub_name])
        if network_of(hub_name) == "deeplabv3":
            if num_classes == 0:
                raise ValueError(f"{hub_name} segments; without classes there is nothing to segment")
            config = transformers.MobileViTConfig(**widths, output_stride=16, **(labels or {"num_labels": 21}))
            return transformers.MobileViTForSemanticSegmentation(config)
        config = transformers.MobileViTConfig(**widths, **(labels or {"num_labels": 1000}))
        headless = num_classes == 0
        return (transformers.MobileViTModel if headless else transformers.MobileViTForImageClassification)(config)

    return build


def _from_hub(transformers: Any, name: str, labels: dict[str, int]) -> nn.Module:
    """Load a model of the published architecture: a classifier or a segmentation model."""
    config = transformers.AutoConfig.from_pretrained(name)
    architecture = (config.architectures or ["MobileViTForImageClassification"])[0]
    model = getattr(transformers, architecture, transformers.AutoModel)
    return model.from_pretrained(name, ignore_mismatched_sizes=bool(labels), **labels)


def _huggingface_widths(variant: str) -> dict[str, Any]:
    from ..nn.mobilevit import _STEM_CHANNELS, _VARIANTS

    own = _VARIANTS[variant]
    return {
        "hidden_sizes": list(own.dims),
        "neck_hidden_sizes": [_STEM_CHANNELS, *own.channels, own.features],
        "expand_ratio": own.expand_ratio,
    }


def _fetched(name: str, fetch: Callable[[], nn.Module]) -> nn.Module:
    try:
        return fetch()
    except ImportError:
        raise
    except Exception as error:  # timm, transformers, the hub's client and its HTTP library raise many kinds
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"--pretrained: the weights of {name} could not be fetched: {why}") from error


def _unknown(name: str, remark: str = "") -> ValueError:
    known = [f"{library}/{variant}" for library in ("own", "huggingface", "kornia", *_TASKS) for variant in VARIANTS]
    known += [*_HUB_NAMES.values(), *_HUB_SEGMENTATION.values()]
    with contextlib.suppress(ImportError):
        from .._utils.third_party import import_timm

        known += import_timm().list_models("mobilevit_*")
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return ValueError(f"--model {name}: there is no model of this name{remark}; {hint}")
