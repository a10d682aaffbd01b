# SPDX-License-Identifier: Apache-2.0
"""Anchors against a formula written out, the loss against torchvision's own in float64, and boxes from outputs."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou
from torchvision.tv_tensors import BoundingBoxes

from mvit_kernels.nn import SSDOutput
from mvit_kernels.nn.multibox import anchors_per_cell, default_boxes, detections, multibox_loss
from support import cvnets_ssd

SIZE = (320, 320)
MAPS = [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
TORCHVISION = types.SimpleNamespace(  # what SSD's methods read of the model
    box_coder=CODER, neg_to_pos_ratio=3, score_thresh=0.01, topk_candidates=400, nms_thresh=0.5, detections_per_img=200
)


def anchors(dtype: torch.dtype = torch.float64) -> Tensor:
    return default_boxes(MAPS, SIZE, "cpu", dtype)


def target(*boxes: tuple[float, ...], labels: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    labels = tuple(range(1, len(boxes) + 1)) if labels is None else labels
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def random_boxes(count: int, generator: torch.Generator, size: tuple[int, int] = SIZE) -> Tensor:
    """Boxes inside of the image, of all sizes."""
    corners = torch.rand(2, count, 2, generator=generator, dtype=torch.float64).sort(0).values
    corners[1] += 0.02
    return (corners / 1.02).permute(1, 0, 2).flatten(1) * torch.tensor([size[1], size[0]]).repeat(2)


def random_output(batch: int, classes: int, generator: torch.Generator, scale: float = 2.0) -> SSDOutput:
    logits = scale * torch.randn(batch, 3232, classes, generator=generator, dtype=torch.float64)
    offsets = torch.randn(batch, 3232, 4, generator=generator, dtype=torch.float64)
    return SSDOutput(logits.requires_grad_(), offsets.requires_grad_())


# -- anchors


@pytest.mark.parametrize("size", [(320, 320), (300, 500), (33, 47)])
def test_anchors_are_those_of_the_formula(size):
    maps = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (16, 32, 64, 128, 256)] + [(1, 1)]
    wanted = torch.cat([cvnets_ssd.anchors_of(*each, index) for index, each in enumerate(maps)])
    if size == (320, 320):
        assert len(wanted) == 3232
    wanted = torch.cat((wanted[:, :2] - wanted[:, 2:] / 2, wanted[:, :2] + wanted[:, 2:] / 2), dim=1)
    pixels = torch.tensor([size[1], size[0]]).repeat(2)
    found = default_boxes(maps, size, "cpu", torch.float64)
    assert found.shape == wanted.shape
    assert (found / pixels - wanted).abs().max() <= 1e-7
    single = default_boxes(maps, size, "cpu", torch.float32)
    assert torch.equal(single, found.float())
    assert sum(h * w * n for (h, w), n in zip(maps, anchors_per_cell(), strict=True)) == len(wanted)


def test_anchors_first_asked_for_in_inference_serve_training():
    maps = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1)]
    with torch.inference_mode(), torch.device("meta"):
        first = default_boxes(maps, (61, 59), "cpu", torch.float32)
    assert not first.is_inference() and first.device.type == "cpu"
    (first * torch.ones(1, requires_grad=True)).sum().backward()


# -- the loss


def torchvision_loss(output: SSDOutput, targets: list[dict[str, Tensor]], boxes: Tensor) -> dict[str, Tensor]:
    matches = []
    for each in targets:
        if len(each["boxes"]):
            matches.append(SSDMatcher(0.5)(box_iou(each["boxes"], boxes)))
        else:
            matches.append(torch.full((len(boxes),), -1))
    outputs = {"bbox_regression": output.offsets, "cls_logits": output.logits}
    return SSD.compute_loss(TORCHVISION, targets, outputs, [boxes] * len(targets), matches)


@pytest.mark.parametrize("seed", range(4))
def test_loss_is_torchvisions(seed):
    """Values and gradients in float64, of a batch with many boxes, one, and none."""
    generator = torch.Generator().manual_seed(seed)
    output = random_output(3, 7, generator)
    targets = [
        {"boxes": random_boxes(n, generator), "labels": torch.randint(1, 7, (n,), generator=generator)}
        for n in (12, 1, 0)
    ]
    ours = multibox_loss(output, targets, anchors())
    gradients = torch.autograd.grad(ours["loss"], output)
    theirs = torchvision_loss(output, targets, anchors())
    torch.testing.assert_close(ours["localization"], theirs["bbox_regression"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours["classification"], theirs["classification"], rtol=1e-12, atol=0)
    assert ours["loss"] == ours["classification"] + ours["localization"]
    wanted = torch.autograd.grad(theirs["classification"] + theirs["bbox_regression"], output)
    for value, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    assert (gradients[0][2] == 0).all() and (gradients[1][2] == 0).all()  # the image without boxes


def test_three_negatives_a_positive_and_those_with_the_largest_loss():
    generator = torch.Generator().manual_seed(0)
    output = random_output(2, 4, generator)
    targets = [target((30, 40, 200, 220), (100, 10, 150, 60)), target((0, 0, 320, 320))]
    multibox_loss(output, targets, anchors())["classification"].backward()
    for image, each in enumerate(targets):
        positive = SSDMatcher(0.5)(box_iou(each["boxes"], anchors())) >= 0
        counted = (output.logits.grad[image] != 0).any(-1)
        assert (counted & positive).sum() == positive.sum() > 1
        assert (counted & ~positive).sum() == 3 * positive.sum()
        background = output.logits[image].detach().log_softmax(-1)[:, 0]
        assert background[counted & ~positive].max() <= background[~counted].min()


def test_every_box_has_an_anchor_and_the_last_of_two_takes_it():
    generator = torch.Generator().manual_seed(0)
    output = random_output(1, 4, generator)
    tiny = (101.0, 101.0, 103.0, 104.0)  # an IoU of 0.5 with no anchor
    iou = box_iou(target(tiny)["boxes"], anchors())[0]
    assert iou.max() < 0.1
    multibox_loss(output, [target(tiny, labels=(2,))], anchors())["localization"].backward()
    assert (output.offsets.grad[0] != 0).any(-1).nonzero().tolist() == [[int(iou.argmax())]]

    output = random_output(1, 4, generator)
    both = target(tiny, (101.0, 101.0, 103.5, 104.0), labels=(1, 3))
    assert len(set(box_iou(both["boxes"], anchors()).argmax(1).tolist())) == 1
    found = multibox_loss(output, [both], anchors())
    only = multibox_loss(output, [{key: value[1:] for key, value in both.items()}], anchors())
    assert found["loss"] == only["loss"]


def test_a_batch_without_boxes_costs_nothing():
    output = random_output(2, 3, torch.Generator().manual_seed(0))
    found = multibox_loss(output, [target(), target()], anchors())
    assert all(value == 0 for value in found.values())
    found["loss"].backward()
    assert (output.logits.grad == 0).all() and (output.offsets.grad == 0).all()


def test_more_negatives_wanted_than_there_are():
    """The background's anchors are counted once, and those with a box are not counted twice."""
    maps = [(1, 1)] * 6
    boxes = default_boxes(maps, (32, 32), "cpu", torch.float64)
    logits = torch.randn(1, 34, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = SSDOutput(logits, torch.zeros(1, 34, 4, dtype=torch.float64, requires_grad=True))
    targets = [target((0, 0, 32, 32), (6, 6, 26, 26), (10, 10, 22, 22))]
    found = multibox_loss(output, targets, boxes)["classification"]
    match = SSDMatcher(0.5)(box_iou(targets[0]["boxes"], boxes))
    assert 4 * (match >= 0).sum() > 34
    wanted = (
        torch.nn.functional.cross_entropy(logits[0], (match + 1).clamp(min=0), reduction="sum") / (match >= 0).sum()
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_computed_in_float32(dtype):
    output = SSDOutput(*(value.detach().to(dtype) for value in random_output(1, 4, torch.Generator().manual_seed(0))))
    targets = [target((30, 40, 200, 220), (100, 10, 150, 60))]
    exact = multibox_loss(SSDOutput(*(value.double() for value in output)), targets, anchors())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = multibox_loss(output, targets, anchors(torch.float32))["loss"]
    assert found.dtype == torch.float32
    assert (found - exact).abs() <= 1e-5 * exact


def test_boxes_of_torchvision_and_of_integers():
    output = random_output(1, 4, torch.Generator().manual_seed(0))
    plain = target((30, 40, 200, 220))
    wanted = multibox_loss(output, [plain], anchors())["loss"]
    for boxes in (
        plain["boxes"].int(),
        plain["boxes"].float(),
        BoundingBoxes(plain["boxes"], format="XYXY", canvas_size=SIZE),
    ):
        found = multibox_loss(output, [{"boxes": boxes, "labels": plain["labels"].int()}], anchors())["loss"]
        assert type(found) is Tensor and found == wanted
    other = BoundingBoxes(plain["boxes"], format="XYWH", canvas_size=SIZE)
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\] is in the format XYWH; convert it to XYXY"):
        multibox_loss(output, [{**plain, "boxes": other}], anchors())


GOOD = (10.0, 20.0, 110.0, 120.0)
NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([target(GOOD)], ValueError, "there are 1 targets and 2 images"),
        (target(GOOD), TypeError, "targets is dict; a list of dicts"),
        ([target(GOOD), None], TypeError, r"targets\[1\] is NoneType"),
        ([target(GOOD), {"boxes": torch.zeros(0, 4)}], TypeError, r"targets\[1\]\['labels'\] is missing"),
        ([target(GOOD), {"boxes": [GOOD], "labels": [1]}], TypeError, r"targets\[1\]\['boxes'\] is list"),
        (
            [target(GOOD), target(GOOD, labels=(1, 2))],
            ValueError,
            r"targets\[1\] has boxes of shape \(1, 4\) and labels",
        ),
        ([target(), {"boxes": torch.zeros(0), "labels": torch.zeros(0).long()}], ValueError, r"shape \(0,\)"),
        ([target(), {"boxes": torch.ones(1, 5), "labels": torch.ones(1).long()}], ValueError, r"shape \(1, 5\)"),
        ([target(), {"boxes": torch.ones(1, 4), "labels": torch.ones(1, 1).long()}], ValueError, r"shape \(1, 1\)"),
        ([target(), {"boxes": torch.ones(1, 4), "labels": torch.ones(1)}], TypeError, "labels'] is torch.float32"),
        ([target(GOOD), target(GOOD, labels=(0,))], ValueError, r"labels'\]\[0\] is 0; 1 to 3 is wanted; class 0"),
        ([target(GOOD), target(GOOD, GOOD, labels=(3, 4))], ValueError, r"targets\[1\]\['labels'\]\[1\] is 4; 1 to 3"),
        ([target(GOOD, labels=(-1,)), target()], ValueError, r"targets\[0\]\['labels'\]\[0\] is -1"),
        ([target(), target(GOOD, (9, 9, 9, 19))], ValueError, r"targets\[1\]\['boxes'\]\[1\] is \[9.0, 9.0, 9.0"),
        ([target((9, 30, 19, 20)), target()], ValueError, r"targets\[0\]\['boxes'\]\[0\] is .*; finite x1, y1"),
        ([target((9, NAN, 19, 20)), target()], ValueError, r"targets\[0\]\['boxes'\]\[0\] is \[9.0, nan"),
        ([target((9, 3, INFINITE, 20)), target()], ValueError, r"targets\[0\]\['boxes'\]\[0\] is \[9.0, 3.0, inf"),
    ],
)
def test_wrong_targets(targets, error, message):
    output = SSDOutput(torch.zeros(2, 3232, 4), torch.zeros(2, 3232, 4))
    with pytest.raises(error, match=f"^MobileViTSSDLite.loss: .*{message}"):
        multibox_loss(output, targets, anchors(), where="MobileViTSSDLite.loss")


