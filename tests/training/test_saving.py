# SPDX-License-Identifier: Apache-2.0
"""Files of a training: whole or not at all, suspicious when read; tables that are cut; draws without a state."""

import errno
import os
import random

import numpy as np
import pytest
import torch

from mvit_kernels import MobileViT
from mvit_kernels.training import saving
from mvit_kernels.training.logs import Progress, Table, duration
from mvit_kernels.training.saving import describe, prepare_folder, read_run, save
from mvit_kernels.training.seeds import SeededSamples, held_back, seed_sample, seed_step

RUN = {
    **{"task": "classification", "classes": ["a", "b"], "recipe": {"task": "classification", "lr": 0.5}},
    **{"epoch": 1, "batch": 2, "step": 3, "world_size": 1, "state_dict": {"w": torch.ones(3)}, "optimizer": {}},
}


def test_what_is_saved_is_read(tmp_path):
    save(tmp_path / "last.pth", RUN)
    contents = read_run(tmp_path / "last.pth")
    assert contents["step"] == 3 and torch.equal(contents["state_dict"]["w"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
    described = describe(tmp_path / "last.pth")
    assert (described.task, described.classes, described.recipe.lr) == ("classification", ("a", "b"), 0.5)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_one_before(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pth"
    save(path, RUN)
    before = path.read_bytes()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {"write": (torch, "save"), "fsync": (saving.os, "fsync"), "replace": (saving.os, "replace")}[where]
    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space left") as error:
        save(path, {**RUN, "step": 4})
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["last.pth"]


def test_the_data_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(saving.os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    save(tmp_path / "last.pth", RUN)
    assert calls == ["fsync", "replace", "fsync"]  # the last: the folder's


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "last.pth"
    save(path, RUN)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="--resume: .*last.pth is corrupt.*best.pth"):
        read_run(path)
    flipped = bytearray(data)
    flipped[data.index(np.ones(3, np.float32).tobytes())] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="record .* is damaged"):
        read_run(path)
    torch.save(MobileViT("xxs").state_dict(), path)
    with pytest.raises(ValueError, match="not of a training by mvit-kernels.*--checkpoint"):
        read_run(path)
    torch.save({**RUN, "format": "mvit_kernels training 9"}, path)
    with pytest.raises(ValueError, match="of another version"):
        read_run(path)
    save(path, {key: value for key, value in RUN.items() if key != "optimizer"})
    with pytest.raises(ValueError, match="lacks optimizer"):
        read_run(path)


@pytest.mark.parametrize(
    "keys, task",
    [
        (("backbone.stem.conv.weight", "aspp.project.weight"), "segmentation"),
        (("mobilevit.conv_stem.weight", "segmentation_head.aspp.x"), "segmentation"),
        (("encoder.conv_1.weight", "ssd_heads.0.weight"), "detection"),
        (("backbone.stem.conv.weight", "heads.5.predict.weight"), "detection"),
        (("stem.conv.weight", "classifier.weight"), None),
    ],
)
def test_the_task_of_foreign_weights(tmp_path, keys, task):
    torch.save({"state_dict": dict.fromkeys(keys, torch.ones(1))}, tmp_path / "weights.pth")
    assert describe(tmp_path / "weights.pth") == saving.Described(task)


def test_folders(tmp_path):
    folder = tmp_path / "runs" / "one"
    prepare_folder(folder, resume=False)
    (folder / ".last.pth.77.part").touch()
    prepare_folder(folder, resume=False)
    assert list(folder.iterdir()) == []
    (folder / "last.pth").touch()
    with pytest.raises(ValueError, match="has a training in it"):
        prepare_folder(folder, resume=False)
    prepare_folder(folder, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        prepare_folder(tmp_path / "file" / "run", resume=False)


# ---------------------------------------------------------------------------------------------------------- tables


def test_a_table_is_cut_where_the_training_goes_on(tmp_path):
    path = tmp_path / "log.csv"
    table = Table(path, "step", None)
    for step in range(5):
        table.add({"step": step, "loss": step / 3})
    table.sync()
    table.close()
    whole = path.read_text()
    path.write_text(whole + "5,1.66")  # killed while it wrote a row
    table = Table(path, "step", 3)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
    for step in range(3, 5):
        table.add({"step": step, "loss": step / 3})
    table.close()
    assert path.read_text() == whole
    Table(path, "step", None).close()
    assert path.read_text() == ""


def test_progress_where_there_is_no_terminal(capsys):
    progress = Progress(2, 40, every=0.0)
    for step in range(2):
        progress.step(0, step, 2, 10, 0.5, 1e-3)
    progress.say("so far")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("epoch 1/2  step 1/2  loss 0.5000  lr 1.00e-03") and lines[2] == "so far"
    assert lines[0].endswith(" left") and "images/s" in lines[0]
    Progress(1, 1, wanted=False, every=0.0).step(0, 0, 1, 1, 0.1, 0.1)
    assert capsys.readouterr().err == ""


def test_durations():
    spans = [42, 190, 5 * 3600 + 120, 2 * 86400 + 3 * 3600]
    assert [duration(each) for each in spans] == ["42 s", "3 min 10 s", "5 h 02 min", "2 d 03 h"]


# ---------------------------------------------------------------------------------------------------------- seeds


def draws():
    return random.random(), np.random.random(), torch.rand(()).item()


def test_draws_depend_on_the_place_alone():
    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    seen = []
    for place in places:
        seed_step(*place)
        seen.append(draws())
        draws()
    for place, before in zip(places, seen, strict=True):
        seed_step(*place)
        assert draws() == before
    assert all(len({each[i] for each in seen}) == len(places) for i in range(3))
    seed_sample(0, 0, 0)
    assert draws() not in seen


def test_samples_are_seeded_by_epoch_and_index():
    class Draws(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, key):
            return (*key, *draws())

    samples = SeededSamples(Draws(), seed=0)
    size = (32, 32)
    first = [samples[0, (index, size)] for index in range(4)]
    assert [samples[0, (index, size)] for index in reversed(range(4))] == first[::-1]
    assert len({sample[2:] for sample in first + [samples[1, (index, size)] for index in range(4)]}) == 8
    assert SeededSamples(Draws(), seed=1)[0, (0, size)] != first[0]


def test_what_is_held_back():
    names = [f"photo{index}.jpg" for index in range(24)]
    chosen = held_back(names, 0.25)
    assert len(chosen) == 6 and chosen == held_back(names, 0.25)
    more = held_back([*names, "photo24.jpg", "photo25.jpg"], 0.25)
    assert len(chosen & more) >= 4
    assert held_back(names[:2], 0.01) and len(held_back(names[:2], 0.99)) == 1
    assert held_back(names[:1], 0.5) == frozenset() == held_back(names, 0)
    assert held_back(names, 1) == frozenset(range(24))
    with pytest.raises(ValueError, match="1.5; a number from 0 to 1"):
        held_back(names, 1.5)
