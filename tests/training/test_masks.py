# SPDX-License-Identifier: Apache-2.0
"""Photos with index masks: what is read, and everything that is refused before a training."""

import numpy as np
import pytest
from PIL import Image

from mvit_kernels.training.tasks.masks import read_mask, read_masks
from support.data import data_path


def photo(path, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mask(path, values, size=(24, 16), palette=False):
    """A mask with a column of each of `values`, and the first one in the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.full(size[::-1], values[0], np.uint8)
    data[:, : len(values)] = values
    image = Image.fromarray(data)
    if palette:
        image.putpalette([channel for i in range(256) for channel in (255 - i, i, 3 * i % 256)])
    image.save(path)
    return data


def test_camvid():
    found = read_masks(data_path("camvid"))
    assert found.classes == tuple(f"class {number}" for number in range(12)) and len(found.samples) == 8
    for image, at in found.samples:
        assert image.stem == at.stem and image.parent.name == "images" and at.parent.name == "masks"


@pytest.mark.parametrize("images, masks", [("images", "masks"), ("JPEGImages", "SegmentationClass")])
def test_folders_names_and_palettes(tmp_path, images, masks):
    photo(tmp_path / images / "a.jpg")
    photo(tmp_path / images / "b.png")
    values = mask(tmp_path / masks / "a.png", [0, 3, 255], palette=True)
    assert Image.open(tmp_path / masks / "a.png").mode == "P"
    assert np.array_equal(read_mask(tmp_path / masks / "a.png"), values)
    mask(tmp_path / masks / "b.png", [1])
    found = read_masks(tmp_path)
    assert [(pair.image.name, pair.mask.name) for pair in found.samples] == [("a.jpg", "a.png"), ("b.png", "b.png")]
    voc = masks == "SegmentationClass"
    assert len(found.classes) == (21 if voc else 4) and found.classes[3] == ("bird" if voc else "class 3")
    (tmp_path / "classes.txt").write_text("ground\nroad\ncar\nman\ntree\n")
    assert read_masks(tmp_path).classes == ("ground", "road", "car", "man", "tree")
    assert [pair.mask.name for pair in read_masks(tmp_path, stems=["b"]).samples] == ["b.png"]


def test_most_of_vocs_photos_have_no_mask(tmp_path):
    for name in "abc":
        photo(tmp_path / f"JPEGImages/{name}.jpg")
    mask(tmp_path / "SegmentationClass/b.png", [0, 20])
    assert [pair.image.name for pair in read_masks(tmp_path).samples] == ["b.jpg"]


def test_everything_wrong_is_named_at_once(tmp_path):
    for name in ("alone", "small", "high", "colour", "cut", "text", "fine"):
        photo(tmp_path / f"images/{name}.png")
        mask(tmp_path / f"masks/{name}.png", [0, 1, 255])
    (tmp_path / "masks/alone.png").unlink()
    mask(tmp_path / "masks/widow.png", [0])
    mask(tmp_path / "masks/small.png", [0], (23, 16))
    mask(tmp_path / "masks/high.png", [0, 2, 17])
    photo(tmp_path / "masks/colour.png")
    whole = (tmp_path / "images/cut.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "masks/text.png").write_text("no mask")
    (tmp_path / "classes.txt").write_text("ground\nroad\n")
    with pytest.raises(ValueError) as raised:
        read_masks(tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}: 7 things are not as training needs it: ") and "\n" not in text
    for part in (
        "images/alone.png has no mask",
        "masks/widow.png has no photo",
        "small.png has 23 × 16 pixels, and its photo small.png 24 × 16",
        "high.png has the values 2, 17, and there are 2 classes, 0 to 1 (255 is no class)",
        "colour.png is in colour (mode RGB)",
        "cut.png cannot be read as an image",
        "text.png cannot be read as a mask: it is no image",
    ):
        assert part in text, part
    assert "fine" not in text


def test_sixteen_bits(tmp_path):
    photo(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    data = np.zeros((16, 24), np.uint16)
    data[0] = 300
    Image.fromarray(data).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match="values up to 300; numbers of classes up to 254 are wanted"):
        read_masks(tmp_path)
    data[0] = 7
    Image.fromarray(data).save(tmp_path / "masks/a.png")
    assert len(read_masks(tmp_path).classes) == 8
    assert np.array_equal(read_mask(tmp_path / "masks/a.png"), data)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_masks(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no folder images"):
        read_masks(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="has no folder masks"):
        read_masks(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match="has no photo with a mask"):
        read_masks(tmp_path)
    photo(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a.png", [255])
    with pytest.raises(ValueError, match="no pixel of the 1 masks is of any class"):
        read_masks(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(256))))
    mask(tmp_path / "masks/a.png", [0])
    with pytest.raises(ValueError, match="has 256 classes; masks have numbers up to 254"):
        read_masks(tmp_path)
