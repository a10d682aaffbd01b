# SPDX-License-Identifier: Apache-2.0
"""Recipes: what those of the package say, and what reading one refuses."""

import dataclasses

import pytest

from mvit_kernels.training.recipe import (
    Augmentation,
    MultiScale,
    Recipe,
    as_dict,
    changed,
    from_dict,
    parse_change,
    read_recipe,
    recipe_names,
    to_yaml,
)
from mvit_kernels.training.sampler import resolutions
from support import ROOT


def test_the_names():
    wanted = {"xxs", "xs", "s", "finetune", "ssdlite", "ssdlite_finetune", "deeplabv3", "deeplabv3_finetune"}
    assert set(recipe_names()) == wanted


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_its_own_yaml(name, tmp_path):
    recipe = read_recipe(name)
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
    assert read_recipe(tmp_path / "copy.yaml") == recipe == from_dict(as_dict(recipe), name)


@pytest.mark.parametrize("name, dropout", [("xxs", 0.05), ("xs", 0.1), ("s", 0.1)])
def test_classification_as_published(name, dropout):
    """Mehta & Rastegari 2021, section 4.1 and appendix A."""
    recipe = read_recipe(name)
    assert recipe == Recipe(
        task="classification",
        model=f"own/{name}",
        epochs=300,
        batch=128,
        size=(256, 256),
        multi_scale=MultiScale(160, 320, 5, 32),
        optimizer="adamw",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        decay_norms=True,
        lr=2e-3,
        warmup_lr=2e-4,
        warmup_steps=3000,
        final_lr=2e-4,
        ema=1 - 5e-4,
        label_smoothing=0.1,
        dropout=dropout,
        classifier_dropout=0.1,
        augmentation=Augmentation(area=(0.08, 1.0), ratio=(0.75, 1.3333), flip=0.5, photometric=0.0),
    )
    scales = recipe.multi_scale
    drawn = resolutions(recipe.batch, recipe.size, scales.smallest, scales.largest, scales.count, scales.divisor)
    assert [(h, batch) for h, _, batch in drawn] == [(160, 327), (192, 227), (256, 128), (288, 101), (320, 81)]


def test_detection_and_segmentation_as_published():
    ssdlite, deeplab = read_recipe("ssdlite"), read_recipe("deeplabv3")
    assert (ssdlite.task, ssdlite.epochs, ssdlite.batch, ssdlite.size) == ("detection", 200, 32, (320, 320))
    assert (ssdlite.lr, ssdlite.final_lr, ssdlite.warmup_lr, ssdlite.warmup_steps) == (9e-4, 1e-6, 9e-5, 500)
    assert (deeplab.task, deeplab.epochs, deeplab.batch, deeplab.size) == ("segmentation", 50, 32, (512, 512))
    assert (deeplab.lr, deeplab.head_lr_factor, deeplab.output_stride) == (9e-4, 10.0, 16)
    assert deeplab.augmentation.short_side == (256, 1024)
    assert {ssdlite.weight_decay, deeplab.weight_decay} == {0.01} and {ssdlite.ema, deeplab.ema} == {0.9995}


def test_the_package_data_names_the_recipes():
    assert 'mvit_kernels = ["py.typed", "training/recipes/*.yaml"]' in (ROOT / "pyproject.toml").read_text()


def test_changes():
    recipe = read_recipe("xxs", dict(map(parse_change, ["lr=2e-4", "multi_scale.smallest=192", "augmentation.flip=0"])))
    assert (recipe.lr, recipe.multi_scale.smallest, recipe.augmentation.flip) == (2e-4, 192, 0.0)
    assert recipe.multi_scale.largest == 320 and recipe.augmentation.area == (0.08, 1.0)
    assert read_recipe("xxs", {"multi_scale": None, "size": 224}).size == (224, 224)
    assert read_recipe("finetune", {"multi_scale.largest": 256}).multi_scale == MultiScale(largest=256)
    assert parse_change("mean=[0.5, 0.5, 0.5]") == ("mean", [0.5, 0.5, 0.5])
    assert changed(recipe, {"seed": 3}, "it") == dataclasses.replace(recipe, seed=3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr: 1", r"lrr is unknown; did you mean lr\?"),
        ("augmentation: {flipp: 1}", r"augmentation.flipp is unknown; did you mean augmentation.flip\?"),
        ("epochs: ten", "epochs is 'ten'; a whole number is wanted"),
        ("epochs: 1.5", "epochs is 1.5; a whole number"),
        ("epochs: true", "epochs is True; a whole number"),
        ("epochs: 0", "epochs is 0; 1 or more"),
        ("lr: .nan", "lr is nan; a number is wanted"),
        ("lr: -1", "lr is -1.0; a number above 0"),
        ("decay_norms: 1", "decay_norms is 1; true or false"),
        ("size: [256]", r"size is \[256\]; a list of 2 whole numbers"),
        ("size: 16", r"size is \[16, 16\]; 32 pixels"),
        ("betas: [0.9, 1.0]", "betas is"),
        ("std: [1, 0, 1]", "std is"),
        ("multi_scale: 5", "multi_scale is 5; keys and values are wanted"),
        ("multi_scale: {smallest: 320, largest: 160}", "multi_scale.largest is 160; smallest, 320, or more"),
        ("augmentation: {area: [0.5, 0.1]}", "augmentation.area is"),
        ("dropout: 1.5", "dropout is 1.5; a probability"),
        ("amp: float64", "amp is 'float64'; auto or float16 or bfloat16"),
        ("task: dancing", "task is 'dancing'; classification or detection or segmentation"),
        ("ema: 1.0", "ema is 1.0; a decay between 0 and 1"),
        ("resize: 100", "resize is 100; size, 256, or more"),
        ("lr: 1\nlr: 2", "lr is there twice"),
        ("lr: [1", "is not YAML"),
        ("- lr", "is list; keys and values are wanted"),
        ("output_stride: 4", "output_stride is 4; 8, 16, 32 or null"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text if "task" in text or text.startswith("-") else f"task: classification\n{text}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


def test_a_missing_task_name_or_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1")
    with pytest.raises(ValueError, match="task is missing; classification or"):
        read_recipe(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=r"no recipe of this name among deeplabv3, .*; did you mean finetune\?"):
        read_recipe("finetun")
    with pytest.raises(FileNotFoundError):
        read_recipe("no/such.yaml")
    with pytest.raises(ValueError, match="give key=value"):
        parse_change("lr")
