# SPDX-License-Identifier: Apache-2.0
"""Detection as a training task: augmentation that keeps boxes on their objects, mAP, parts of folders, the network."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mvit_kernels.nn import MobileViT, MobileViTSSDLite
from mvit_kernels.training.recipe import read_recipe
from mvit_kernels.training.seeds import seed_sample
from mvit_kernels.training.tasks import bare, task_of
from mvit_kernels.training.tasks.detection import average_precision
from support.data import data_path, land_use_checkpoint

pytest.importorskip("torchvision")

RED, BLUE = (230, 20, 20), (20, 20, 230)


def recipe(**changes):
    return read_recipe("ssdlite_finetune", {"model": "ssdlite/xxs", "size": [96, 96], **changes})


def rectangle(folder, name, boxes, size=(120, 80), difficult=()):
    """A grey photo with coloured rectangles, and its VOC file; the first box is red, the second blue."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), 100, np.uint8)
    objects = ""
    for place, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right] = (RED, BLUE)[place]
        objects += (
            f"<object><name>{('red', 'blue')[place]}</name><difficult>{int(place in difficult)}</difficult><bndbox>"
            f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        )
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        rectangle(tmp_path / "set", f"p{i}", [(10 + i, 20, 50, 60), (70, 10, 110, 40 + i)])
    return tmp_path / "set"


def opened(folder, validation=None, **changes):
    task = task_of(recipe(**changes))
    return task, *task.open(folder, validation=validation)


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (160, 96)])
def test_boxes_stay_on_their_objects(folder, size):
    _, training, _ = opened(folder, 0, **{"augmentation.vertical_flip": 0.5, "augmentation.photometric": 0})
    seen = set()
    for draw in range(60):
        seed_sample(0, draw, draw % 6)
        image, target = training[draw % 6, size]
        assert image.shape == (3, *size) and image.dtype == torch.float32 and type(image) is torch.Tensor
        assert type(target["boxes"]) is torch.Tensor and len(target["boxes"]) == len(target["labels"]) >= 1
        for label, box in zip(target["labels"].tolist(), target["boxes"], strict=True):
            redness = image[0] - image[2]
            rows, columns = torch.where((redness if training.classes[label - 1] == "red" else -redness) > 0.5)
            found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() < 2, (draw, found, box)
        seen.add(tuple(target["boxes"].flatten().round().tolist()))
    assert len(seen) > 30  # and it is random


def test_distortion_is_of_colours_alone(folder):
    off = {"augmentation.ssd_crop": 0, "augmentation.flip": 0}
    _, plain, _ = opened(folder, 0, **off, **{"augmentation.photometric": 0})
    _, distorted, _ = opened(folder, 0, **off, **{"augmentation.photometric": 1})
    seed_sample(0, 0, 0)
    image, target = distorted[0, (96, 96)]
    before, boxes = plain[0, (96, 96)]
    assert torch.equal(target["boxes"], boxes["boxes"]) and (image - before).abs().mean() > 0.02
    seed_sample(0, 0, 0)
    assert torch.equal(distorted[0, (96, 96)][0], image)  # by the seed alone


def test_validation_is_plain(folder):
    task, _, validation = opened(folder, 1, mean=[0.5, 0.25, 0], std=[0.5, 1, 2])
    image, target = validation[2, (80, 60)]
    assert validation.names[2] == "p2.png" and validation.classes == ("blue", "red")
    expected = torch.tensor([[12 / 2, 20, 50 / 2, 60], [35, 10, 55, 42]])
    assert torch.equal(target["boxes"], expected) and target["labels"].tolist() == [2, 1]
    assert torch.equal(target["photo_boxes"], expected * torch.tensor([2, 1, 2, 1]))
    assert target["size"].tolist() == [80, 120]
    pixel = (image[:, 40, 15] * torch.tensor([0.5, 1, 2]) + torch.tensor([0.5, 0.25, 0])) * 255
    assert pixel.round().tolist() == list(RED)
    assert torch.equal(image, validation[2, (80, 60)][0])


