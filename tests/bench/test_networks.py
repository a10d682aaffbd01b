# SPDX-License-Identifier: Apache-2.0
"""Networks in the suites: their arithmetic, their rows, absent libraries, and the paper's protocol."""

import csv

import pytest
import torch

from mvit_kernels.__main__ import main
from mvit_kernels.bench import suites
from mvit_kernels.bench.peers import Subject, call_of, eager
from mvit_kernels.bench.suites import Suite, networks
from support import models
from support.suites import context

pytestmark = pytest.mark.usefixtures("quick_ceilings")


def test_work_of_a_network():
    """4.06 GFLOP an image for S at 256 px, and the bytes of its 5.6 million weights."""
    model = models.build("own", "s")
    work = networks.work_of(Subject(model, torch.rand(2, 3, 256, 256), torch.bfloat16))
    assert work.gflop == pytest.approx(2 * 4.06, rel=0.02)
    weights = sum(p.numel() for p in model.parameters())
    assert work.megabytes == pytest.approx(2 * (weights + 2 * 3 * 256 * 256) / 1e6)
    training = networks.work_of(Subject(model, torch.rand(2, 3, 256, 256), training=True))
    assert training.gflop == pytest.approx(3 * work.gflop)


def test_a_step_moves_no_weight():
    model = models.build("own", "xxs")
    subject = Subject(model, torch.rand(2, 3, 64, 64), training=True, step=True)
    form = eager(subject)
    before = {name: value.clone() for name, value in form.model.named_parameters()}
    optimizers = []
    original = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (optimizers.append(self), original(self)))
        call_of(form, subject)()
    assert len(optimizers) == 1 and subject.mode == "step"
    assert all(torch.equal(value, before[name]) for name, value in form.model.named_parameters())


def test_models_are_measured(tmp_path, monkeypatch, capsys):
    """A whole suite on the smallest network, from the command line; the machine's rates have rows of their own."""
    setting = networks.Setting("own/xxs", 64, 1, "float32")
    block = networks.Setting("own/xxs", 64, 1, "float32", stage=3)
    step = networks.Setting("own/xxs", 64, 2, "float32", training=True)
    cases = [networks._case(one, "cpu") for one in (setting, block, step)]
    monkeypatch.setitem(networks.CHEAP, "cpu", ("eager", "accelerated", "frozen"))
    monkeypatch.setattr(networks, "MEMORY_SECONDS", 1e9)
    monkeypatch.setitem(suites.SUITES, "models", Suite(lambda device: cases, 1.0, {"cpu": 0.1}, 1.0))
    assert main(f"bench --suite models --budget 5 --results {tmp_path}".split()) == 0
    lines = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [line["subject"] for line in lines[:4]] == ["machine"] * 4
    kinds = [(line["subject"], line["stage"], line["mode"], line["candidate"]) for line in lines[4:]]
    network = [("own/xxs", "", "inference", name) for name in ("eager", "accelerated", "frozen")]
    blocks = [("block", "xxs/3", "inference", name) for name in ("eager", "accelerated", "frozen")]
    assert kinds == [*network, *blocks, *(("own/xxs", "", "step", name) for name in ("eager", "accelerated"))]
    for line in lines[4:]:
        if line["subject"] == "own/xxs":
            images = 1e3 * float(line["batch"]) / float(line["median_ms"])
            assert float(line["images_per_s"]) == pytest.approx(images, rel=2e-3)
            assert float(line["percent_product"]) > 0
    assert "accelerated" in capsys.readouterr().out


def test_an_absent_library_is_listed_with_what_installs_it(monkeypatch):
    def absent(name, device):
        raise ImportError("kornia is not installed: pip install 'mvit_kernels[kornia]'")

    monkeypatch.setattr(networks, "load", absent)
    rows = networks.measure_setting(networks.Setting("kornia/s", 64, 1, "float32"), context())
    assert [one["note"] for one in rows] == ["absent: kornia is not installed: pip install 'mvit_kernels[kornia]'"]
    assert (rows[0]["subject"], rows[0]["median_ms"]) == ("kornia/s", "")


def test_the_papers_protocol(monkeypatch):
    """MobileNetV2 has none of our blocks and is the baseline of all ratios; each form runs as often as was asked."""
    networks_ = {"mobilenetv2_100": 64, "mobilevit_xxs": 64}

    def subject(name, device):
        model = models.build("timm", "xxs") if name == "mobilevit_xxs" else torch.nn.Conv2d(3, 4, 3).eval()
        return Subject(model, torch.rand(1, 3, networks_[name], networks_[name]))

    monkeypatch.setattr(networks, "_mobile_subject", subject)
    monkeypatch.setattr(networks, "MOBILE_NAMES", tuple(networks_))
    monkeypatch.setattr(networks, "MOBILE_RUNS", 4)
    monkeypatch.setitem(networks.CHEAP, "cpu", ("eager", "frozen"))
    monkeypatch.setattr(networks, "MOBILE_MORE", ("runtime",))
    monkeypatch.setattr(networks, "is_installed", lambda target: target == "ncnn")
    tight = context()
    tight.end = tight.clock() + 1  # no time for compiling
    rows = networks._measure_mobile(tight)
    assert [(one["subject"], one["candidate"]) for one in rows] == [
        ("mobilenetv2_100", "eager"),
        ("mobilenetv2_100", "ncnn"),
        ("mobilevit_xxs", "eager"),
        ("mobilevit_xxs", "frozen"),
        ("mobilevit_xxs", "runtime"),
        ("mobilevit_xxs", "ncnn"),
    ]
    base = rows[0]["median_ms"]
    for one in rows:
        assert one["samples"] == 4 and one["ratio"] == pytest.approx(base / one["median_ms"], rel=2e-3)
