# SPDX-License-Identifier: Apache-2.0
"""Data sets that take (index, (height, width)): torchvision's, timm's, and their transforms, on real photos."""

import functools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from mvit_kernels import MultiScaleSampler, prepare_torchvision
from mvit_kernels.training.sized import DraftLoader, SizedDataset, split_pair, timm_transforms
from support.data import data_path

prepare_torchvision()
import torchvision  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402


def v2_transforms(size):
    return v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.ToDtype(torch.float32, scale=True)])


class Squares(Dataset):
    """Noise of 50 × 70 px, with the index as target."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


def test_an_image_folder_at_every_size_of_the_sampler():
    folder = ImageFolder(data_path("land_use", "train"))
    photos = SizedDataset(folder, v2_transforms)
    assert len(photos) == len(folder) == 384 and photos.classes == folder.classes and photos.targets == folder.targets
    sampler = MultiScaleSampler(photos, 8)
    seen = set()
    loader = DataLoader(photos, batch_sampler=sampler, num_workers=2)
    for done, (images, targets) in zip(range(12), loader, strict=False):
        height, width, batch = sampler._steps[done]
        assert images.shape == (batch, 3, height, width) and images.dtype == torch.float32
        assert 0 <= images.min() and images.max() <= 1 and len(targets) == batch
        seen.add(height)
    assert len(seen) > 2


def test_the_image_is_the_right_one_at_the_right_size():
    photos = SizedDataset(Squares(), v2_transforms)
    image, target = photos[7, (96, 64)]
    wanted = v2.functional.resize(v2.functional.to_image(Squares()[7][0]), [96, 64], antialias=True)
    assert target == 7 and torch.equal(image, v2.functional.to_dtype(wanted, torch.float32, scale=True))


def test_a_transform_is_made_once_a_size():
    made = []

    def factory(size):
        made.append(size)
        return v2_transforms(size)

    photos = SizedDataset(Squares(), factory)
    for index in range(3):
        photos[index, (32, 64)], photos[index, (64, 32)]
    assert made == [(32, 64), (64, 32)]


def test_a_part_of_a_data_set():
    photos = SizedDataset(Subset(Squares(), [5, 9, 11]), v2_transforms)
    sampler = MultiScaleSampler(photos, 2, size=32, training=False)
    targets = [target.tolist() for _, target in DataLoader(photos, batch_sampler=sampler)]
    assert targets == [[5, 9], [11]]


def test_it_goes_to_spawned_workers():
    """Which get it pickled, with the transforms made so far."""
    photos = SizedDataset([Squares()[index] for index in range(4)], timm_transforms(is_training=True))
    photos[0, (32, 32)]
    other = pickle.loads(pickle.dumps(photos))
    assert other[1, (64, 96)][0].shape == (3, 64, 96) and len(other) == 4


# --- timm


def test_timms_data_set_and_transforms():
    timm_data = pytest.importorskip("timm.data")
    data = timm_data.create_dataset("", root=str(data_path("land_use", "train")), split="train")
    options = dict(is_training=True, color_jitter=None, mean=(0, 0, 0), std=(1, 1, 1), re_prob=0.5)
    photos = SizedDataset(data, timm_transforms(**options))
    image, target = photos[100, (160, 224)]
    assert image.shape == (3, 160, 224) and target == data[100][1]
    torch.manual_seed(3)
    import random

    random.seed(3)
    image = photos[7, (192, 192)][0]
    torch.manual_seed(3)
    random.seed(3)
    assert torch.equal(image, timm_data.create_transform(input_size=(3, 192, 192), **options)(data[7][0]))


def test_timms_fast_collate_and_prefetcher():
    """uint8 up to the device, normalised there: timm's own loader, behind the sampler."""
    pytest.importorskip("timm")
    from timm.data.loader import PrefetchLoader, fast_collate

    photos = SizedDataset(Squares(), timm_transforms(is_training=True, use_prefetcher=True))
    sampler = MultiScaleSampler(photos, 4)
    loader = DataLoader(photos, batch_sampler=sampler, collate_fn=fast_collate)
    sizes = []
    for images, targets in PrefetchLoader(loader, device=torch.device("cpu")):
        assert images.dtype == torch.float32 and -3 < images.min() < -1 and targets.dtype == torch.int64
        sizes.append((*images.shape[2:], len(images)))
    assert sizes == [tuple(step) for step in sampler._steps]


# --- large photos


