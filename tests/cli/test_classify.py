# SPDX-License-Identifier: Apache-2.0
"""`mvit-kernels classify`, and the images and labels that it reads."""

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mvit_kernels import zoo
from mvit_kernels.nn import MobileViT
from mvit_kernels.zoo import images
from support import data

LAND_USE = ["--size", "224", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]


# ----------------------------------------------------------------------------------------------------- classify


@pytest.mark.parametrize(
    "arguments",
    [[], ["--model", "mobilevit_xxs", "--no-freeze"], ["--model", "huggingface/xxs", "--dtype", "bfloat16"]],
    ids=lambda arguments: " ".join(arguments) or "own, guessed",
)
def test_classify_gets_ten_of_ten(run, arguments):
    photos = sorted(data.data_path("land_use", "photos").glob("*.png"))
    weights = ["--checkpoint", data.land_use_checkpoint()]
    labels = ["--labels", data.data_path("land_use", "class_indices.json")]
    result = run("classify", *photos, *weights, *labels, *LAND_USE, *arguments, "--batch", "4", "--topk", "3", "--json")
    assert (result.code, result.err) == (0, "")
    predicted = json.loads(result.out)
    assert [each["image"] for each in predicted] == [str(path) for path in photos]
    assert [each["predictions"][0]["label"] for each in predicted] == [p.stem.rstrip("0123456789") for p in photos]
    if arguments:
        return
    with torch.no_grad():
        probabilities = zoo.load(None, checkpoint=weights[1])(data.land_use_photos()[0]).softmax(1)
    for each, expected in zip(predicted, probabilities, strict=True):
        assert len(each["predictions"]) == 3
        for prediction in each["predictions"]:
            assert prediction["probability"] == pytest.approx(expected[prediction["index"]].item(), abs=2e-3)