def test_crowds_and_difficult_objects(tmp_path):
    folder = tmp_path / "set"
    rectangle(folder, "a", [(10, 20, 50, 60), (70, 10, 110, 40)], difficult=(1,))
    _, training, _ = opened(folder, 0, **{"augmentation.ssd_crop": 0})
    assert len(training[0, (96, 96)][1]["labels"]) == 2  # difficult objects are trained on
    _, _, validation = opened(folder, 1)
    assert validation[0, (96, 96)][1]["uncounted"].tolist() == [0, 1]  # and not counted
    (folder / "a.xml").unlink()
    boxes = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [10, 20, 40, 40], "iscrowd": i} for i in (0, 1)]
    images = [{"id": 1, "file_name": "a.png"}]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "red"}]}
    (folder / "annotations.json").write_text(json.dumps(coco))
    _, training, _ = opened(folder, 0)
    assert len(training[0, (96, 96)][1]["labels"]) == 1
    _, _, validation = opened(folder, 1)
    _, target = validation[0, (96, 96)]
    assert len(target["labels"]) == 1 and target["uncounted"].tolist() == [0, 1]
    coco["annotations"] = boxes[1:]
    (folder / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="no box to train on among its 1 training photos"):
        opened(folder, 0)


# ----------------------------------------------------------------------------------------------------------- parts


def test_a_share_is_held_back(folder):
    task, training, validation = opened(folder)
    assert len(training) == 5 and len(validation) == 1 and not set(training.names) & set(validation.names)
    assert task.remarks == ["held back for validation: 1 of 6 samples"]
    _, training, validation = opened(folder, 0.5)
    assert len(training) == len(validation) == 3
    for share, lengths in ((0, (6, 0)), (1, (0, 6))):
        _, training, validation = opened(folder, share)
        assert (len(training), len(validation)) == lengths and training.classes == validation.classes


def test_own_validation_samples(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            rectangle(tmp_path / split, f"{split}{i}", [(10, 20, 50, 60), (70, 10, 110, 40)])
    rectangle(tmp_path / "train", "empty", [])
    task, training, validation = opened(tmp_path)
    assert training.names == ["train0.png", "train1.png", "train2.png"] and validation.names == ["val0.png", "val1.png"]
    assert task.remarks == ["left out of training, without a box: 1 photos"]
    with pytest.raises(ValueError, match="has validation samples of its own, in val; leave it out"):
        opened(tmp_path, 0.3)
    (tmp_path / "train/classes.txt").write_text("blue\n")
    with pytest.raises(ValueError, match="train0.xml has 'red', which is not among the classes blue"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "train")
    _, training, validation = opened(tmp_path, 1)
    assert (len(training), len(validation)) == (0, 2)
    with pytest.raises(ValueError, match="a folder val for validation, and no train"):
        opened(tmp_path)


def test_vocs_lists(folder):
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("p1\np3\n")
    (lists / "val.txt").write_text("p0  1\n")
    _, training, validation = opened(folder)
    assert training.names == ["p1.png", "p3.png"] and validation.names == ["p0.png"]
    (lists / "train.txt").write_text("p1\np9\n")
    with pytest.raises(ValueError, match="p9.xml is missing"):
        opened(folder)


@pytest.mark.parametrize("where", ["", "images/"])
def test_cocos_folders(folder, tmp_path, where):
    root = tmp_path / "coco"
    for split, names in (("train2017", ["p0.png", "p1.png"]), ("val2017", ["p2.png"])):
        (root / where / split).mkdir(parents=True)
        for name in names:
            shutil.copy(folder / name, root / where / split / name)
        (root / "annotations").mkdir(exist_ok=True)
        boxes = [
            {"id": i, "image_id": i, "category_id": 5, "bbox": [10, 20, 40, 40], "iscrowd": 0}
            for i, _ in enumerate(names)
        ]
        images = [{"id": i, "file_name": name, "width": 120, "height": 80} for i, name in enumerate(names)]
        coco = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "red"}]}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(coco))
    _, training, validation = opened(root)
    assert training.names == ["p0.png", "p1.png"] and validation.names == ["p2.png"] and training.classes == ("red",)


