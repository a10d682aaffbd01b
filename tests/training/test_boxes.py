# SPDX-License-Identifier: Apache-2.0
"""Boxes of VOC and COCO: what is read, and everything that is refused before a training."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mvit_kernels.training.tasks.boxes import read_boxes, read_class_list
from support.data import data_path


def photo(path, size=(60, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def xml(path, *objects, size=(60, 40), head="", filename="x.jpg"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        f"<object><name>{name}</name><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<difficult>{difficult}</difficult><bndbox><ymax>{bottom}</ymax><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax></bndbox></object>"
        for name, left, top, right, bottom, difficult in (each if len(each) == 6 else (*each, 0) for each in objects)
    )
    width, height = size
    path.write_text(
        f"{head}<annotation><filename>{filename}</filename><size><width>{width}</width><height>{height}</height></size>"
        f"{text}</annotation>"
    )


def coco(path, images, annotations, categories=((3, "cat"), (1, "dog"))):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "images": [{"id": i, "file_name": name, "width": w, "height": h} for i, name, w, h in images],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for i, (image, category, box, crowd) in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    path.write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------------------------- VOC


def test_raccoons():
    folder = data_path("raccoon")
    found = read_boxes(folder)
    assert found.classes == ("raccoon",) and len(found.samples) == 48
    assert [photo.path.stem for photo in found.samples][:4] == [f"raccoon-{i}" for i in (1, 4, 5, 6)]  # as people count
    first = found.samples[0]
    assert first.size == (650, 417) and first.boxes[0].edges == (80, 87, 522, 408)  # 81, 88, 522, 408 in the file
    two = next(photo for photo in found.samples if photo.path.stem == "raccoon-12")
    assert [box.edges for box in two.boxes] == [(27, 20, 126, 181), (84, 32, 235, 193)]
    text = (folder / "raccoon-12.xml").read_text()
    assert [int(value) for value in re.findall(r"<xmin>(\d+)", text)] == [28, 85]


@pytest.mark.parametrize("where", ["", "annotations", "Annotations"])
@pytest.mark.parametrize("images", ["", "images", "JPEGImages"])
def test_voc_folders_and_classes(tmp_path, where, images):
    photo(tmp_path / images / "one.png")
    photo(tmp_path / images / "two.jpg")
    photo(tmp_path / images / "alone.jpg")  # nobody has looked at it: left aside
    xml(tmp_path / where / "one.xml", ("zebra", 1, 1, 60, 40), ("ant", 5, 6, 7, 8, 1))
    xml(tmp_path / where / "two.xml")  # looked at, and nothing is there
    found = read_boxes(tmp_path)
    assert found.classes == ("ant", "zebra")
    assert [sample.path.name for sample in found.samples] == ["one.png", "two.jpg"]
    whole, small = found.samples[0].boxes
    assert whole.edges == (0, 0, 60, 40) and whole.label == 1 and not whole.difficult
    assert small.edges == (4, 5, 7, 8) and small.label == 0 and small.difficult and not small.crowd
    assert found.samples[1].boxes == ()
    (tmp_path / "classes.txt").write_text("zebra\nlion\nant\n")
    found = read_boxes(tmp_path)
    assert found.classes == ("zebra", "lion", "ant") and [box.label for box in found.samples[0].boxes] == [0, 2]


def test_a_photo_by_the_name_in_its_file(tmp_path):
    photo(tmp_path / "IMG 7.jpg")
    xml(tmp_path / "7.xml", ("cat", 1, 1, 20, 20), filename="C:\\photos\\IMG 7.jpg")
    assert read_boxes(tmp_path).samples[0].path == tmp_path / "IMG 7.jpg"


def test_boxes_a_little_outside_are_cut(tmp_path):
    photo(tmp_path / "a.jpg", (400, 100))
    xml(tmp_path / "a.xml", ("cat", 0, -1, 404, 101), size=(400, 100))  # 1 % of 400 is 4
    assert read_boxes(tmp_path).samples[0].boxes[0].edges == (0, 0, 400, 100)


def test_everything_wrong_is_named_at_once(tmp_path):
    for name in ("cut", "text", "far", "flat", "turned", "odd", "nan", "strip"):
        photo(tmp_path / f"{name}.jpg")
        xml(tmp_path / f"{name}.xml", ("cat", 1, 1, 30, 30))
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no photo")
    xml(tmp_path / "far.xml", ("cat", 1, 1, 64, 30))
    xml(tmp_path / "flat.xml", ("cat", 9, 1, 8, 30))
    xml(tmp_path / "turned.xml", ("cat", 1, 1, 30, 30), size=(40, 60))
    xml(tmp_path / "odd.xml", ("unicorn", 1, 1, 30, 30))
    xml(tmp_path / "nan.xml", ("cat", "nan", 1, 30, 30))
    xml(tmp_path / "strip.xml", ("cat", 61.5, 1, 62, 30))
    xml(tmp_path / "nophoto.xml", ("cat", 1, 1, 30, 30))
    (tmp_path / "half.xml").write_text("<annotation><object>")
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError) as raised:
        read_boxes(tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}: 10 things are not as training needs it: ") and "\n" not in text
    for part in (
        "cut.jpg cannot be read as an image",
        "text.jpg is not an image",
        "far.xml: the box of 'cat' at 0, 0, 64, 30 is outside the photo's 60 × 40 pixels",
        "flat.xml: the box of 'cat' at 8, 0, 8, 30 has no area",
        "turned.xml says 40 × 60 pixels, and the upright photo has 60 × 40",
        "odd.xml has 'unicorn', which is not among the classes cat",
        "nan.xml: the box of 'cat' at nan, 0, 30, 30 has no area",
        "strip.xml: the box of 'cat' at 60.5, 0, 62, 30 has no area within",
        "nophoto.xml has no photo nophoto.jpg",
        "half.xml: it is not whole XML",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "body, words",
    [
        ("<object><bndbox/></object>", "an object without a name"),
        ("<object><name>cat</name></object>", "has no bndbox of four numbers"),
        ("<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object>", "has no bndbox of four numbers"),
    ],
)
def test_objects_that_are_none(tmp_path, body, words):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(f"<annotation>{body}</annotation>")
    with pytest.raises(ValueError, match=words):
        read_boxes(tmp_path)


def test_entities_are_never_expanded(tmp_path):
    photo(tmp_path / "a.jpg")
    secret = tmp_path / "secret"
    secret.write_text("cat")
    laughs = "<!DOCTYPE a [<!ENTITY a 'ha'><!ENTITY b '&a;&a;'>]>"
    for head in (laughs, f"<!DOCTYPE a [<!ENTITY b SYSTEM 'file://{secret}'>]>", "<!DOCTYPE annotation>"):
        xml(tmp_path / "a.xml", ("&b;" if "ENTITY" in head else "cat", 1, 1, 20, 20), head=head)
        with pytest.raises(ValueError, match="declares a document type"):
            read_boxes(tmp_path)


def test_upright_photos(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", (40, 60), exif=exif)
    photo(tmp_path / "b.png", (40, 60), exif=exif)
    for name in "ab":
        xml(tmp_path / f"{name}.xml", ("cat", 1, 1, 60, 40))  # as everybody sees it: 60 × 40
    assert [sample.size for sample in read_boxes(tmp_path).samples] == [(60, 40)] * 2


# ------------------------------------------------------------------------------------------------------------ COCO


@pytest.mark.parametrize(
    "file, images",
    [
        ("annotations.json", ""),
        ("_annotations.coco.json", ""),
        ("instances.json", "images"),
        ("annotations/instances_all.json", "images"),
    ],
)
def test_coco(tmp_path, file, images):
    photo(tmp_path / images / "a.jpg")
    photo(tmp_path / images / "sub/b.jpg")
    coco(
        tmp_path / file,
        [(7, "a.jpg", 60, 40), (9, "sub/b.jpg", 60, 40)],
        [(7, 3, [1.5, 2, 10, 20], 0), (7, 1, [0, 0, 60, 40], 1)],
    )
    found = read_boxes(tmp_path)
    assert found.classes == ("dog", "cat")  # by the numbers of the categories
    cat, dogs = found.samples[0].boxes
    assert cat == ((1.5, 2, 11.5, 22), 1, False, False) and dogs == ((0, 0, 60, 40), 0, True, False)
    assert found.samples[1].path == tmp_path / images / "sub/b.jpg" and found.samples[1].boxes == ()


def test_coco_file_elsewhere(tmp_path):
    photo(tmp_path / "photos/a.jpg")
    coco(tmp_path / "elsewhere/boxes.json", [(1, "a.jpg", 60, 40)], [(1, 1, [0, 0, 5, 5], 0)])
    found = read_boxes(tmp_path / "photos", annotations=tmp_path / "elsewhere/boxes.json")
    assert len(found.samples) == 1
    with pytest.raises(FileNotFoundError, match="no file of boxes"):
        read_boxes(tmp_path / "photos", annotations=tmp_path / "other.json")


def test_coco_names_all_that_is_wrong(tmp_path):
    photo(tmp_path / "a.jpg")
    coco(
        tmp_path / "annotations.json",
        [(1, "a.jpg", 60, 40), (2, "missing.jpg", 60, 40), (1, "a.jpg", 60, 40)],
        [(1, 8, [0, 0, 5, 5], 0), (5, 1, [0, 0, 5, 5], 0), (1, 1, [0, 0, -5, 5], 0), (1, 1, [0, 0, 5], 0)],
    )
    with pytest.raises(ValueError) as raised:
        read_boxes(tmp_path)
    for part in (
        "there is no photo missing.jpg",
        "have the same id, 1",
        "annotation 0 is of category 8, which is not listed",
        "annotation 1 is of image 5, which is not listed",
        "annotation 3 has no bbox of four numbers",
    ):
        assert part in str(raised.value), part


def test_coco_boxes_without_area(tmp_path, caplog):
    """COCO's own has some of width 0: these are left aside, with a warning. A negative width is an error."""
    photo(tmp_path / "a.jpg")
    boxes = [(1, 1, [0, 0, 5, 5], 0), (1, 1, [3, 3, 0, 5], 0)]
    coco(tmp_path / "annotations.json", [(1, "a.jpg", 60, 40)], boxes)
    assert len(read_boxes(tmp_path).samples[0].boxes) == 1 and "annotation 1" in caplog.text
    coco(tmp_path / "annotations.json", [(1, "a.jpg", 60, 40)], [*boxes, (1, 1, [9, 3, -2, 5], 0)])
    with pytest.raises(ValueError, match="'dog' at 9, 3, 7, 8 has no area"):
        read_boxes(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "an entry of images has no file_name"),
        ('{"images": [3], "annotations": [], "categories": []}', "an entry of images has no id"),
        ('{"images": [], "annotations": [], "categories": []}', "has no photo with annotations"),
    ],
)
def test_coco_files_that_are_none(tmp_path, text, words):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_boxes(tmp_path)


# ---------------------------------------------------------------------------------------------------------- folders


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_boxes(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither VOC XML files .* nor a COCO file"):
        read_boxes(tmp_path)
    photo(tmp_path / "a.jpg")
    xml(tmp_path / "a.xml")
    with pytest.raises(ValueError, match="1 photos and no box on any"):
        read_boxes(tmp_path)
    xml(tmp_path / "a.xml", ("cat", 1, 1, 5, 5))
    photo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.jpg and a.png, which differ in their endings alone"):
        read_boxes(tmp_path)
    for name in ("annotations.json", "instances_x.json"):
        coco(tmp_path / name, [], [])
    with pytest.raises(ValueError, match="several files of boxes: annotations.json, instances_x.json"):
        read_boxes(tmp_path)


def test_class_lists(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("﻿cat\r\n\r\n Dog \n".encode())
    assert read_class_list(path) == ("cat", "Dog")
    path.write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="names cat more than once"):
        read_class_list(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="names no class"):
        read_class_list(path)
