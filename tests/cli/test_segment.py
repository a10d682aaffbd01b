# SPDX-License-Identifier: Apache-2.0
"""`mvit-kernels segment`: masks, legends and shares."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mvit_kernels import convert_state_dict
from mvit_kernels.cli.pictures import class_shares, colour, draw_mask, index_image
from mvit_kernels.nn import MobileViT, MobileViTDeepLabV3
from mvit_kernels.training.recipe import as_dict, read_recipe
from mvit_kernels.training.saving import save
from support.data import data_path

NAMES = ("ground", "road", "car", "tree", "sky")


@pytest.fixture(scope="module")
def network():
    """Random weights, whose classes differ from place to place."""
    torch.manual_seed(0)
    model = MobileViTDeepLabV3("xxs", num_classes=5).eval()
    with torch.no_grad():
        x = torch.rand(2, 3, 96, 128)
        logits = model(x)
        model.classifier.weight /= logits.std((0, 2, 3))[:, None, None, None]
        model.classifier.bias -= (logits.mean((0, 2, 3)) - model.classifier.bias) / logits.std((0, 2, 3))
    return model


@pytest.fixture(scope="module")
def trained(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "best.pth"
    recipe = read_recipe("deeplabv3_finetune", {"size": [96, 128]})
    contents = {"task": "segmentation", "classes": list(NAMES), "recipe": as_dict(recipe)}
    save(path, {**contents, "state_dict": network.state_dict()})
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((180, 130), Image.Resampling.BICUBIC).save(path)
    return path


def expected(network, path, size, flip=False):
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).copy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = network(x.flip(1) if flip else x)
    logits = F.interpolate(logits, size=image.size[::-1], mode="bilinear", align_corners=False)
    return logits.argmax(1)[0].numpy()


@pytest.mark.parametrize("arguments", [[], ["--no-freeze"]], ids=["frozen", "accelerated"])
def test_masks_at_the_photos_size(run, network, trained, photo, tmp_path, arguments):
    out = tmp_path / "out"
    result = run("segment", photo, "--checkpoint", trained, "--out", out, "--masks", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    (found,) = json.loads(result.out)
    assert json.loads((out / "segments.json").read_text()) == [found]
    assert (found["image"], found["picture"]) == (str(photo), str(out / "photo.png"))
    image = Image.open(found["mask"])
    mask = np.asarray(image)
    wanted = expected(network, photo, (96, 128))
    assert image.mode == "P" and mask.shape == wanted.shape == (130, 180) and len(np.unique(wanted)) >= 3
    assert (mask == wanted).mean() > 0.999  # ties at borders aside
    assert tuple(image.getpalette()[3:6]) == colour(1)
    shares = {each["name"]: each["share"] for each in found["classes"]}
    assert list(shares.values()) == sorted(shares.values(), reverse=True) and sum(shares.values()) == pytest.approx(1)
    for index, name in enumerate(NAMES):
        assert shares.get(name, 0) == pytest.approx((mask == index).mean(), abs=1e-5)
    picture = Image.open(found["picture"])
    assert picture.height == 130 and picture.width > 180 + 60  # and a legend


def test_text_without_names(run, network, photo, tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(network.state_dict(), path)
    result = run("segment", photo, "--checkpoint", path, "--size", "64", "--out", tmp_path / "o")
    first, *lines = result.out.splitlines()
    assert result.code == 0 and first == f"{photo} -> {tmp_path / 'o' / 'photo.png'}"
    present = np.unique(expected(network, photo, (64, 64)))
    assert sorted(line.split("%")[1].strip() for line in lines) == [f"class {number}" for number in present]
    assert not list((tmp_path / "o").glob("*_mask.png"))


def test_the_output_stride_of_the_training(run, network, photo, tmp_path):
    """The weights fit any; with another than they were trained for the masks are worse."""
    finer = MobileViTDeepLabV3("xxs", num_classes=5, output_stride=8).eval()
    finer.load_state_dict(network.state_dict())
    recipe = read_recipe("deeplabv3_finetune", {"size": [96, 128], "output_stride": 8})
    contents = {"task": "segmentation", "classes": list(NAMES), "recipe": as_dict(recipe)}
    save(tmp_path / "best.pth", {**contents, "state_dict": network.state_dict()})
    command = ["segment", photo, "--checkpoint", tmp_path / "best.pth", "--masks", "--out", tmp_path / "o"]
    assert run(*command).code == 0
    mask = np.asarray(Image.open(tmp_path / "o/photo_mask.png"))
    assert (mask == expected(finer, photo, (96, 128))).mean() > 0.999
    assert (mask == expected(network, photo, (96, 128))).mean() < 0.99
    text = run(*command, "--model", "s").err
    assert "mobilevit-xxs" in text.lower() and "mobilevit-s" in text.lower()


def test_hugging_faces_checkpoint(run, network, photo, tmp_path):
    """Its keys, channels in the order B, G, R, and the names of its config.json."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    state = convert_state_dict(network.state_dict(), "huggingface")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {str(i): name for i, name in enumerate(NAMES)}}))
    command = ["segment", photo, "--checkpoint", tmp_path / "model.safetensors", "--labels", tmp_path / "config.json"]
    command += ["--size", "96x128", "--masks", "--out", tmp_path / "o", "--json"]
    for flip in (False, True):
        result = run(*command, *(["--bgr"] if flip else []))
        assert result.code == 0
        mask = np.asarray(Image.open(tmp_path / "o/photo_mask.png"))
        assert (mask == expected(network, photo, (96, 128), flip)).mean() > 0.999
        assert {each["name"] for each in json.loads(result.out)[0]["classes"]} <= set(NAMES)


