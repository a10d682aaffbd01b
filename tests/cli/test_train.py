# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels train`` and ``evaluate``, run as their users run them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mvit_kernels import MobileViT
from mvit_kernels.cli.train import recipe_from
from mvit_kernels.training import loop
from mvit_kernels.training.recipe import read_recipe
from support.training import photo_folder, rows

TINY = ["--model", "own/xxs", "--size", 32, "--batch", 4, "--epochs", 2, "--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def arguments(monkeypatch):
    """The parsed arguments of a command line."""
    from mvit_kernels.__main__ import build_parser

    return lambda *words: build_parser().parse_args(["train", "photos", *map(str, words)])


def test_train_resume_and_evaluate(run, folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    step = loop._Run._step

    def interrupted(run, *args):
        step(run, *args)
        run.interruption.requested = run.place.step == 4

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    result = run("train", folder, *TINY, "--output", output, "--no-tensorboard")
    assert result.code == 130
    assert f"train {folder} --resume --output {output}" in result.out and "interrupted" in result.out
    monkeypatch.setattr(loop._Run, "_step", step)
    result = run("train", folder, "--resume", "--output", output, "--no-tensorboard", "--workers", 0, "--device", "cpu")
    assert result.code == 0
    assert "best at epoch" in result.out and str(output / "best.pth") in result.out
    assert "resumed at epoch 2, step 2" in result.err and "images/s" in result.err
    assert [row["step"] for row in rows(output / "log.csv")] == list(map(str, range(6)))

    best = json.loads((output / "best.json").read_text())
    scored = {}
    for form in ([], ["--no-accelerate"], ["--freeze"]):
        to = tmp_path / "figures.json"
        result = run("evaluate", folder, "--checkpoint", output / "best.pth", "--output", to, "--workers", 0, *form)
        assert result.code == 0 and "6 samples" in result.out and "top1" in result.out
        scored[tuple(form)] = json.loads(to.read_text())
    assert {each["form"] for each in scored.values()} == {"accelerated", "plain PyTorch", "frozen"}
    for each in scored.values():
        assert each["top1"] == best["top1"] and each["classes"] == ["a", "b", "c"]
        assert each["loss"] == pytest.approx(best["loss"], rel=1e-4)
    result = run("evaluate", folder, "--checkpoint", output / "best.pth", "--confusion", tmp_path / "c", "--workers", 0)
    assert (tmp_path / "c.csv").exists() and (tmp_path / "c.png").exists()
    result = run("evaluate", folder, "--checkpoint", output / "best.pth", "--json", "--workers", 0)
    del (printed := json.loads(result.out))["seconds"]
    assert result.code == 0 and printed == {k: v for k, v in scored[()].items() if k != "seconds"}


def test_quiet(run, folder, tmp_path):
    result = run("train", folder, *TINY, "--output", tmp_path / "run", "--no-tensorboard", "--quiet", "--no-accelerate")
    assert result.code == 0 and result.err == "" and "last.pth" in result.out


def test_recipes_from_arguments(arguments, tmp_path):
    assert recipe_from(arguments()) == read_recipe("finetune")
    assert recipe_from(arguments("--task", "detection")) == read_recipe("ssdlite_finetune")
    assert recipe_from(arguments("--recipe", "deeplabv3")).task == "segmentation"
    assert recipe_from(arguments("--resume")) is None
    assert recipe_from(arguments("--resume", "--lr", 1)).lr == 1.0
    words = ["--recipe", "xxs", "--lr", "3e-4", "--size", "192x256", "--fixed", "--amp", "none", "--seed", 5]
    recipe = recipe_from(arguments(*words, "--set", "weight_decay=0.1", "-s", "augmentation.flip=0"))
    assert (recipe.lr, recipe.size, recipe.multi_scale, recipe.amp, recipe.seed) == (3e-4, (192, 256), None, None, 5)
    assert (recipe.weight_decay, recipe.augmentation.flip) == (0.1, 0.0)
    scales = recipe_from(arguments("--multi-scale", "--size", 256)).multi_scale
    assert (scales.smallest, scales.largest) == (160, 320)
    assert recipe_from(arguments("--recipe", "s", "--multi-scale")) == read_recipe("s")
    assert recipe_from(arguments("--pretrained", "--model", "mobilevit_s")).pretrained


def test_refusals_before_the_first_step(refused, folder, tmp_path):
    where = ["--output", tmp_path / "run", "--device", "cpu", "--workers", 0]
    assert "--recipe nonsense: there is no recipe" in refused("train", folder, "--recipe", "nonsense")
    assert "lrr is unknown; did you mean lr?" in refused("train", folder, "--set", "lrr=1")
    assert "the recipe xxs is for classification" in refused("train", folder, "--recipe", "xxs", "--task", "detection")
    assert "exclude each other" in refused("train", folder, "--pretrained", "--checkpoint", "x")
    assert "there is no" in refused("train", folder, "--resume", *where)
    assert "is no folder" in refused("train", tmp_path / "none", *where)
    assert "unknown or unsupported device" in refused("train", folder, "--device", "abacus")
    assert "is not a number from 0 to 1" in refused("train", folder, "--validation", "2")
    assert "there is no file" in refused("train", folder, *where, "--checkpoint", tmp_path / "none.pth")
    (tmp_path / "file").touch()
    assert "file" in refused("train", folder, "--output", tmp_path / "file")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_evaluate_refuses_what_does_not_fit(refused, folder, tmp_path):
    weights = tmp_path / "five.pth"
    torch.save(MobileViT("xxs", num_classes=5).state_dict(), weights)
    with_weights = ["evaluate", folder, "--checkpoint", weights, "--device", "cpu", "--workers", 0]
    assert "has 5 classes and the folder 3; name the checkpoint's with --labels" in refused(*with_weights)
    (tmp_path / "names.txt").write_text("a\nb\nx\ny\nz\n")
    wrong = refused(*with_weights, "--labels", tmp_path / "names.txt")
    assert "has c, which is not among the 5 classes" in wrong
    assert "exclude each other" in refused(*with_weights, "--freeze", "--no-accelerate")


def test_torchrun_with_two_processes(folder, tmp_path):
    """The real thing, once; what both compute is in tests/training/test_loop.py."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
    ]
    command += ["-m", "mvit_kernels", "train", folder, *TINY, "--output", tmp_path / "run", "--no-tensorboard"]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best at epoch") == 1  # the first process alone prints
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert (last["world_size"], last["epoch"], last["step"]) == (2, 2, 4)
    assert len(rows(tmp_path / "run" / "log.csv")) == 4
