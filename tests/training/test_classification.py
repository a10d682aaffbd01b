# SPDX-License-Identifier: Apache-2.0
"""Classification: layouts of folders, the checkpoint's classes, figures, and everything that is refused at first."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mvit_kernels import MobileViT, convert_state_dict
from mvit_kernels.training.evaluation import evaluate
from mvit_kernels.training.outputs import write_confusion
from mvit_kernels.training.recipe import Recipe
from mvit_kernels.training.saving import save
from mvit_kernels.training.tasks import Task, bare, task_of
from mvit_kernels.training.tasks.classification import Classification
from mvit_kernels.training.tasks.photos import check_images, image_files
from mvit_kernels.zoo.images import load_image, preprocess
from support import data
from support.training import QUICK, photo_folder, tiny_recipe


def task(**changes) -> Classification:
    return Classification(tiny_recipe(**changes))


@pytest.fixture
def split(tmp_path):
    return photo_folder(tmp_path / "split")


@pytest.fixture
def plain(tmp_path):
    return photo_folder(tmp_path / "plain", photos=8, validation=0)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Weights of five classes, without names."""
    path = tmp_path_factory.mktemp("five") / "five.pth"
    torch.save(MobileViT("xxs", num_classes=5).state_dict(), path)
    return path


# --------------------------------------------------------------------------------------------------------- folders


def test_train_and_val(split):
    training, validation = task().open(split, validation=None)
    assert (len(training), len(validation)) == (12, 6)
    assert training.classes == validation.classes == ("a", "b", "c")
    assert training.names[0] == "a/0.png" and validation.targets == [0, 0, 1, 1, 2, 2]


def test_a_share_of_each_class_is_held_back(plain):
    doing = task()
    training, validation = doing.open(plain, validation=0.25)
    assert [validation.targets.count(target) for target in range(3)] == [2, 2, 2]
    assert not set(training.names) & set(validation.names)
    assert len(training) + len(validation) == 24
    assert doing.remarks == ["6 of 24 photos are held back for validation, 25% a class"]
    assert task().open(plain, validation=0.25)[1].names == validation.names
    assert len(task().open(plain, validation=0)[1]) == 0
    training, validation = task().open(plain, validation=1)
    assert (len(training), len(validation)) == (0, 24)


def test_train_without_val_and_val_without_train(split):
    shutil.rmtree(split / "val")
    training, validation = task().open(split, validation=None)
    assert (len(training), len(validation)) == (9, 3)
    (split / "train").rename(split / "val")
    training, validation = task().open(split, validation=1)
    assert (len(training), len(validation)) == (0, 12)