def test_a_large_jpeg_is_decoded_no_larger_than_its_crops_need(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((2400, 1800), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "photo.jpg", quality=95)
    smooth.save(tmp_path / "photo.png", compress_level=1)
    opened = {
        (name, *options): DraftLoader(*options)(str(tmp_path / f"photo.{name}"))
        for name, *options in (("jpg", 240), ("jpg", 200), ("jpg", 320, 1.0), ("png", 320, 1.0))
    }
    assert {key: image.size for key, image in opened.items()} == {
        ("jpg", 240): (2400, 1800),  # the smallest crop, 8 % of the area at 3 : 4, has a side of 441 px: a half is 220
        ("jpg", 200): (1200, 900),
        ("jpg", 320, 1.0): (600, 450),
        ("png", 320, 1.0): (2400, 1800),
    }
    wanted = np.asarray(smooth.resize((600, 450), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(opened["jpg", 320, 1.0], dtype=float) - wanted).mean() < 2  # the same photo
    assert all(image.mode == "RGB" for image in opened.values())


def test_small_photos_are_what_torchvision_opens():
    folder = data_path("land_use", "train")
    plain, draft = ImageFolder(folder), ImageFolder(folder, loader=DraftLoader(320))
    assert all(plain[index][0].tobytes() == draft[index][0].tobytes() for index in range(0, 384, 40))


# --- images and boxes together


def test_boxes_and_masks_go_with_their_image():
    def sample(index):
        image = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))
        boxes = tv_tensors.BoundingBoxes(torch.tensor([[8.0, 4, 40, 20]]), format="XYXY", canvas_size=(40, 80))
        return image, {"boxes": boxes, "masks": tv_tensors.Mask(torch.ones(1, 40, 80)), "labels": torch.tensor([index])}

    photos = SizedDataset([sample(1), sample(2)], lambda size: v2.Resize(size, antialias=True), joint=True)
    image, target = photos[1, (80, 40)]
    assert image.shape == (3, 80, 40) and target["masks"].shape == (1, 80, 40)
    assert target["boxes"].tolist() == [[4.0, 8.0, 20.0, 40.0]] and target["labels"].tolist() == [2]


# --- errors


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_an_index_without_a_size_is_explained():
    photos = SizedDataset(Squares(), v2_transforms)
    for index in (3, (3, 256), (3, (256,)), (3, (256.0, 256.0)), ((1, 2), (256, 256)), slice(3)):
        with pytest.raises(TypeError, match=r"it takes \(index, \(height, width\)\)\. Load it by DataLoader\("):
            photos[index]
    with pytest.raises(TypeError, match="SizedDataset: the index is 0"):
        next(iter(DataLoader(photos, batch_size=4)))
    with pytest.raises(TypeError, match="Scenes: the index is 3"):
        split_pair(3, "Scenes")
    assert split_pair((3, [192, 256]), "Scenes") == (3, (192, 256))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: SizedDataset(Stream(), v2_transforms), TypeError, "data is Stream, which cannot be indexed"),
        (lambda: SizedDataset(iter([1]), v2_transforms), TypeError, "give a map-style data set"),
        (lambda: SizedDataset(Squares(), 256), TypeError, "transforms is int; give a function that takes"),
        (
            lambda: SizedDataset(SizedDataset(Squares(), v2_transforms), v2_transforms),
            TypeError,
            "data is a SizedDataset already",
        ),
        (
            lambda: SizedDataset(torchvision.datasets.FakeData(3, transform=v2.ToImage()), v2_transforms),
            ValueError,
            "data has a transform of its own (ToImage() (ToImage)), which would run before the size is known",
        ),
        (lambda: timm_transforms(input_size=224), TypeError, "input_size comes with each batch, from the sampler"),
        (
            lambda: (
                SizedDataset(Squares(), v2_transforms)[0, (64, 32)] and SizedDataset([5], v2_transforms)[0, (64, 32)]
            ),
            TypeError,
            "data[0] is 5 (int); (image, target) is wanted",
        ),
        (lambda: SizedDataset(Squares(), lambda size: None)[0, (64, 32)], TypeError, "which is no transform;"),
        (
            lambda: SizedDataset(Squares(), lambda size: v2_transforms((224, 224)))[0, (64, 32)],
            ValueError,
            "the transform for 64 × 32 (height × width) returned an image of shape (3, 224, 224)",
        ),
        (
            lambda: SizedDataset(Squares(), functools.partial(v2.Resize, antialias=True)).nothing,
            AttributeError,
            "nothing",
        ),
    ],
)
def test_errors_say_what_is_wanted(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    import importlib.util
    import sys

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"timm is not installed: pip install 'mvit_kernels\[timm\]'"):
        timm_transforms()
