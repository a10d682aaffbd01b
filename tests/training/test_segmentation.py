# SPDX-License-Identifier: Apache-2.0
"""Segmentation as a training task: masks that stay on their photos, mIoU, the network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mvit_kernels.nn import MobileViTDeepLabV3
from mvit_kernels.training.recipe import read_recipe
from mvit_kernels.training.seeds import seed_sample
from mvit_kernels.training.tasks import task_of
from mvit_kernels.training.tasks.segmentation import figures
from support.data import data_path, land_use_checkpoint

pytest.importorskip("torchvision")

# A class's brightness says its number, so that a photo tells what its mask must be.
LEVELS = np.array([40, 120, 200], np.uint8)


def recipe(**changes):
    changes = {"augmentation.short_side": [48, 160], "augmentation.photometric": 0, **changes}
    return read_recipe("deeplabv3_finetune", {"model": "deeplabv3/xxs", "size": [96, 96], **changes})


@pytest.fixture
def folder(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((80, 120), np.uint8)
        mask[20:60, 10 + i : 50] = 1
        mask[10:40, 70:110] = 2
        Image.fromarray(LEVELS[mask][..., None].repeat(3, 2)).save(tmp_path / f"set/images/p{i}.png")
        mask[30:34, 80:84] = 255  # has no class, whatever the photo shows
        Image.fromarray(mask).save(tmp_path / f"set/masks/p{i}.png")
    return tmp_path / "set"


def opened(folder, validation=None, **changes):
    task = task_of(recipe(**changes))
    return task, *task.open(folder, validation=validation)


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (160, 96)])
def test_masks_stay_on_their_photos(folder, size):
    _, training, _ = opened(folder, 0, **{"augmentation.vertical_flip": 0.5, "augmentation.short_side": [48, 320]})
    paddings = set()
    for draw in range(40):
        seed_sample(0, draw, draw % 4)
        image, mask = training[draw % 4, size]
        assert image.shape == (3, *size) and image.dtype == torch.float32 and type(image) is torch.Tensor
        assert mask.shape == size and mask.dtype == torch.int64 and type(mask) is torch.Tensor
        grey = image[0] * 255
        shown = (grey[..., None] - torch.from_numpy(LEVELS).float()).abs().argmin(-1)
        valid = mask != 255
        # Only at borders, where bilinear pixels lie between two classes, may the two differ.
        around = mask[None, None].float()
        highest, lowest = (sign * F.max_pool2d(sign * around, 3, 1)[0, 0] for sign in (1, -1))
        inner = F.pad(highest == lowest, (1, 1, 1, 1)) & valid
        assert inner.any() and torch.equal(shown[inner], mask[inner])
        padded = (grey == 0) & ~valid
        paddings.add(padded.sum().item())
        assert torch.equal(grey == 0, padded)  # what is no photo has no class
    assert 0 in paddings and len(paddings) > 5


def test_masks_are_not_off_by_half_a_pixel(tmp_path):
    """A third of the size: of three pixels the middle one is where the photo has its own."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    mask = np.zeros((96, 96), np.uint8)
    mask[1::3, 1::3] = 1
    Image.fromarray(LEVELS[mask][..., None].repeat(3, 2)).save(tmp_path / "images/a.png")
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    _, training, _ = opened(tmp_path, 0, **{"augmentation.short_side": [32, 32], "size": [32, 32]})
    assert (training[0, (32, 32)][1] == 1).all()


def test_short_sides_follow_the_resolution(folder):
    """At another size of the multi-scale sampler objects are as large a part of the crop."""
    shares = []
    for side in (96, 192):
        _, training, _ = opened(folder, 0, **{"augmentation.short_side": [96, 96]})
        seed_sample(0, 0, 0)
        _, mask = training[0, (side, side)]
        shares.append((mask == 1).float().mean().item())
    assert shares[0] == pytest.approx(shares[1], abs=0.03) and shares[0] > 0.05


def test_padding_is_the_mean(folder):
    changes = {"augmentation.short_side": [32, 32], "mean": [0.2, 0.4, 0.6], "std": [0.5, 0.5, 0.5]}
    _, training, _ = opened(folder, 0, **changes)
    image, mask = training[0, (96, 96)]
    padded = image[:, (mask == 255) & (image[0] > -0.01) & (image[0] < 0.01)]
    assert padded.shape[1] > 1000 and padded.abs().max() < 1e-6


def test_validation_is_plain_and_scored_at_the_masks_own_size(folder):
    _, _, validation = opened(folder, 1, mean=[0.5, 0.5, 0.5])
    image, mask = validation[1, (64, 64)]
    assert image.shape == (3, 64, 64) and mask.shape == (80, 120) and validation.names[1] == "p1.png"
    assert torch.equal(mask, torch.from_numpy(np.array(Image.open(folder / "masks/p1.png"))).long())
    assert image[0, 32, 16].item() == pytest.approx(120 / 255 - 0.5, abs=1e-6)
    assert torch.equal(image, validation[1, (64, 64)][0])


