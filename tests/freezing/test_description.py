# SPDX-License-Identifier: Apache-2.0
"""What a model knows of itself: kind, architecture, classes, names, preprocessing."""

from __future__ import annotations

import json

import pytest
from torch import nn

import mvit_kernels
from mvit_kernels.freezing.description import describe, known_labels
from support import models
from support.whole import frozen_network

PUBLISHED = {"size": [256, 256], "shortest_edge": 288, "interpolation": "bilinear", "rescale": 1 / 255}
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
TIMM = {"size": [256, 256], "shortest_edge": 284, "interpolation": "bicubic", "rescale": 1 / 255, **PLAIN}

WANTED = {
    "timm": {"kind": "timm", "preprocessing": {**TIMM, "channel_order": "RGB"}},
    "timm features": {"kind": "timm", "num_classes": 0},
    "own": {"kind": "own", "preprocessing": {**PUBLISHED, **PLAIN, "channel_order": "RGB"}},
    "own in timm": {
        "kind": "own",
        "architecture": "mvit_kernels_mobilevit_xxs",
        "preprocessing": {**TIMM, "channel_order": "RGB"},
    },
    "own deeplabv3": {"kind": "own", "architecture": "deeplabv3_mobilevit_xxs"},
    "huggingface": {"kind": "huggingface", "preprocessing": {**PUBLISHED, **PLAIN, "channel_order": "BGR"}},
    "huggingface model": {"kind": "huggingface", "num_classes": 0},
    "huggingface deeplabv3": {"kind": "huggingface", "architecture": "deeplabv3_mobilevit_xxs"},
    "kornia": {"kind": "kornia", "num_classes": 0, "multiple": 64},
    "cvnets": {"kind": "cvnets", "preprocessing": {**PUBLISHED, **PLAIN}},
}


@pytest.mark.parametrize("name", WANTED)
def test_what_is_known(name):
    facts = describe(frozen_network(name))
    assert json.loads(json.dumps(facts)) == facts
    expected = {"architecture": "mobilevit_xxs", "num_classes": 99} | WANTED[name]
    assert {key: facts[key] for key in expected} == expected
    assert "labels" not in facts and ("preprocessing" in facts) is (name != "kornia")


def test_labels():
    names = [f"class {index}" for index in range(99)]
    assert describe(frozen_network("cvnets"), labels=names)["labels"] == names
    with pytest.raises(ValueError, match="98 labels and 99 classes"):
        describe(frozen_network("cvnets"), labels=names[1:])
    with pytest.raises(TypeError, match="a list of names is wanted"):
        describe(frozen_network("cvnets"), labels=range(99))
    named = models.build("huggingface", num_labels=11)
    assert known_labels(named) is None  # LABEL_0 and so on
    named.config.id2label = {index: f"name {index}" for index in reversed(range(11))}
    assert describe(mvit_kernels.freeze(named))["labels"] == [f"name {index}" for index in range(11)]


def test_labels_of_imagenet():
    imagenet = known_labels(models.build("timm", num_classes=1000))
    assert len(imagenet) == 1000 and imagenet[0].startswith("tench") and imagenet[999].startswith("toilet tissue")
    assert known_labels(models.build("own", num_classes=1000)) is None


def test_an_image_processor_knows_better():
    transformers = models.third_party.import_transformers()
    processor = transformers.MobileViTImageProcessor(
        size={"shortest_edge": 300}, crop_size={"height": 224, "width": 192}, resample=2, do_flip_channel_order=False
    )
    ours = describe(frozen_network("huggingface"), processor=processor)["preprocessing"]
    wanted = PUBLISHED | PLAIN | {"size": [224, 192], "shortest_edge": 300, "channel_order": "RGB"}
    assert ours == wanted
    processor.do_normalize, processor.image_mean, processor.image_std = True, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]
    ours = describe(frozen_network("huggingface"), processor=processor)["preprocessing"]
    assert (ours["mean"], ours["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.2, 0.3])


def test_what_nobody_knows():
    assert describe(nn.Conv2d(3, 4, 1)) == {}
    assert describe(frozen_network("timm").stages[2][1]) == {}
