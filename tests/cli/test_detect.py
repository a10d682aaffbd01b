# SPDX-License-Identifier: Apache-2.0
"""`mvit-kernels detect`, and what it shares with `segment`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mvit_kernels.cli.pictures import colour, draw_boxes
from mvit_kernels.nn import MobileViT, MobileViTSSDLite
from mvit_kernels.training.recipe import as_dict, read_recipe
from mvit_kernels.training.saving import save
from support.data import data_path

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def network():
    """Random weights, whose scores of four classes differ enough to have boxes."""
    torch.manual_seed(0)
    model = MobileViTSSDLite("xxs", num_classes=4).eval()
    with torch.no_grad():
        for head in model.heads:
            head.layers.predict.weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def plain(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(network, tmp_path_factory):
    """As `mvit-kernels train` writes it: with names, size, mean and deviation."""
    path = tmp_path_factory.mktemp("trained") / "best.pth"
    recipe = read_recipe("ssdlite_finetune", {"size": [96, 128], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    contents = {"task": "detection", "classes": ["ant", "bee", "cat"], "recipe": as_dict(recipe)}
    save(path, {**contents, "state_dict": network.state_dict()})
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("one.jpg", (200, 150)), ("two.png", (90, 160)), ("three.bmp", (64, 64))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return [folder / name for name in ("one.jpg", "two.png", "three.bmp")]


def expected(network, path, size, mean=0.0, std=1.0, score=0.3):
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).copy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    with torch.no_grad():
        found = network.detect(network(x), size, score=score)[0]
    scale = torch.tensor([image.width / size[1], image.height / size[0]] * 2)
    return found["boxes"] * scale, found["scores"], found["labels"]


@pytest.mark.parametrize("arguments", [[], ["--no-freeze"]], ids=["frozen", "accelerated"])
def test_boxes_in_pixels_of_the_photos(run, network, trained, photos, tmp_path, arguments):
    out = tmp_path / "made" / "here"
    result = run("detect", *photos, "--checkpoint", trained, "--out", out, "--json", "--score", "0.4", *arguments)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert json.loads((out / "detections.json").read_text()) == found and len(found) == 3
    for path, each, name in zip(photos, found, ("one.jpg", "two.png", "three.png"), strict=True):
        assert each["image"] == str(path) and each["picture"] == str(out / name)
        image = Image.open(path)
        assert (each["width"], each["height"]) == image.size == Image.open(out / name).size
        boxes, scores, labels = expected(network, path, (96, 128), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), score=0.4)
        assert len(each["objects"]) == len(scores) > 3
        assert [o["label"] for o in each["objects"]] == labels.tolist()
        assert [o["name"] for o in each["objects"]] == [("ant", "bee", "cat")[label - 1] for label in labels]
        torch.testing.assert_close(torch.tensor([o["box"] for o in each["objects"]]), boxes, rtol=0, atol=0.05)
        assert [o["score"] for o in each["objects"]] == pytest.approx(scores.tolist(), abs=1e-3)
        assert (np.asarray(Image.open(out / name).convert("RGB")) != np.asarray(image.convert("RGB"))).any()


def test_scores_sizes_and_names(run, network, plain, photos, tmp_path):
    (tmp_path / "names.txt").write_text("background\nant\nbee\ncat\n")
    command = ["detect", photos[0], "--checkpoint", plain, "--size", "64x96", "--out", tmp_path / "out"]
    found = json.loads(run(*command, "--labels", tmp_path / "names.txt", "--score", "0.5", "--json").out)
    boxes, scores, labels = expected(network, photos[0], (64, 96), score=0.5)
    assert [o["score"] for o in found[0]["objects"]] == pytest.approx(scores.tolist(), abs=1e-3)
    assert {o["name"] for o in found[0]["objects"]} <= {"ant", "bee", "cat"}
    text = run(*command, "--score", "0.5").out.splitlines()
    assert text[0] == f"{photos[0]} -> {tmp_path / 'out' / 'one.jpg'}" and len(text) == 1 + len(scores)
    assert f"class {labels[0]}" in text[1]
    best = json.loads(run(*command, "--score", "0.5", "--most", "2", "--json").out)[0]["objects"]
    assert best == json.loads(run(*command, "--score", "0.5", "--json").out)[0]["objects"][:2]
    nothing = run(*command, "--score", "1")
    assert nothing.code == 0 and "nothing" in nothing.out
    overlapping = json.loads(run(*command, "--iou", "1", "--json").out)[0]["objects"]
    assert len(overlapping) > len(json.loads(run(*command, "--iou", "0.2", "--json").out)[0]["objects"])


def test_a_broken_photo_does_not_end_the_rest(run, trained, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:300])
    command = ["detect", broken, photos[0], tmp_path / "absent.jpg", "--checkpoint", trained, "--out", tmp_path / "o"]
    result = run(*command, "--json")
    assert result.code == 1 and [each["image"] for each in json.loads(result.out)] == [str(photos[0])]
    lines = result.err.splitlines()
    assert len(lines) == 2 and str(broken) in lines[0] and "absent.jpg" in lines[1]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["detections.json", "one.jpg"]
    result = run("detect", broken, tmp_path, *command[4:])
    assert (result.code, result.out) == (2, "")
    assert len(lines := result.err.splitlines()) == 3 and "none of the 2 photos" in lines[2] and "folder" in lines[1]


def test_names_of_pictures(run, trained, photos, tmp_path):
    twin = tmp_path / "twin" / "One.png"
    twin.parent.mkdir()
    Image.open(photos[0]).save(twin)
    out = tmp_path / "o"
    found = json.loads(run("detect", photos[0], twin, "--checkpoint", trained, "--out", out, "--json").out)
    assert [each["picture"] for each in found] == [str(out / "one.jpg"), str(out / "One-2.png")]


def test_what_is_refused(refused, trained, plain, photos, tmp_path):
    before = photos[0].read_bytes()
    command = ["detect", photos[0], "--checkpoint", trained]
    assert "would overwrite" in refused(*command, "--out", photos[0].parent) and photos[0].read_bytes() == before
    assert "is a file; name a folder" in refused(*command, "--out", photos[0])
    assert "no weights were given" in refused("detect", photos[0], "--out", tmp_path / "o")
    assert "no weights of a detector are published" in refused("detect", photos[0], "--pretrained")
    assert "is not a number from 0 to 1" in refused(*command, "--score", "30")
    assert "--std is 1,0,1" in refused(*command, "--std", "1,0,1", "--out", tmp_path / "o")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    text = refused(*command, "--labels", tmp_path / "names.txt", "--out", tmp_path / "o")
    assert "has 2 labels, and the model 3 classes beside the background" in text
    headless = tmp_path / "classifier.pth"
    torch.save(MobileViT("xxs", num_classes=5).state_dict(), headless)
    text = refused("detect", photos[0], "--checkpoint", headless, "--out", tmp_path / "o")
    assert "is a MobileViT, and no network for detection" in text
    assert "mvit-kernels detect" in refused("segment", photos[0], "--checkpoint", trained, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()  # nothing half done


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_have_lines_where_the_boxes_are():
    image = Image.new("RGB", (200, 120), (128, 128, 128))
    boxes = [(20, 40, 100, 100), (120.4, 0, 200, 120)]
    picture = np.asarray(draw_boxes(image, boxes, [0, 3], ["raccoon 97%", "fox 31%"]))
    for box, label in zip(boxes, (0, 3), strict=True):
        left, top, right, bottom = (round(edge) for edge in box)
        assert (picture[(top + bottom) // 2, left] == colour(label)).all()
        assert (picture[(top + bottom) // 2, min(right, 200) - 1] == colour(label)).all()
        assert (picture[bottom - 1, (left + right) // 2] == colour(label)).all()
        assert (picture[(top + bottom) // 2, (left + right) // 2] == 128).all()
    tag = (picture[20:40, 20:100] == colour(0)).all(-1)
    assert tag.sum() > 300 and (picture[20:40, 20:100] == 255).all(-1).any()  # white letters on red
    assert np.asarray(image).min() == np.asarray(image).max() == 128  # a copy


def test_tags_stay_in_the_picture_and_apart():
    image = Image.new("RGB", (160, 160), (128, 128, 128))
    boxes = [(0, 0, 160, 160), (0, 0, 158, 158), (100, 150, 160, 160), (-5, -5, 170, 170)]
    picture = np.asarray(draw_boxes(image, boxes, [0, 1, 2, 3], ["a 90%", "b 80%", "cat 70%", "d 60%"]))
    for label in range(4):
        assert (picture == colour(label)).all(-1).sum() > 250, label  # each tag is seen


def test_colours_differ():
    assert len({colour(index) for index in range(91)}) == 91
    assert all(0 <= channel <= 255 for index in range(300) for channel in colour(index))


def test_raccoons(run, trained, tmp_path):
    photo = data_path("raccoon", "raccoon-12.jpg")
    result = run("detect", photo, "--checkpoint", trained, "--out", tmp_path / "o")
    assert result.code == 0 and Image.open(tmp_path / "o/raccoon-12.jpg").size == (259, 194)
