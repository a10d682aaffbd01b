# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's MobileViT: the model (its last map, of which the pooled features are taken), the classifier and
DeepLabv3. Calls with labels, or for hidden states, are the library's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.plain import does_nothing, is_own
from ..program import NotNative
from ._chain import Calls, Chain, frozen, idle

_OUTPUTS = {  # class of the model -> class of its output, in the model's own module
    "MobileViTModel": "BaseModelOutputWithPoolingAndNoAttention",
    "MobileViTForImageClassification": "ImageClassifierOutputWithNoAttention",
    "MobileViTForSemanticSegmentation": "SemanticSegmenterOutput",
}


def has(cls: type[nn.Module]) -> bool:
    """Whether a class is one of the library's."""
    return "transformers" in cls.__module__.split(".")


def chain(model: nn.Module) -> Chain | None:
    """The chain of a transformers model; None for a model of another library."""
    if not is_own(model, "transformers", *_OUTPUTS):
        return None
    if not hasattr(sys.modules.get(type(model).__module__), _OUTPUTS[type(model).__name__]):
        raise NotNative(f"this release of transformers has no {_OUTPUTS[type(model).__name__]}")
    if is_own(model, "transformers", "MobileViTModel"):
        return _backbone(model, "")
    found = _backbone(model, "mobilevit.")
    if not is_own(model.mobilevit, "transformers", "MobileViTModel"):
        raise NotNative(f"mobilevit is a {type(model.mobilevit).__name__}")
    if is_own(model, "transformers", "MobileViTForImageClassification"):
        if not model.mobilevit.expand_output:
            raise NotNative("its backbone has no pooled features")
        return found._replace(
            pools=model.config.neck_hidden_sizes[-1],
            classifier=None if does_nothing(model.classifier) else model.classifier,
            passed=(*found.passed, *idle(model, "dropout")),
        )
    head = model.segmentation_head
    if not is_own(head, "transformers", "MobileViTDeepLabV3"):
        raise NotNative(f"segmentation_head is a {type(head).__name__}")
    if model.mobilevit.expand_output:
        raise NotNative("its backbone ends with a convolution that the head does not read")
    return found._replace(
        body=(*found.body, *frozen(model, "segmentation_head.aspp")),
        classifier=head.classifier,
        passed=(*found.passed, head, *idle(model, "segmentation_head.dropout")),
    )


def _backbone(model: nn.Module, path: str) -> Chain:
    """The chain of a ``MobileViTModel`` at `path`, which ends with a dot, below `model`."""
    backbone = model.get_submodule(path.rstrip("."))
    stages = backbone.encoder.layer
    passed, body = [backbone, backbone.encoder, stages], [f"{path}conv_stem"]
    for index, stage in enumerate(stages):
        name = f"{path}encoder.layer.{index}"
        if is_own(stage, "transformers", "MobileViTMobileNetLayer"):
            passed += [stage, stage.layer]
            body += [f"{name}.layer.{place}" for place in range(len(stage.layer))]
        else:
            body.append(name)
    if backbone.expand_output:
        body.append(f"{path}conv_1x1_exp")
    own = () if backbone is model else (backbone,)
    return Chain(frozen(model, *body), passed=(*own, *passed[1:]), facts=((backbone, "expand_output"),))


# -- calls


def _image(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The pixels, positional or by name, with `return_dict` by name or nothing else."""
    more = len(kwargs) - ("return_dict" in kwargs)
    if len(args) + more != 1 or getattr(model.config, "output_hidden_states", True):
        return None
    if getattr(model.config, "torchscript", False):  # which changes the output in older releases
        return None
    return args[0] if args else kwargs.get("pixel_values")


def _output(name: str, model: nn.Module, kwargs: Mapping[str, Any], **fields: Tensor | None) -> Any:
    """The output class of the library, or its tuple of what there is."""
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        return_dict = model.config.return_dict
    if not return_dict:
        return tuple(value for value in fields.values() if value is not None)
    return getattr(sys.modules[type(model).__module__], _OUTPUTS[name])(**fields)


def _features(model: nn.Module, kwargs: Mapping[str, Any], y: Tensor) -> Any:
    pooled = torch.mean(y, dim=[-2, -1]) if model.expand_output else None
    return _output("MobileViTModel", model, kwargs, last_hidden_state=y, pooler_output=pooled)


def _logits(model: nn.Module, kwargs: Mapping[str, Any], y: Tensor) -> Any:
    return _output("MobileViTForImageClassification", model, kwargs, logits=y)


def _map_of_logits(model: nn.Module, kwargs: Mapping[str, Any], y: Tensor) -> Any:
    return _output("MobileViTForSemanticSegmentation", model, kwargs, logits=y)


CALLS = {
    "MobileViTModel": Calls(_image, _features),
    "MobileViTForImageClassification": Calls(_image, _logits),
    "MobileViTForSemanticSegmentation": Calls(_image, _map_of_logits),
}
