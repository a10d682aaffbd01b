# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of networks for other tasks: converted and loaded between the layouts, and taken apart."""

from __future__ import annotations

import logging

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import MobileViTForSemanticSegmentation, MobileViTModel

from mvit_kernels import MobileViT, MobileViTDeepLabV3, convert_state_dict, load_checkpoint
from mvit_kernels.checkpoints.table import HEADS, head_keys, network
from support import models
from support.cvnets_deeplab import SegEncoderDecoder

CLASSES = 5
LAYOUTS = ("own", "huggingface", "cvnets")
Weights = dict[str, Tensor]


def blank(layout: str, classes: int = CLASSES) -> nn.Module:
    """A model with this layout's keys."""
    if layout == "own":
        return MobileViTDeepLabV3("xxs", classes)
    if layout == "cvnets":
        return SegEncoderDecoder("xxs", classes)
    config = models.huggingface_config("xxs", num_labels=classes, output_stride=16)
    return MobileViTForSemanticSegmentation(config)


@pytest.fixture(scope="module")
def trained() -> MobileViTDeepLabV3:
    """Do not write to it."""
    torch.manual_seed(0)
    return models.sensible(MobileViTDeepLabV3("xxs", CLASSES, classifier_dropout=0.0))


@pytest.fixture(scope="module")
def weights(trained) -> Weights:
    return trained.state_dict()


@pytest.fixture(scope="module")
def classifier() -> Weights:
    torch.manual_seed(1)
    return MobileViT("xxs", num_classes=7).state_dict()


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def below(prefix: str, state_dict: Weights) -> Weights:
    return {prefix + key: value for key, value in state_dict.items()}


def without(state_dict: Weights, *prefixes: str) -> Weights:
    return {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}


# -- the table


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.task)
def test_every_layout_names_every_part_of_a_head_once(head):
    own = head_keys(head, "own")
    assert head.layouts[0] == "own" and head_keys(head, "timm") == {}
    for layout in head.layouts:
        keys = head_keys(head, layout)
        names = [name for (name,) in keys.values()]
        assert keys.keys() == own.keys() and len(set(names)) == len(names)
        assert not set(names) & {name for each in network(layout).values() for name in each} - {
            "classifier.weight",  # of the own segmentation, whose network is below `backbone.`
            "classifier.bias",
        }


# -- between the layouts


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_layouts_hold_the_same_network(source, target, weights):
    """Strictly, and whole: what is converted is exactly what the other library's model wants."""
    given = convert_state_dict(weights, to=source)
    converted = convert_state_dict(given, to=target)
    blank(target).load_state_dict(converted)
    assert same(convert_state_dict(converted, to="own"), weights)
    assert same(convert_state_dict(load_checkpoint(blank(target), given).state_dict(), to="own"), weights)


