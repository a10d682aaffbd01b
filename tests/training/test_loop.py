# SPDX-License-Identifier: Apache-2.0
"""The loop: what it learns, exact resuming after SIGKILL, several processes, and what it refuses."""

import dataclasses
import random
import shutil

import pytest
import torch

from mvit_kernels import MobileViT, load_checkpoint, report
from mvit_kernels.training import loop, saving
from mvit_kernels.training.loop import train
from mvit_kernels.training.recipe import read_recipe
from support.training import (
    QUICK,
    equal_states,
    finish,
    kill_after,
    losses,
    photo_folder,
    rows,
    start,
    state,
    tiny_recipe,
)

EVERY_STEP = dataclasses.replace(QUICK, save_seconds=0.0)
# Everything random and everything with a state: scales, dropout, an average, gradients over two steps, momentum.
BUSY = {"multi_scale": {"smallest": 32, "largest": 64, "count": 2}, "accumulate": 2, "epochs": 4, "batch": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted training."""
    output = tmp_path_factory.mktemp("whole") / "run"
    output.parent.mkdir(exist_ok=True)
    finish(start(folder, tiny_recipe(**BUSY), output, settings=QUICK))
    return output


# -------------------------------------------------------------------------------------------------------- learning


def test_it_learns_and_writes_everything(folder, tmp_path):
    recipe = tiny_recipe(epochs=20, size=64, lr=2e-3, ema=None, dropout=0.0)
    summary = train(folder, recipe, tmp_path / "run", settings=dataclasses.replace(QUICK, tensorboard=True))
    found = losses(tmp_path / "run")
    assert summary.best["top1"] > 0.6 and not summary.interrupted
    assert (summary.epochs, summary.step) == (20, len(found)) == (20, 60)
    names = {
        "last.pth",
        "best.pth",
        "best.json",
        "log.csv",
        "epochs.csv",
        "recipe.yaml",
        "classes.txt",
        "confusion.csv",
    }
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert not list((tmp_path / "run").glob(".*"))
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert (tmp_path / "run" / "classes.txt").read_text() == "a\nb\nc\n"
    best = max(float(row["top1"]) for row in rows(tmp_path / "run" / "epochs.csv"))
    assert best == summary.best["top1"]


def test_the_schedule_warms_up_and_ends_at_the_final_rate(folder, tmp_path):
    recipe = tiny_recipe(epochs=4, lr=0.01, warmup_lr=0.001, warmup_steps=3, final_lr=0.0001, head_lr_factor=3.0)
    train(folder, recipe, tmp_path / "run", settings=QUICK)
    rates = [float(row["lr"]) for row in rows(tmp_path / "run" / "log.csv")]
    assert rates[:4] == pytest.approx([0.001, 0.004, 0.007, 0.01])
    assert all(earlier > later for earlier, later in zip(rates[3:], rates[4:], strict=False))
    assert 0.0001 < rates[-1] < 0.001


def test_a_warm_up_longer_than_the_training_is_cut(folder, tmp_path, capfd):
    settings = dataclasses.replace(QUICK, progress=True)
    train(folder, tiny_recipe(warmup_steps=3000, epochs=4), tmp_path / "run", settings=settings)
    assert "warm-up of 3000 updates is cut to 1" in capfd.readouterr().err
    assert float(rows(tmp_path / "run" / "log.csv")[1]["lr"]) == 5e-4


def test_the_average_is_what_is_evaluated_and_loaded(folder, tmp_path):
    train(folder, tiny_recipe(), tmp_path / "run", settings=QUICK)
    last = tmp_path / "run" / "last.pth"
    averaged = state(last, "state_dict_ema")
    assert not equal_states(averaged, state(last))
    model = load_checkpoint(MobileViT("xxs", num_classes=3), last)
    assert equal_states(dict(model.state_dict()), averaged)
    one_epoch = train(folder, tiny_recipe(epochs=1), tmp_path / "one", settings=QUICK)
    assert one_epoch.best["epoch"] == 0
    assert equal_states(state(tmp_path / "one" / "best.pth"), state(tmp_path / "one" / "last.pth", "state_dict_ema"))


def test_accumulated_gradients_are_those_of_the_whole_batch(folder, tmp_path):
    """Without batch norm in between there is nothing else: here the first update's sum over two halves."""
    options = {"epochs": 1, "optimizer": "sgd", "lr": 1.0, "warmup_steps": 0, "dropout": 0.0, "classifier_dropout": 0.0}
    options |= {"clip_grad": None, "weight_decay": 0.0, "ema": None}
    train(folder, tiny_recipe(batch=6, accumulate=2, **options), tmp_path / "two", settings=QUICK)
    last = torch.load(tmp_path / "two" / "last.pth", weights_only=True)
    assert (last["step"], last["updates"]) == (2, 1)


@pytest.mark.parametrize("accelerated", [True, False])
def test_blocks_are_accelerated_unless_told_otherwise(folder, tmp_path, monkeypatch, accelerated):
    seen = []
    monkeypatch.setattr(loop._Run, "run", lambda run: seen.append(len(report(run.parts.model).accelerated)))
    train(folder, tiny_recipe(), tmp_path / "run", settings=dataclasses.replace(QUICK, accelerate=accelerated))
    assert seen == [3 if accelerated else 0]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast(folder, tmp_path, amp):
    train(folder, tiny_recipe(amp=amp, epochs=1), tmp_path / "run", settings=QUICK)
    train(folder, tiny_recipe(amp=None, epochs=1), tmp_path / "full", settings=QUICK)
    half, full = losses(tmp_path / "run"), losses(tmp_path / "full")
    assert half != full and half == pytest.approx(full, abs=0.1)
    assert bool(torch.load(tmp_path / "run" / "last.pth", weights_only=True)["scaler"]) == (amp == "float16")


def test_a_loss_that_is_not_finite_ends_it(folder, tmp_path):
    recipe = tiny_recipe(lr=1e30, warmup_steps=0, clip_grad=None, epochs=20)
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf) at step \d+ .* lower --lr"):
        train(folder, recipe, tmp_path / "run", settings=EVERY_STEP)
    contents = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert contents["step"] < len(losses(tmp_path / "run"))


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_any_moment_it_continues_exactly(folder, whole, tmp_path, workers):
    settings = dataclasses.replace(EVERY_STEP, workers=workers)
    moments = random.Random(workers)
    output, done = tmp_path / "run", 0
    for _ in range(3):
        resume = (output / "last.pth").exists()
        jobs = start(folder, None if resume else tiny_recipe(**BUSY), output, resume=resume, settings=settings)
        kill_after(jobs, output, done + moments.randint(2, 4), moments.uniform(0, 0.1))
        done = max(done, torch.load(output / "last.pth", weights_only=True)["step"])
    assert 0 < done < len(losses(whole))
    finish(start(folder, None, output, resume=True, settings=settings))
    assert (output / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert (output / "epochs.csv").read_bytes() == (whole / "epochs.csv").read_bytes()
    for place in ("state_dict", "state_dict_ema"):
        assert equal_states(state(output / "last.pth", place), state(whole / "last.pth", place))
    assert equal_states(state(output / "best.pth"), state(whole / "best.pth"))
    assert not list(output.glob(".*.part"))


def test_another_seed_gives_other_losses(folder, whole, tmp_path):
    train(folder, tiny_recipe(**BUSY, seed=1), tmp_path / "run", settings=QUICK)
    assert losses(tmp_path / "run") != losses(whole)


def test_two_processes_have_equal_weights_and_continue_exactly(folder, tmp_path):
    recipe, whole, output = tiny_recipe(**BUSY), tmp_path / "whole", tmp_path / "run"
    finish(start(folder, recipe, whole, ranks=2, settings=QUICK))
    ranks = [torch.load(whole / f"rank{rank}.pth", weights_only=True) for rank in range(2)]
    parameters = dict(MobileViT("xxs", num_classes=3).named_parameters())
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in parameters)
    assert all(torch.isfinite(value).all() for value in ranks[0].values())
    assert float(rows(whole / "epochs.csv")[0]["steps"]) < 6  # half the photos each

    jobs = start(folder, recipe, output, ranks=2, settings=EVERY_STEP)
    kill_after(jobs, output, 2, 0.02)
    with pytest.raises(ValueError, match="number of processes from 2 to 1"):
        train(folder, None, output, resume=True, settings=QUICK)
    finish(start(folder, None, output, ranks=2, resume=True, settings=QUICK))
    assert (output / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert (output / "epochs.csv").read_bytes() == (whole / "epochs.csv").read_bytes()


def test_ctrl_c_saves_and_says_so(folder, tmp_path, monkeypatch):
    step = loop._Run._step

    def interrupted(run, *args):
        step(run, *args)
        run.interruption.requested = run.place.step == 2

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    summary = train(folder, tiny_recipe(), tmp_path / "run", settings=QUICK)
    assert summary.interrupted and summary.step == 2
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 2
    monkeypatch.setattr(loop._Run, "_step", step)
    assert train(folder, None, tmp_path / "run", resume=True, settings=QUICK).step == 6
    train(folder, tiny_recipe(), tmp_path / "whole", settings=QUICK)
    for name in ("log.csv", "epochs.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_share_held_back_is_remembered(tmp_path):
    plain = photo_folder(tmp_path / "plain", photos=8, validation=0)
    train(plain, tiny_recipe(), tmp_path / "run", settings=dataclasses.replace(QUICK, validation=0.5))
    assert train(plain, None, tmp_path / "run", resume=True, settings=QUICK).epochs == 2
    with pytest.raises(ValueError, match="number of training samples from 12 to 18"):
        train(plain, None, tmp_path / "run", resume=True, settings=dataclasses.replace(QUICK, validation=0.25))


def test_a_finished_training_has_nothing_left(folder, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    summary = train(folder, None, output, resume=True, settings=QUICK)
    assert summary.epochs == 4 and not summary.interrupted
    assert (output / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


# -------------------------------------------------------------------------------------------------------- refusals


def test_resuming_refuses_what_it_could_not_continue_exactly(folder, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    before = (output / "last.pth").read_bytes()

    def refused(match, folder=folder, recipe=None, settings=QUICK):
        with pytest.raises(ValueError, match=match):
            train(folder, recipe, output, resume=True, settings=settings)

    refused("lr was 0.0005 and is 0.1; leave out", recipe=tiny_recipe(**BUSY, lr=0.1))
    refused(
        "multi_scale.largest was 64 and is 96",
        recipe=tiny_recipe(**BUSY | {"multi_scale": {"smallest": 32, "largest": 96, "count": 2}}),
    )
    refused("--no-accelerate", settings=dataclasses.replace(QUICK, accelerate=False))
    refused("number of training samples from 12 to 15", folder=photo_folder(tmp_path / "more", photos=5))
    refused("the classes", folder=photo_folder(tmp_path / "other", classes="abd"))
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    (renamed / "train" / "a" / "0.png").rename(renamed / "train" / "a" / "9.png")
    refused("files of the training samples", folder=renamed)
    assert (output / "last.pth").read_bytes() == before


def test_a_folder_with_a_training_is_left_alone(folder, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="has a training in it; continue it with --resume"):
        train(folder, tiny_recipe(), output, settings=QUICK)
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(ValueError, match="--resume: there is no"):
        train(folder, None, tmp_path / "nothing", resume=True, settings=QUICK)


def test_no_space(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match="has 1 MB of free space, and the checkpoints take up to 5. MB"):
        train(folder, tiny_recipe(), tmp_path / "run", settings=QUICK)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_an_unknown_optimizer(folder, tmp_path):
    with pytest.raises(ValueError, match="optimizer 'adamm': timm.optim cannot make it"):
        train(folder, tiny_recipe(optimizer="adamm"), tmp_path / "run", settings=QUICK)
