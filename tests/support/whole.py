# SPDX-License-Identifier: Apache-2.0
"""Networks of every library that are one native call when they are frozen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels import MobileViTDeepLabV3
from mvit_kernels.nn import register_timm_models
from support import models

CLASSES = 99  # odd, and many: of a handful of logits the largest error is a matter of luck

# name -> (maker, path of the classifier; none of a backbone)
NETWORKS = {
    "timm": (lambda: models.build("timm", num_classes=CLASSES), "head.fc"),
    "timm avg": (lambda: models.build("timm", num_classes=CLASSES, global_pool="avg"), "head.fc"),
    "timm features": (lambda: models.build("timm", num_classes=0), None),
    "timm map": (lambda: models.build("timm", num_classes=0, global_pool=""), None),
    "own": (lambda: models.build("own", num_classes=CLASSES), "classifier"),
    "own map": (lambda: models.build("own", num_classes=0), None),
    "own in timm": (lambda: _sensible(_in_timm), "classifier"),
    "own deeplabv3": (lambda: _sensible(lambda: MobileViTDeepLabV3("xxs", num_classes=CLASSES)), "classifier"),
    "huggingface": (lambda: models.build("huggingface", num_labels=CLASSES), "classifier"),
    "huggingface features": (lambda: models.build("huggingface", num_labels=0), None),
    "huggingface model": (lambda: models.build("huggingface", task="Model"), None),
    "huggingface deeplabv3": (
        lambda: models.build("huggingface", task="ForSemanticSegmentation", num_labels=CLASSES, output_stride=16),
        "segmentation_head.classifier",
    ),
    "kornia": (lambda: models.build("kornia"), None),
    "cvnets": (lambda: models.build("cvnets", num_classes=CLASSES), "classifier.fc"),
}
CLASSIFIERS = ("timm", "timm avg", "own", "own in timm", "huggingface", "cvnets")  # with a linear layer


def _in_timm() -> nn.Module:
    register_timm_models()
    return models.third_party.import_timm().create_model("mvit_kernels_mobilevit_xxs", num_classes=CLASSES)


def _sensible(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.sensible(mvit_kernels.restore(make()))


@functools.cache
@torch.inference_mode(False)  # wherever it is first wanted: inference tensors do not count their changes
def network(name: str) -> nn.Module:
    """Do not change it."""
    return NETWORKS[name][0]()


@functools.cache
@torch.inference_mode(False)
def frozen_network(name: str) -> nn.Module:
    """Do not change it."""
    return mvit_kernels.freeze(network(name))


def tensors(output: object) -> list[Tensor]:
    """What a model returns, without its class."""
    return [output] if isinstance(output, Tensor) else list(output.values() if hasattr(output, "values") else output)