def test_known_classes_decide_their_order(folder):
    task = task_of(recipe())
    task.classes = ("red", "green", "blue")
    _, validation = task.open(folder, validation=1)
    assert validation.classes == ("red", "green", "blue") and validation[0, (96, 96)][1]["labels"].tolist() == [1, 3]


# ------------------------------------------------------------------------------------------------- losses and mAP


def test_losses_fall_and_a_batch_of_one_works(folder):
    torch.manual_seed(0)
    task, training, _ = opened(folder, 0, **{"augmentation.ssd_crop": 0, "augmentation.photometric": 0})
    model = task.build(training.classes, None).train()
    assert isinstance(model, MobileViTSSDLite) and model.num_classes == 3 and model.mode == "xxs"
    batch = task.collate([training[i, (96, 96)] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(6):
        found = task.losses(model, *batch)
        assert set(found) == {"loss", "classification", "localization"}
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(found["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith(("extra", "heads"))}
    task.losses(model, *task.collate([training[0, (96, 96)]]))["loss"].backward()
    assert all(torch.equal(buffer, model.get_buffer(name)) for name, buffer in before.items())
    assert all(module.training for module in model.modules())  # as before


class Oracle(torch.nn.Module):
    """In place of the network: "detects" what it is told to."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        return images

    def detect(self, output, size):
        assert size == tuple(output.shape[-2:])
        return [self.answers.pop(0) for _ in output]


def answer(target, keep=slice(None), shift=0.0, swap=False):
    labels = target["labels"][keep]
    return {
        "boxes": target["boxes"][keep] + shift,
        "scores": torch.linspace(0.9, 0.5, len(labels)),
        "labels": 3 - labels if swap else labels,
    }


@pytest.mark.parametrize(
    "options, map50, per_class",
    [
        ({}, 1.0, [1.0, 1.0]),
        ({"keep": slice(0)}, 0.0, [0.0, 0.0]),
        ({"keep": slice(1)}, 0.5, [0.0, 1.0]),  # the red ones alone; "blue" comes first
        ({"swap": True}, 0.0, [0.0, 0.0]),
        ({"shift": 60.0}, 0.0, [0.0, 0.0]),
    ],
    ids=["perfect", "nothing", "one class", "wrong class", "wrong place"],
)
def test_mean_average_precision(folder, options, map50, per_class):
    task, _, validation = opened(folder, 1)
    samples = [validation[i, (64, 128)] for i in range(6)]  # another aspect than the photos': 80 × 120
    model = Oracle([answer(target, **options) for _, target in samples])
    batches = [task.collate(samples[:4]), task.collate(samples[4:])]
    figures = task.evaluate(model, batches, torch.device("cpu"))
    assert figures["map50"] == pytest.approx(map50, abs=1e-6)
    assert figures["per_class"] == pytest.approx(per_class, abs=1e-6)
    if not options:
        assert figures["map"] == figures["map75"] == pytest.approx(1, abs=1e-6)
        assert figures["per_class_map"] == pytest.approx([1, 1], abs=1e-6)


def test_difficult_objects_count_neither_way(tmp_path):
    rectangle(tmp_path, "a", [(10, 20, 50, 60), (70, 10, 110, 40)], difficult=(0,))
    task, _, validation = opened(tmp_path, 1)
    sample = validation[0, (80, 120)]
    for keep in (slice(None), slice(1, 2)):  # found or missed
        figures = task.evaluate(Oracle([answer(sample[1], keep)]), [task.collate([sample])], torch.device("cpu"))
        assert figures["map50"] == pytest.approx(1, abs=1e-6) and figures["per_class"] == [pytest.approx(1), None]


def test_average_precision_of_nothing():
    figures = average_precision([], ("a", "b"))
    assert figures["map50"] == figures["map"] == 0 and figures["per_class"] == [None, None]


# --------------------------------------------------------------------------------------------------------- network


def test_from_a_classifier(folder):
    task, training, _ = opened(folder, 0, model=None)
    model = task.build(training.classes, land_use_checkpoint())
    assert model.mode == "xxs" and "the head of SSDLite is new" in task.remarks[-1]
    stem = torch.load(land_use_checkpoint(), map_location="cpu", weights_only=True)["conv_1.block.conv.weight"]
    assert torch.equal(model.backbone.stem.conv.weight, stem)


def test_from_another_detector(tmp_path):
    torch.manual_seed(0)
    before = MobileViTSSDLite("xxs", num_classes=4)
    path = tmp_path / "before.pth"
    torch.save({"state_dict": before.state_dict()}, path)

    def build(classes, labels, new_head=None):
        task = task_of(recipe(model=None))
        task.labels, task.new_head = labels, new_head
        return task.build(classes, path).eval(), task.remarks

    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        logits, offsets = before.eval()(x)
        same, remarks = build(("a", "b", "c"), None)
        assert torch.equal(same(x).logits, logits) and "without names" in remarks[-1]
        turned, remarks = build(("c", "new", "a"), ("a", "b", "c"))
        assert "2 of 3 classes are predicted as the checkpoint does, new is new" in remarks[-1]
        output = turned(x)
        torch.testing.assert_close(output.offsets, offsets)
        torch.testing.assert_close(output.logits[..., [0, 1, 3]], logits[..., [0, 3, 1]])
        assert not torch.allclose(output.logits[..., 2], logits[..., 2])
        anew, _ = build(("a", "b", "c"), ("a", "b", "c"), new_head=True)
        torch.testing.assert_close(anew(x).offsets, offsets)
        assert not torch.allclose(anew(x).logits[..., 1], logits[..., 1])
    with pytest.raises(ValueError, match="has 3 classes, and the samples 1, among them x"):
        build(("x",), ("a", "b", "c"), new_head=False)
    with pytest.raises(ValueError, match="a head of 3 classes, and 2 names"):
        build(("a", "b"), ("a", "b"))


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model 'mobilevit_s' is not one of ssdlite/xxs"):
        task_of(recipe(model="mobilevit_s")).build(("a",), None)
    with pytest.raises(ValueError, match="model 'deeplabv3/s' is not one of"):
        task_of(recipe(model="deeplabv3/s")).build(("a",), None)
    with pytest.raises(ValueError, match="pretrained: no weights of ssdlite"):
        task_of(recipe(pretrained=True)).build(("a",), None)
    path = tmp_path / "classifier.pth"
    torch.save(MobileViT("xxs", num_classes=3).state_dict(), path)
    task = task_of(recipe())
    task.new_head = False
    with pytest.raises(ValueError, match="has no head of SSDLite"):
        task.build(("a",), path)


def test_recipe_reaches_the_network():
    model = task_of(recipe(dropout=0.3, output_stride=16)).build(("a",), None)
    assert len(model.anchors(96, 96)) > len(task_of(recipe()).build(("a",), None).anchors(96, 96))
    assert any(module.p == 0.3 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert bare(model) is model


def test_raccoons():
    task, training, validation = opened(data_path("raccoon"), 0.33)
    assert len(training) == 32 and len(validation) == 16
    seed_sample(0, 0, 0)
    images, targets = task.collate([training[i, (96, 96)] for i in range(2)])
    assert images.shape == (2, 3, 96, 96) and len(targets) == 2


def test_annotations_elsewhere(folder, tmp_path):
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 40, 40]}]
    coco = {"images": [{"id": 1, "file_name": "p0.png"}], "annotations": boxes, "categories": [{"id": 1, "name": "ox"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    task = task_of(recipe())
    task.annotations = tmp_path / "boxes.json"
    training, _ = task.open(folder, validation=0)
    assert training.names == ["p0.png"] and training.classes == ("ox",)