def test_classify_as_text_without_labels(run, weights, photo):
    result = run("classify", photo, "--checkpoint", weights, "--size", "64", "--topk", "9")
    first, *lines = result.out.splitlines()
    assert first == str(photo)
    assert sorted(line.split()[-1] for line in lines) == ["0", "1", "2", "3", "4"]
    assert sum(float(line.split()[0].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.1)


def test_classify_bgr(run, weights, photo, tmp_path):
    swapped = tmp_path / "swapped.png"
    Image.fromarray(np.asarray(Image.open(photo))[..., ::-1].copy()).save(swapped)
    command = ["classify", photo, swapped, "--checkpoint", weights, "--size", "64", "--json"]
    rgb, bgr = json.loads(run(*command).out), json.loads(run(*command, "--bgr").out)
    assert rgb[0]["predictions"] == bgr[1]["predictions"] != rgb[1]["predictions"] == bgr[0]["predictions"]


def test_classify_refuses(refused, weights, photo, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    command = ["classify", photo, "--checkpoint", weights, "--size", "64"]
    assert "has 2 labels, and the model 5 classes" in refused(*command, "--labels", tmp_path / "names.txt")
    (tmp_path / "background.txt").write_text("background\na\nb\nc\nd\ne\n")
    assert "6 labels, and the model 5 classes" in (text := refused(*command, "--labels", tmp_path / "background.txt"))
    assert "is the first one the background" in text
    assert "does not fit" in refused(*command, "--resize", "32")
    assert "std is" in refused(*command, "--std", "1,0,1")
    headless = tmp_path / "headless.pth"
    torch.save(MobileViT("xxs").state_dict(), headless)
    assert "has no classifier" in refused("classify", photo, "--checkpoint", headless, "--size", "64")


# ------------------------------------------------------------------------------------------------------- images


def test_preprocess_is_resize_crop_and_normalise():
    path = data.data_path("land_use", "photos") / "river17.png"
    for size, resize in ((224, 256), (96, 128)):
        ours = images.preprocess(images.load_image(path), size, resize, data.MEAN, data.STD)
        torch.testing.assert_close(ours, data.preprocess(path, size, resize), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width, height", [(301, 200), (97, 333), (64, 64), (1, 4000)])
def test_preprocess_any_shape(width, height):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    ours = images.preprocess(image, (64, 48), 72)
    scale = 72 / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 48) // 2, (whole.height - 64) // 2
    crop = np.asarray(whole.crop((left, top, left + 48, top + 64)))
    assert ours.shape == (3, 64, 48) and ours.dtype == torch.float32
    difference = np.abs(ours.permute(1, 2, 0).numpy() * 255 - crop)
    assert difference.max() < 2.01  # Pillow rounds to whole numbers, in either direction; a pixel's shift gives 200


def test_load_image_turns_photos_upright(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: the left of the file is the top of the photo
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(images.load_image(tmp_path / "a.png"))
    assert upright.shape == (16, 8, 3) and upright[:8].min() == 255 and upright[8:].max() == 0


def test_images_that_are_none(run, refused, weights, photo, tmp_path):
    whole = photo.read_bytes()
    broken = {"empty.png": b"", "text.png": b"no image", "half.png": whole[: len(whole) // 2], "head.png": whole[:20]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (13400, 13400)).save(tmp_path / "bomb.png")
    for name, words in {
        **dict.fromkeys(broken, "image"),
        "empty.png": "is empty (0 bytes)",
        "deep.png": "more than 8 bits a channel",
        "bomb.png": "more than 179 megapixels",
    }.items():
        assert words in (text := refused("classify", tmp_path / name, "--checkpoint", weights)) and name in text
    assert "is a folder" in refused("classify", tmp_path, "--checkpoint", weights)

    bad = [tmp_path, *(tmp_path / name for name in broken), tmp_path / "absent.png"]
    command = ["--checkpoint", weights, "--size", "64", "--json"]
    result = run("classify", *bad[:2], photo, *bad[2:], photo, *command)  # the rest is done
    assert result.code == 1
    assert [each["image"] for each in json.loads(result.out)] == [str(photo), str(photo)]
    for path, line in zip(bad, result.err.splitlines(), strict=True):
        assert line.startswith("mvit-kernels: error: ") and str(path) in line
    result = run("classify", *bad, *command)
    assert (result.code, result.out) == (2, "") and "none of the 6 photos could be read" in result.err


def test_a_photo_that_may_not_be_read(run, weights, photo, monkeypatch, tmp_path):
    """Simulated: the file's mode does not keep root out."""
    secret, whole = tmp_path / "secret.png", Image.open

    def denied(path, *rest):
        if path == secret:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *rest)

    secret.write_bytes(photo.read_bytes())
    monkeypatch.setattr(Image, "open", denied)
    result = run("classify", secret, photo, "--checkpoint", weights, "--size", "64")
    assert result.code == 1 and str(photo) in result.out
    assert result.err == f"mvit-kernels: error: {secret}: Permission denied\n"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_images_of_other_modes(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode).save(path)
    x = images.preprocess(images.load_image(path), 32, 32)
    assert x.shape == (3, 32, 32) and x.min() > 0.99


def test_images_load_without_warnings(tmp_path, recwarn):
    """A palette with transparency, a photo of 90 megapixels, the first frame of an animation."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    pixels.convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    expected = np.asarray(pixels.convert("P").convert("RGB"))
    assert np.array_equal(np.asarray(images.load_image(tmp_path / "palette.png")), expected)
    assert images.load_image(tmp_path / "large.png").size == (9500, 9500)
    assert images.load_image(tmp_path / "animation.gif").getpixel((5, 5)) == (255, 0, 0)
    assert not [str(warning.message) for warning in recwarn]


def test_sample_photos():
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    photos = dict(images.sample_photos())
    assert {"grace_hopper", "china", "flower"} <= photos.keys()
    for image in photos.values():
        assert image.mode == "RGB" and min(image.size) >= 256 and np.asarray(image).std() > 20