@pytest.mark.parametrize("mode", ["xxs", "xs", "s"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_same_outputs_as_cvnets(mode, output_stride):
    torch.manual_seed(0)
    theirs = models.sensible(SegEncoderDecoder(mode, CLASSES, output_stride))
    ours = MobileViTDeepLabV3(mode, CLASSES, output_stride=output_stride)
    load_checkpoint(ours, theirs.state_dict()).eval()
    x = models.images(1, 64, 96)
    with torch.no_grad():
        y, expected = ours(x), theirs(x)
        y = nn.functional.interpolate(y, (64, 96), mode="bilinear", align_corners=False)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_newer_cvnets(weights):
    """The classifier has a shorter name there, and training can add an auxiliary one."""
    newer = SegEncoderDecoder("xxs", CLASSES, newer=True)
    assert "seg_head.classifier.block.conv.weight" in newer.state_dict()
    load_checkpoint(newer, weights)
    assert torch.equal(newer.seg_head.classifier.block.conv.bias, weights["classifier.bias"])
    given = newer.state_dict() | {"seg_head.aux_head.0.block.conv.weight": torch.ones(1)}
    assert same(load_checkpoint(blank("own"), given).state_dict(), weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: below("module.", sd),
        lambda sd: below("net._orig_mod.", sd),
        lambda sd: {"state_dict": below("model.", sd), "epoch": 3},
        lambda sd: {"model": {k: torch.zeros_like(v) for k, v in sd.items()}, "model_ema": sd},
        lambda sd: {**below("net.", {k: v + 1 for k, v in sd.items()}), **below("ema.", sd)},
        lambda sd: below("net.", sd) | {"loss.weight": torch.ones(3), "decoder2.weight": torch.ones(2)},
        lambda sd: {k: v for k, v in sd.items() if not k.endswith("num_batches_tracked")},
        lambda sd: {k.replace("backbone.", "backbone._orig_mod."): v for k, v in sd.items()},
    ],
    ids=["DDP", "compiled", "Lightning", "EMA", "EMA within", "beside others", "no counters", "compiled inside"],
)
def test_wrapped_state_dicts_load(wrap, layout, weights):
    model = load_checkpoint(blank("own"), wrap(convert_state_dict(weights, to=layout)))
    kept = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    state = model.state_dict()
    assert same({key: state[key] for key in kept}, kept)


def test_wrapped_models_load(weights):
    for wrap in (torch.compile, nn.DataParallel, lambda model: nn.ModuleDict({"net": model})):
        model = blank("own")
        load_checkpoint(wrap(model), below("module.", weights))
        assert same(model.state_dict(), weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_load(suffix, weights, tmp_path):
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(convert_state_dict(weights, to="huggingface"), tmp_path / f"weights{suffix}")
    assert same(load_checkpoint(blank("own"), tmp_path / f"weights{suffix}").state_dict(), weights)


# -- parts of a network


def test_classification_into_a_backbone(classifier, weights, caplog):
    """From every layout; the last convolution and the classifier are left out, and the log says so."""
    model = blank("own")
    for layout in ("own", "timm", "huggingface", "cvnets"):
        model.load_state_dict(weights)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mvit_kernels"):
            load_checkpoint(model.backbone, convert_state_dict(classifier, to=layout))
        assert "which the model does not have" in caplog.text
        state = model.state_dict()
        taken = {key: value for key, value in state.items() if key.startswith("backbone.")}
        assert same(taken, below("backbone.", without(classifier, "final_conv.", "classifier.")))
        assert all(torch.equal(state[key], weights[key]) for key in state.keys() - taken.keys())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segmentation_into_a_backbone(layout, weights, caplog):
    bare = MobileViT("xxs")
    bare.final_conv = nn.Identity()
    expected = {key.removeprefix("backbone."): v for key, v in weights.items() if key.startswith("backbone.")}
    config = models.huggingface_config("xxs")
    for model in (bare, blank("own").backbone, MobileViTModel(config, expand_output=False)):
        caplog.clear()
        load_checkpoint(model, convert_state_dict(weights, to=layout))
        assert "also has the head of DeepLabv3, for segmentation, which is left out" in caplog.text
        assert same(convert_state_dict(model.state_dict(), to="own"), expected)


def test_flip_stem_channels(weights):
    model = load_checkpoint(blank("own"), weights, flip_stem_channels=True)
    assert torch.equal(model.backbone.stem.conv.weight, weights["backbone.stem.conv.weight"].flip(1))


# -- what must not load: one clear error, and the model as it was


REFUSED = {
    "other classes": (
        lambda sd, _: MobileViTDeepLabV3("xxs", 9).state_dict(),
        r"classifier\.weight is \(9, 256, 1, 1\).*has 9 classes, the model 5.*num_classes=9.*model\.backbone",
    ),
    "another variant": (
        lambda sd, _: MobileViTDeepLabV3("xs", CLASSES).state_dict(),
        "checkpoint is a MobileViT-XS, the model a MobileViT-XXS: build the model as 'xs'",
    ),
    "a wider pyramid": (
        lambda sd, _: {
            key: value.repeat(2, *[1] * (value.ndim - 1)) if key.startswith("aspp.project.") and value.ndim else value
            for key, value in sd.items()
        },
        "heads differ in more than the classes: build the model as published for DeepLabv3",
    ),
    "a classifier": (
        lambda _, classifier: classifier,
        r"has no aspp\.branches\.0.*load the network alone: load_checkpoint\(model\.backbone, \.\.\.\)",
    ),
    "a backbone": (
        lambda sd, _: without(sd, "aspp.", "classifier."),
        r"has no aspp\.branches\.0.*load_checkpoint\(model\.backbone, \.\.\.\)",
    ),
    "a branch is missing": (
        lambda sd, _: without(sd, "aspp.branches.2."),
        r"nearest is own, with 335 of 341 keys: aspp\.branches\.2\.conv\.weight",
    ),
    "a branch too many": (
        lambda sd, _: sd | {"aspp.branches.4.conv.weight": torch.ones(1)},
        r"and also aspp\.branches\.4\.conv\.weight",
    ),
    "NaN": (lambda sd, _: sd | {"classifier.bias": torch.full((CLASSES,), torch.nan)}, "NaN.*classifier.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoints_leave_the_model_as_it_was(case, weights, classifier):
    spoil, message = REFUSED[case]
    model = blank("own")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, spoil(weights, classifier))
    assert same(model.state_dict(), before)


def test_refused_models(weights):
    """A network without the last convolution cannot fill a model that has it."""
    for model in (MobileViT("xxs"), MobileViT("xxs", num_classes=5)):
        with pytest.raises(ValueError, match=r"of DeepLabv3 for segmentation, has no final_conv.*nn\.Identity\(\)"):
            load_checkpoint(model, weights)
    hf = models.huggingface("xxs", num_labels=5)
    with pytest.raises(ValueError, match=r"has no .*expand_output=False"):
        load_checkpoint(hf, weights)


def test_layouts_without_the_task(weights):
    with pytest.raises(ValueError, match=r"is DeepLabv3, for segmentation, which timm's layout does not have"):
        convert_state_dict(weights, to="timm")
    backbone = without(weights, "aspp.", "classifier.")
    assert "stages.4.1.norm.bias" in convert_state_dict(backbone, to="timm")


def test_shapes_that_count_no_classes():
    head = HEADS[0]._replace(counted=("classifier.bias", 6, 4))
    sizes = {30: 1, 6 * (4 + 81): 81, 24: None, 31: None}
    assert {n: head.classes({"segmentation:classifier.bias": torch.ones(n)}) for n in sizes} == sizes