def test_a_share_is_held_back(folder):
    task, training, validation = opened(folder)
    assert len(training) == 3 and len(validation) == 1 and training.classes == ("class 0", "class 1", "class 2")
    assert task.remarks == ["held back for validation: 1 of 4 samples"]
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/train.txt").write_text("p0\np2\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("p3\n")
    _, training, validation = opened(folder)
    assert training.names == ["p0.png", "p2.png"] and validation.names == ["p3.png"]


# ------------------------------------------------------------------------------------------------- losses and mIoU


def test_losses_fall_and_a_batch_of_one_works(folder):
    torch.manual_seed(0)
    task, training, _ = opened(folder, 0, **{"augmentation.short_side": [96, 96], "classifier_dropout": 0.0})
    model = task.build(training.classes, None).train()
    assert isinstance(model, MobileViTDeepLabV3) and model.num_classes == 3 and model.mode == "xxs"
    images, masks = task.collate([training[i, (96, 96)] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(5):
        loss = task.losses(model, images, masks)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    task.losses(model, images[:1], masks[:1])["loss"].backward()
    assert all(module.training for module in model.modules())
    nothing = [torch.full_like(mask, 255) for mask in masks]
    assert task.losses(model, images, nothing)["loss"].item() == 0


class Oracle(torch.nn.Module):
    """In place of the network: the class of each pixel of the photos at validation, read off their brightness."""

    def __init__(self, wrong=None):
        super().__init__()
        self.wrong = wrong

    def forward(self, images):
        distances = (images[:, :1] * 255 - torch.from_numpy(LEVELS).float()[None, :, None, None]).abs()
        if self.wrong is not None:  # this class is never seen
            distances[:, self.wrong] = 1000
        return -distances

    def segment(self, logits, size):
        return torch.nn.functional.interpolate(logits, size=size, mode="nearest-exact").argmax(1)


def test_mean_intersection_over_union(folder):
    task, _, validation = opened(folder, 1)
    samples = [validation[i, (80, 120)] for i in range(4)]
    batches = [task.collate(samples[:3]), task.collate(samples[3:])]
    right = task.evaluate(Oracle(), batches, torch.device("cpu"))
    assert right["miou"] == right["pixel_accuracy"] == 1 and right["per_class"] == [1, 1, 1]
    masks = np.stack([np.array(Image.open(folder / f"masks/p{i}.png")) for i in range(4)])
    areas = [(masks == i).sum() for i in range(3)]
    assert right["confusion"] == np.diag(areas).tolist()  # 255 is not counted
    # Class 2, of 200, is taken for class 1, of 120.
    wrong = task.evaluate(Oracle(2), batches, torch.device("cpu"))
    expected = [1, areas[1] / (areas[1] + areas[2]), 0]
    assert wrong["per_class"] == pytest.approx(expected) and wrong["miou"] == pytest.approx(sum(expected) / 3)
    assert wrong["pixel_accuracy"] == pytest.approx((areas[0] + areas[1]) / sum(areas))
    assert wrong["confusion"][2] == [0, areas[2], 0]


def test_classes_that_do_not_occur(folder):
    (folder / "classes.txt").write_text("ground\none\ntwo\nabsent\n")
    task, _, validation = opened(folder, 1)
    found = task.evaluate(Oracle(), [task.collate([validation[0, (80, 120)]])], torch.device("cpu"))
    assert found["miou"] == 1 and found["per_class"] == [1, 1, 1, None]
    assert figures(torch.zeros(2, 2, dtype=torch.int64)) == {
        "miou": 0.0,
        "pixel_accuracy": 0.0,
        "per_class": [None, None],
        "confusion": [[0, 0], [0, 0]],
    }


# --------------------------------------------------------------------------------------------------------- network


def test_from_a_classifier(folder):
    task, training, _ = opened(folder, 0, model=None)
    model = task.build(training.classes, land_use_checkpoint())
    assert model.mode == "xxs" and "the head of DeepLabv3 is new" in task.remarks[-1]
    stem = torch.load(land_use_checkpoint(), map_location="cpu", weights_only=True)["conv_1.block.conv.weight"]
    assert torch.equal(model.backbone.stem.conv.weight, stem)


def test_from_another_segmentation(tmp_path):
    torch.manual_seed(0)
    before = MobileViTDeepLabV3("xxs", num_classes=3)
    path = tmp_path / "before.pth"
    torch.save(before.state_dict(), path)
    x = torch.rand(1, 3, 64, 64)
    task = task_of(recipe(model=None))
    task.labels = ("a", "b", "c")
    turned = task.build(("c", "new", "a", "b"), path).eval()
    with torch.no_grad():
        torch.testing.assert_close(turned(x)[:, [0, 2, 3]], before.eval()(x)[:, [2, 0, 1]])
    assert "3 of 4 classes are predicted as the checkpoint does, new is new" in task.remarks[-1]


def test_recipe_reaches_the_network():
    model = task_of(recipe(classifier_dropout=0.4, output_stride=8)).build(("a", "b"), None)
    assert model.output_stride == 8 and model.dropout.p == 0.4


def test_camvid():
    task, training, validation = opened(data_path("camvid"), 0.25)
    assert len(training) == 6 and len(validation) == 2 and len(training.classes) == 12
    images, masks = task.collate([training[i, (96, 96)] for i in range(2)])
    assert images.shape == (2, 3, 96, 96) and torch.stack(masks).shape == (2, 96, 96)