def test_hugging_faces_own_model(run, network, photo, tmp_path):
    """By the name of a folder as the hub has them: its own network, names and order of channels."""
    transformers = pytest.importorskip("transformers")
    from mvit_kernels.zoo.builders import _huggingface_widths

    config = transformers.MobileViTConfig(
        **_huggingface_widths("xxs"), id2label=dict(enumerate(NAMES)), output_stride=16
    )
    model = transformers.MobileViTForSemanticSegmentation(config)
    model.load_state_dict(convert_state_dict(network.state_dict(), "huggingface"))
    model.save_pretrained(tmp_path / "hub")
    command = ["segment", photo, "--model", tmp_path / "hub", "--pretrained", "--size", "96x128", "--masks"]
    result = run(*command, "--out", tmp_path / "o", "--json")
    assert result.code == 0, result.err
    mask = np.asarray(Image.open(tmp_path / "o/photo_mask.png"))
    assert (mask == expected(network, photo, (96, 128), flip=True)).mean() > 0.999
    assert {each["name"] for each in json.loads(result.out)[0]["classes"]} <= set(NAMES)


def test_what_is_refused(refused, run, trained, photo, tmp_path):
    command = ["segment", photo, "--checkpoint", trained]
    assert "would overwrite" in refused(*command, "--out", photo.parent)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    text = refused(*command, "--labels", tmp_path / "names.txt", "--out", tmp_path / "o")
    assert "has 4 labels, and the model 5 classes" in text and "is the background missing?" in text
    for count in (5, 0):
        path = tmp_path / f"classifier{count}.pth"
        torch.save(MobileViT("xxs", num_classes=count).state_dict(), path)
        text = refused("segment", photo, "--checkpoint", path, "--out", tmp_path / "o")
        assert "is a MobileViT, and no network for segmentation" in text
    assert not (tmp_path / "o").exists()
    mask = tmp_path / "photos/photo_mask.png"
    mask.parent.mkdir()
    Image.open(photo).save(mask)
    assert "would overwrite" in refused("segment", photo, mask, *command[2:], "--masks", "--out", mask.parent)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_overlay_and_legend():
    image = Image.new("RGB", (300, 200), (128, 128, 128))
    mask = np.zeros((200, 300), np.int64)
    mask[:, 100:] = 2
    picture = draw_mask(image, mask, ("sky", "sea", "land"), opacity=0.5)
    pixels = np.asarray(picture)
    for x, index in ((50, 0), (200, 2)):
        assert np.abs(pixels[100, x].astype(int) - (np.array(colour(index)) + 128) / 2).max() <= 1
    assert (pixels[:, 99] == 255).all() and not (pixels[:, 98] == 255).all()  # the border, one pixel wide
    legend = pixels[:, 300:]
    counts = [(legend == colour(index)).all(-1).sum() for index in range(3)]
    assert min(counts[0], counts[2]) > 80 and counts[1] == 0  # of what is there
    rows = [np.where((legend == colour(index)).all(-1))[0].mean() for index in (2, 0)]
    assert rows[0] < rows[1]  # the largest share first
    assert class_shares(mask, 3) == pytest.approx([1 / 3, 0, 2 / 3])


def test_legends_of_many_classes_and_small_photos():
    mask = np.arange(150)[None].repeat(40, 0)
    picture = draw_mask(Image.new("RGB", (150, 40)), mask, [f"name {i}" for i in range(150)])
    assert picture.height == 40 and picture.width > 200  # a line or two, the last "and … more"
    tiny = draw_mask(Image.new("RGB", (8, 6)), np.zeros((6, 8), np.int64), ["ground"])
    assert tiny.height >= 20


def test_index_images():
    mask = np.array([[0, 1], [2, 255]])
    image = index_image(mask, 256)
    assert np.array_equal(np.asarray(image), mask)
    assert np.asarray(image.convert("RGB"))[1, 0].tolist() == list(colour(2))


def test_camvid(run, trained, tmp_path):
    photo = data_path("camvid", "images", "0016E5_07959.png")
    assert run("segment", photo, "--checkpoint", trained, "--out", tmp_path / "o").code == 0
    assert Image.open(tmp_path / "o/0016E5_07959.png").height == 360
