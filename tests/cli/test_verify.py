# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels verify``: its table and files, and its exit code where a model is wrong or not accelerated."""

import csv
import json
import os

import pytest
import torch

from mvit_kernels import zoo
from mvit_kernels.adapters import _block
from mvit_kernels.cli import verify
from support import data
from support.models import blocks


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "own/xxs", "--size", "64"],
        ["--model", "own/xxs", "--size", "64", "--dtype", "bfloat16", "--backend", "reference"],
        ["--model", "mobilevit_xxs", "--size", "40x50", "--batch", "2", "--gradients"],
        ["--model", "huggingface/xxs", "--size", "64", "--frozen"],
        ["--model", "kornia/xxs", "--size", "64x128"],
    ],
    ids=" ".join,
)
def test_verify(run, tmp_path, arguments):
    result = run("verify", *arguments, "--output", tmp_path / "a.csv", "--output", tmp_path / "a.json")
    assert (result.code, result.err) == (0, "")
    served = "swapped, none of them served by a kernel" if "reference" in arguments else "accelerated"
    assert f"3 of 3 MobileViT blocks {served}\n" in result.out
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["ok"] is True and len(data["rows"]) >= 4
    assert any("gradient" in row["name"] for row in data["rows"]) == ("--gradients" in arguments)
    for row in data["rows"]:
        assert row["ok"] and 0 <= row["error"] <= row["allowed"] and row["name"] in result.out
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == [row["error"] for row in data["rows"]]
    assert {row["model"] for row in rows} == {arguments[1]}
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"]


def test_verify_where_nothing_is_accelerated(run, monkeypatch):
    def hooked(args):
        model = zoo.load("own/xxs")
        for block in blocks(model):
            block.norm.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(verify, "load_model", hooked)
    result = run("verify", "--model", "own/xxs", "--size", "64")
    assert result.code == 1 and "0 of 3 MobileViT blocks accelerated" in result.err and not result.out
    assert "nothing is accelerated in this model" in result.err and "norm carries a hook" in result.err


def test_verify_finds_an_error(run, monkeypatch, tmp_path):
    right = _block.transformer_on_map
    monkeypatch.setattr(_block, "transformer_on_map", lambda *args, **kwargs: right(*args, **kwargs) * 1.0001)
    result = run("verify", "--model", "own/xxs", "--size", "64", "--json", "--output", tmp_path / "a.json")
    assert result.code == 1
    data = json.loads(result.out)  # nothing else is printed
    assert data == json.loads((tmp_path / "a.json").read_text())
    assert data["ok"] is False and not all(row["ok"] for row in data["rows"])


def test_verify_on_photos(run):
    photos = sorted(data.data_path("land_use", "photos").glob("*.png"))[:2]
    result = run("verify", "--checkpoint", data.land_use_checkpoint(), "--size", "64", "--image", *photos)
    assert result.code == 0


def test_threads(run):
    assert run("verify", "--model", "own/xxs", "--size", "64", "--threads", "2").code == 0
    assert torch.get_num_threads() == 2
