# SPDX-License-Identifier: Apache-2.0
"""State dicts of detectors: cvnets' and our own, strictly both ways, and a classifier's into a detector's backbone."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mvit_kernels import MobileViT, MobileViTSSDLite, convert_state_dict, load_checkpoint, restore, zoo
from mvit_kernels.checkpoints.table import HEADS, head_keys
from support import cvnets, cvnets_ssd, models

CLASSES = 7


def build(network: nn.Module) -> nn.Module:
    """With weights that expose mistakes, and statistics of more than two values a channel."""
    models.sensible(network)
    zoo.calibrate(network, [models.images(4, 320, 320)])
    return network.eval()


@pytest.fixture(scope="module")
def theirs() -> cvnets_ssd.SingleShotMaskDetector:
    """cvnets' network. Do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(cvnets_ssd.SingleShotMaskDetector("xxs", CLASSES, norm=cvnets.PlainLayerNorm))


@torch.no_grad()
def worst(ours: MobileViTSSDLite, theirs: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of logits and offsets, relative to the largest value."""
    pairs = zip(ours.eval()(x), theirs(x)[:2], strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("mode", ["xxs", "xs", "s"])
def test_the_same_network_under_other_names(mode):
    """Converted strictly both ways, and the outputs and the boxes are those of cvnets' network."""
    torch.manual_seed(0)
    theirs = build(cvnets_ssd.SingleShotMaskDetector(mode, CLASSES, norm=cvnets.PlainLayerNorm))
    original = theirs.state_dict()
    ours = MobileViTSSDLite(mode, CLASSES)
    converted = convert_state_dict(original, to="own")
    assert list(converted) == list(ours.state_dict())
    ours.load_state_dict(converted)
    back = convert_state_dict(ours.state_dict(), to="cvnets")
    assert list(back) == list(original) and all(torch.equal(back[key], original[key]) for key in original)
    for size in ((320, 320), (300, 500), (33, 47)) if mode == "xxs" else ((160, 192),):
        x = models.images(1, *size)
        assert worst(ours, theirs, x) <= 1e-5
        assert worst(restore(ours), theirs, x) <= 1e-5
        with torch.no_grad():
            output = ours(x)
            scores, offsets, anchors = theirs(x)
        # Every box, without suppression, is where their formula puts it.
        found = ours.detect(output, size, score=0.0, iou=1.0, top=len(anchors), most=CLASSES * len(anchors))[0]
        pixels = torch.tensor([size[1], size[0]]).repeat(2)
        boxes = (cvnets_ssd.decoded(offsets[0].double(), anchors) * pixels).clamp(min=0).minimum(pixels)
        order = scores[0].double().softmax(-1)[:, 1:].flatten().sort(descending=True)
        assert len(found["scores"]) == len(order.values)
        assert (found["scores"] - order.values).abs().max() <= 1e-5
        apart = order.values.diff().abs() > 1e-4  # scores whose order is sure
        sure = (torch.cat((apart, apart[:1])) & torch.cat((apart[:1], apart)))[:200].nonzero()[:, 0]
        assert len(sure) > 10
        where = order.indices[sure]
        assert torch.equal(found["labels"][sure], where % (CLASSES - 1) + 1)
        assert (found["boxes"][sure] - boxes[where // (CLASSES - 1)]).abs().max() <= 1e-2


def test_every_key_once(theirs):
    head = next(head for head in HEADS if head.task == "detection")
    for layout in ("own", "cvnets"):
        names = [name for names in head_keys(head, layout).values() for name in names]
        assert len(names) == len(set(names))
    inside = {f"backbone.{key}" for key in MobileViTSSDLite("xxs").backbone.state_dict()}
    own = {key.removeprefix("detection:") for key in head_keys(head, "own")}
    assert own | inside == set(MobileViTSSDLite("xxs").state_dict())


def test_loaded_both_ways(theirs, tmp_path):
    x = models.images(1, 64, 96)
    torch.save({"epoch": 3, "model_state_dict": theirs.state_dict()}, tmp_path / "ssd.pt")
    ours = load_checkpoint(MobileViTSSDLite("xxs", CLASSES), tmp_path / "ssd.pt")
    assert worst(ours, theirs, x) <= 1e-5
    again = cvnets_ssd.SingleShotMaskDetector("xxs", CLASSES, norm=cvnets.PlainLayerNorm).eval()
    load_checkpoint(again, {f"module.{key}": value for key, value in ours.state_dict().items()})
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    same = load_checkpoint(MobileViTSSDLite("xxs", CLASSES), ours.state_dict())
    assert worst(same, theirs, x) <= 1e-5


@pytest.mark.parametrize("library", ["timm", "huggingface", "cvnets", "own"])
def test_a_classifier_into_the_backbone(library):
    """For fine-tuning: all five stages, and nothing else of the detector."""
    classifier = models.build(library, "xxs")
    model = MobileViTSSDLite("xxs", CLASSES).eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    load_checkpoint(model.backbone, classifier.state_dict())
    full = load_checkpoint(MobileViT("xxs", num_classes=1000), classifier.state_dict()).eval()
    x = models.images(1, 64, 64)
    with torch.no_grad():
        for found, expected in zip(model.backbone.feature_maps(x), full.feature_maps(x), strict=False):
            assert torch.equal(found, expected)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(ValueError, match=r"has no .*extra\.0.* load_checkpoint\(model\.backbone, \.\.\.\)"):
        load_checkpoint(model, classifier.state_dict())


def test_a_detector_for_other_classes(theirs, caplog):
    model = MobileViTSSDLite("xxs", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has 7 classes, the model 3: .*num_classes=7.*model\.backbone, \.\.\.\)"):
        load_checkpoint(model, theirs.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with caplog.at_level(logging.WARNING, "mvit_kernels"):
        load_checkpoint(model.backbone, theirs.state_dict())
    assert "has the head of SSDLite, for detection, which is left out" in caplog.text
    stem = theirs.state_dict()["encoder.conv_1.block.conv.weight"]
    assert torch.equal(model.backbone.stem.conv.weight, stem)


def test_what_does_not_fit(theirs):
    state_dict = theirs.state_dict()
    with pytest.raises(ValueError, match="is a MobileViT-XXS, the model a MobileViT-S"):
        load_checkpoint(MobileViTSSDLite("s", CLASSES), state_dict)
    for layout in ("timm", "huggingface"):
        with pytest.raises(ValueError, match=rf"is SSDLite, for detection, which {layout}'s layout does not have"):
            convert_state_dict(state_dict, to=layout)
    lost = {key: value for key, value in state_dict.items() if "3.loc_cls_layer.dw_conv" not in key}
    with pytest.raises(ValueError, match=r"ssd_heads\.3\.loc_cls_layer\.dw_conv\.block\.conv\.weight, .* missing"):
        load_checkpoint(MobileViTSSDLite("xxs", CLASSES), lost)
    more = {**state_dict, "extra_layers.os_-1.1.block.conv.bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"also extra_layers\.os_-1\.1\.block\.conv\.bias, with no"):
        load_checkpoint(MobileViTSSDLite("xxs", CLASSES), more)
    with pytest.raises(ValueError, match="SSDLite for detection, has no"):
        load_checkpoint(MobileViT("xxs"), state_dict)


@pytest.mark.parametrize("name", [None, "ssdlite/xxs"])
def test_the_zoo_reads_task_variant_and_classes(theirs, tmp_path, name):
    torch.save(theirs.state_dict(), tmp_path / "ssd.pt")
    model = zoo.load(name, checkpoint=tmp_path / "ssd.pt")
    assert isinstance(model, MobileViTSSDLite) and (model.mode, model.num_classes) == ("xxs", CLASSES)
    x = models.images(1, 64, 64)
    assert worst(model, theirs, x) <= 1e-5
    with torch.no_grad():
        assert zoo.logits(model(x)) is not None and zoo.logits(model(x)).shape[-1] == CLASSES


def test_the_zoo_without_weights():
    model = zoo.load("ssdlite/xxs")
    assert (model.num_classes, model.training) == (81, False)
    with torch.no_grad():
        output = model(models.images(1, 320, 320))
    assert all(0.1 < value.std() < 100 for value in output)
    assert zoo.load("ssdlite/xs", num_classes=4).num_classes == 4