def test_samples(split):
    doing = task(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    training, validation = doing.open(split, validation=None)
    image, target = validation[3, (32, 48)]
    photo = load_image(split / "val" / "b" / "1.png")
    assert target == 1 and torch.equal(image, preprocess(photo, (32, 48), None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.manual_seed(0)
    first, again = training[0, (64, 32)][0], training[0, (64, 32)][0]
    assert first.shape == (3, 64, 32) and first.dtype == torch.float32 and not torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(first, training[0, (64, 32)][0])
    images, targets = doing.collate([validation[0, (32, 32)], validation[5, (32, 32)]])
    assert images.shape == (2, 3, 32, 32) and targets.tolist() == [0, 2]


@pytest.mark.parametrize("flips, turned", [((1, 0), [2]), ((0, 1), [1]), ((1, 1), [1, 2]), ((0, 0), [])])
def test_flips_of_the_whole_image(tmp_path, flips, turned):
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(photo).save(tmp_path / name / "photo.png")
    always = {"augmentation.area": [1, 1], "mean": [0, 0, 0], "std": [1, 1, 1]}
    always |= {"augmentation.flip": flips[0], "augmentation.vertical_flip": flips[1]}
    image, _ = task(**always).open(tmp_path, validation=0)[0][0, (40, 40)]
    torch.testing.assert_close(image, torch.from_numpy(photo).permute(2, 0, 1).float().flip(turned) / 255)


def test_empty_classes_are_named(split):
    (split / "train" / "aeroplane").mkdir()
    (split / "train" / "zebra").mkdir()
    (split / "train" / "zebra" / "notes.txt").touch()
    with pytest.raises(ValueError, match="no photos of 2 of 5 classes: aeroplane, zebra; add some"):
        task().open(split, validation=None)


def test_all_unreadable_images_are_counted_and_the_first_named(split):
    for index, name in enumerate(("train/a/0.png", "train/b/1.png", "val/c/0.png")):
        data = (split / name).read_bytes()
        (split / name).write_bytes(data[: len(data) // 2 * index])
    photo = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    photo.save(split / "train" / "a" / "cut.jpg")
    (split / "train" / "a" / "cut.jpg").write_bytes((split / "train" / "a" / "cut.jpg").read_bytes()[:-150])
    (split / "train" / "a" / "text.jpeg").write_text("no image")
    with pytest.raises(ValueError) as error:
        task().open(split, validation=None)
    text = str(error.value)
    assert text.startswith("4 of 20 images cannot be read") or text.startswith("5 of 20 images cannot be read")
    assert f"{split / 'train/a/0.png'} (0 bytes)" in text and "b/1.png" in text and "text.jpeg" in text
    assert text.endswith("; repair or remove them")


def test_each_process_checks_its_share(split, monkeypatch):
    paths = image_files(split)
    paths[1].write_bytes(b"")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    check_images(paths)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="1 of 9 images"):
        check_images(paths)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: [shutil.rmtree(folder / "train" / name) for name in "abc"], "has no folder in it"),
        (lambda folder: [shutil.rmtree(folder / "train" / name) for name in "bc"], "has one class, a"),
        (lambda folder: (folder / "val" / "a").rename(folder / "val" / "d"), "has d, which is not among the 3 classes"),
    ],
)
def test_folders_that_are_refused(split, change, message):
    change(split)
    with pytest.raises(ValueError, match=message):
        task().open(split, validation=None)


def test_a_share_where_there_is_val(split):
    with pytest.raises(ValueError, match="has photos for validation in val/; leave out --validation 0.3"):
        task().open(split, validation=0.3)


# ----------------------------------------------------------------------------------------------------- checkpoints


def classifier(model: nn.Module) -> torch.Tensor:
    return convert_state_dict(model.state_dict(), "own")["classifier.weight"]


@pytest.mark.parametrize("name", ["own/xxs", "mobilevit_xxs", "huggingface/xxs", None])
def test_every_kind_of_model_from_every_layout(five, name):
    doing = task(model=name)
    model = doing.build(("a", "b", "c"), five)
    assert doing.remarks == ["the classifier of the checkpoint's 5 classes is replaced by a new one for 3"]
    own, source = convert_state_dict(model.state_dict(), "own"), torch.load(five, weights_only=True)
    assert own["classifier.weight"].shape == (3, 320)
    assert all(torch.equal(own[key], source[key]) for key in source if not key.startswith("classifier."))
    heads = [key for key, _ in model.named_parameters() if doing.is_head(key)]
    assert len(heads) == 2


@pytest.mark.parametrize("name", ["own/xxs", "mobilevit_xxs", "huggingface/xxs"])
def test_dropout_in_every_kind_of_model(name):
    model = task(model=name, dropout=0.25, classifier_dropout=0.75).build(("a", "b"), None)
    found = [module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    layers = 9
    own = name == "own/xxs"
    assert found.count(0.25) == layers * (1 if own else 2)
    assert (model.classifier_dropout == 0.75) if own else found.count(0.75) == 1
    assert len(found) == found.count(0.25) + found.count(0.75)


def test_the_checkpoint_s_classes(five, tmp_path):
    weights = torch.load(five, weights_only=True)

    def built(classes, labels=None, new_head=None, file=five):
        doing = task(model=None)
        doing.labels, doing.new_head = labels, new_head
        return classifier(doing.build(classes, file)), doing.remarks

    rows = weights["classifier.weight"]
    kept, remarks = built(tuple("abcde"))
    assert torch.equal(kept, rows) and "5 classes without names" in remarks[0]
    taken, remarks = built(("d", "b"), labels="abcde")
    assert torch.equal(taken, rows[[3, 1]]) and "taken by name" in remarks[0]
    new, _ = built(tuple("abcde"), new_head=True)
    assert new.shape == rows.shape and not torch.equal(new, rows)
    new, remarks = built(("x", "y"), labels="abcde")
    assert new.shape == (2, 320) and "is replaced" in remarks[0]
    with pytest.raises(ValueError, match="knows 5 classes, and not x, y of the folder's 3; rename the folders, or"):
        built(("a", "x", "y"), labels="abcde")
    with pytest.raises(ValueError, match="and not v, w, x, y and 1 more of"):
        built(tuple("vwxyz"), labels="abcde")
    with pytest.raises(ValueError, match="5 classes and the folder 2; name the checkpoint's with --labels"):
        built(("a", "b"), new_head=False)
    with pytest.raises(ValueError, match="classifier of 5 classes, and 2 names"):
        built(("a", "b"), labels="ab")
    # Our own files name them.
    named = {"task": "classification", "classes": list("abcde"), "recipe": {"task": "classification"}}
    save(tmp_path / "best.pth", {**named, "state_dict": weights})
    taken, _ = built(("e", "a"), file=tmp_path / "best.pth")
    assert torch.equal(taken, rows[[4, 0]])
    with pytest.raises(ValueError, match="not x of"):
        built(("a", "x"), file=tmp_path / "best.pth")


def test_a_backbone_gets_a_classifier(tmp_path):
    torch.save(MobileViT("xxs").state_dict(), tmp_path / "backbone.pth")
    doing = task(model=None)
    assert doing.build(("a", "b"), tmp_path / "backbone.pth").num_classes == 2
    assert doing.remarks == ["the classifier is new for 2"]


def test_another_variant_is_refused(five):
    with pytest.raises(ValueError, match="MobileViT-XXS, the model a MobileViT-S"):
        task(model="own/s").build(("a", "b"), five)


# --------------------------------------------------------------------------------------------------------- figures


class Scores(nn.Module):
    """Gives images their scores: their first pixels."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(1, classes)

    def forward(self, images):
        return images[:, 0, 0, : self.head.out_features]


def test_figures_are_those_counted_by_hand():
    noise = np.random.default_rng(0)
    scores = torch.from_numpy(noise.normal(size=(50, 7)).astype(np.float32))
    targets = torch.from_numpy(noise.integers(0, 6, 50))  # none of the last class
    images = torch.zeros(50, 3, 8, 8)
    images[:, 0, 0, :7] = scores
    batches = [(images[i : i + 8], targets[i : i + 8]) for i in range(0, 50, 8)]
    figures = task().evaluate(Scores(7), batches, torch.device("cpu"))
    order = scores.argsort(1, descending=True)
    right = order[:, 0] == targets
    assert figures["top1"] == pytest.approx(right.double().mean().item())
    assert figures["top5"] == pytest.approx((order[:, :5] == targets[:, None]).any(1).double().mean().item())
    assert figures["loss"] == pytest.approx(nn.functional.cross_entropy(scores, targets).item(), rel=1e-5)
    assert figures["per_class"][6] is None
    assert figures["per_class"][:6] == pytest.approx([right[targets == c].double().mean().item() for c in range(6)])
    matrix = torch.zeros(7, 7, dtype=torch.long)
    for true, predicted in zip(targets, order[:, 0], strict=True):
        matrix[true, predicted] += 1
    assert figures["confusion"] == matrix.tolist()


def test_the_loss_is_smoothed(five):
    doing = task(label_smoothing=0.2, dropout=0.0)
    scores, targets = torch.randn(4, 3, 1, 8), torch.tensor([0, 1, 2, 3])
    loss = doing.losses(Scores(5), scores, targets)["loss"]
    plain = nn.functional.log_softmax(scores[:, 0, 0, :5], 1)
    by_hand = -(0.8 * plain[range(4), targets] + 0.2 * plain.mean(1)).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_confusion_matrix_as_files(tmp_path):
    files = write_confusion(tmp_path / "confusion", [[3, 1], [0, 4]], ["cat", "dog"])
    assert (tmp_path / "confusion.csv").read_text() == "true,cat,dog\ncat,3,1\ndog,0,4\n"
    assert Image.open(files[1]).size[0] > 300


@pytest.mark.parametrize("frozen", [False, True])
def test_the_land_use_checkpoint_by_its_names(frozen, tmp_path):
    """21 classes by number; the folder has 16 of them. Of the 24 photos of each, 6: all of them took 10 seconds."""
    for photos in data.data_path("land_use", "train").iterdir():
        (tmp_path / photos.name).mkdir()
        for photo in sorted(photos.iterdir())[::4]:
            (tmp_path / photos.name / photo.name).symlink_to(photo)
    result = evaluate(
        tmp_path,
        data.land_use_checkpoint(),
        changes={"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "batch": 32},
        labels=data.land_use_classes(),
        frozen=frozen,
        settings=QUICK,
    )
    assert result.samples == 96 and len(result.figures["confusion"]) == 21
    assert result.figures["top1"] > 0.9


def test_a_task_by_name():
    assert isinstance(task_of(Recipe("classification")), Classification) and issubclass(Classification, Task)
    model, compiled = nn.Linear(2, 2), nn.Module()
    compiled._orig_mod = model  # as torch.compile wraps it
    assert bare(compiled) is model and bare(model) is model
