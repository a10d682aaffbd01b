# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels demo`` on a small model, and the statistics that it gives batch norms."""

import csv

import torch

import mvit_kernels
from mvit_kernels.bench import demo
from mvit_kernels.bench.comparison import compare
from support import models


def test_demo_on_a_small_model(tmp_path, run):
    command = f"demo --model own/xxs --size 64 --batch 1 --budget 1 --output {tmp_path}"
    result = run(*command.split())
    assert result.code == 0, result.err
    output = result.out
    for words in ("3 of 3 MobileViT blocks accelerated", "stages.4.1", "output", "eager", "every error is allowed"):
        assert words in output
    rows = list(csv.DictReader((tmp_path / "demo.csv").open()))
    assert [row["candidate"] for row in rows] == list(demo.FORMS)
    assert rows[-1]["note"].startswith("skipped") and all(row["median_ms"] for row in rows[:-1])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_where_an_error_is_too_large(tmp_path, run, monkeypatch):
    def wrong(model):
        model = mvit_kernels.accelerate(model)
        model.classifier.bias.data += 1e-3
        return model

    monkeypatch.setattr(demo, "accelerate", wrong)
    monkeypatch.setattr(demo, "_measured", lambda *arguments: compare(arguments[1], ["eager"], seconds=0.1))
    result = run(*f"demo --model own/xxs --size 64 --batch 1 --budget 1 --output {tmp_path}".split())
    assert result.code == 1 and "TOO LARGE" in result.out


def test_calibration_gives_batch_norms_the_statistics_of_the_images():
    model = models.build("own", "xxs")
    images = torch.rand(3, 3, 64, 64)
    demo.calibrate(model, demo.views(images))
    with torch.no_grad():
        maps = model.stem.conv(torch.cat([images, images.flip(3), images.flip(2), images.flip(2, 3)]))
    norm = model.stem.norm
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1 and not norm.training and norm.num_batches_tracked == 4