# -- boxes


def seen(boxes: Tensor, labels: Tensor, classes: int, logit: float = 9.0) -> SSDOutput:
    """What a perfect network says: a box at the anchor with the largest IoU that is left, the background elsewhere."""
    logits = torch.zeros(1, 3232, classes)
    logits[..., 0] = 9.0
    offsets = torch.zeros(1, 3232, 4)
    index: list[int] = []
    for iou in box_iou(boxes, anchors()):
        iou[index] = -1.0
        index.append(int(iou.argmax()))
    logits[0, index, 0] = 0.0
    logits[0, index, labels] = logit
    offsets[0, index] = CODER.encode_single(boxes, anchors()[index]).float()
    return SSDOutput(logits, offsets)


def test_boxes_come_back_from_perfect_offsets():
    boxes = torch.tensor([[30.0, 40, 200, 220], [100, 10, 150, 60], [0, 0, 320, 300]], dtype=torch.float64)
    labels = torch.tensor([2, 1, 2])
    output = seen(boxes, labels, 4)
    output.logits[0, output.logits[0, :, 1] > 1, 1] = 7.0  # the second box is the least sure one
    (found,) = detections(output, anchors(), SIZE, score=0.5)
    assert sorted(found) == ["boxes", "labels", "scores"]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert found["labels"].dtype == torch.int64
    assert found["labels"].tolist() == [2, 2, 1]
    assert (found["scores"].diff() <= 0).all() and found["scores"][2] == pytest.approx(0.997, abs=1e-3)
    order = torch.tensor([0, 2, 1]) if (found["boxes"][0] - boxes[0]).abs().max() < 1 else torch.tensor([2, 0, 1])
    assert (found["boxes"] - boxes[order]).abs().max() <= 1e-3
    assert torch.equal(detections(output, anchors(), SIZE, score=0.998)[0]["labels"], torch.tensor([2, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        half = detections(SSDOutput(*(v.bfloat16() for v in output)), anchors(), SIZE, score=0.5)[0]
    assert half["boxes"].dtype == torch.float32 and len(half["boxes"]) == 3


def test_boxes_are_cut_to_the_image_after_suppression():
    """As published: two boxes that agree only within the image are two."""
    boxes = torch.tensor([[-300.0, 10, 100, 60], [0.0, 10, 100, 60]], dtype=torch.float64)
    (found,) = detections(seen(boxes, torch.tensor([1, 1]), 3), anchors(), SIZE, score=0.5)
    assert (found["boxes"] - torch.tensor([0.0, 10, 100, 60])).abs().max() <= 1e-3
    assert len(found["boxes"]) == 2


@pytest.mark.parametrize(("other", "count"), [((33.0, 40, 200, 220), 1), ((60.0, 100, 260, 290), 2)])
def test_suppression_within_a_class_alone(other, count):
    boxes = torch.tensor([[30.0, 40, 200, 220], other], dtype=torch.float64)
    (found,) = detections(seen(boxes, torch.tensor([1, 1]), 3), anchors(), SIZE, score=0.5)
    assert len(found["boxes"]) == count
    assert len(detections(seen(boxes, torch.tensor([1, 2]), 3), anchors(), SIZE, score=0.5)[0]["boxes"]) == 2
    assert len(detections(seen(boxes, torch.tensor([1, 1]), 3), anchors(), SIZE, score=0.5, iou=1.0)[0]["boxes"]) == 2


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_boxes_are_those_of_torchvision(scale):
    """Of random outputs with boxes inside of the image (torchvision cuts boxes before suppression). At 0 every score is
    above the threshold, so that the best 400 a class and the best 200 of all decide."""
    generator = torch.Generator().manual_seed(3)
    batch, classes = 2, 6
    logits = random_output(batch, classes, generator, scale).logits.detach()
    logits += torch.rand(logits.shape, generator=generator) * 1e-3
    boxes = random_boxes(batch * 3232, generator).unflatten(0, (batch, -1))
    offsets = torch.stack([CODER.encode_single(each, anchors()) for each in boxes])
    output = SSDOutput(logits.float(), offsets.float())
    ours = detections(output, anchors(), SIZE)
    outputs = {"bbox_regression": output.offsets, "cls_logits": output.logits}
    theirs = SSD.postprocess_detections(TORCHVISION, outputs, [anchors(torch.float32)] * batch, [SIZE] * batch)
    for found, wanted in zip(ours, theirs, strict=True):
        assert len(found["boxes"]) == 200
        assert torch.equal(found["scores"], wanted["scores"])
        # Boxes of different classes can have the same score.
        rows = [
            sorted(zip(*(each[key].tolist() for key in ("scores", "labels", "boxes")), strict=True))
            for each in (found, wanted)
        ]
        for (_, label, box), (_, other, expected) in zip(*rows, strict=True):
            assert label == other and box == pytest.approx(expected, abs=1e-3)


def test_limits():
    generator = torch.Generator().manual_seed(3)
    output = random_output(1, 6, generator)
    assert len(detections(output, anchors(), SIZE, most=7)[0]["boxes"]) == 7
    few = detections(output, anchors(), SIZE, top=2, iou=1.0)[0]
    assert few["labels"].bincount().tolist() == [0, 2, 2, 2, 2, 2]
    scores = output.logits[0].float().softmax(-1)[:, 1:]
    assert torch.equal(few["scores"].sort().values, scores.topk(2, dim=0).values.flatten().sort().values)
    nothing = detections(output, anchors(), SIZE, score=1.0)[0]
    assert [tuple(nothing[key].shape) for key in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]
    for wrong in ({"score": 1.5}, {"iou": -0.1}, {"top": 0}, {"most": 2.0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"^detections: {name}="):
            detections(output, anchors(), SIZE, **wrong)
