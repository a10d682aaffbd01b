# SPDX-License-Identifier: Apache-2.0
"""Whole steps of the paper's recipe as a case of the training suite: what a step does, its gate, its cases."""

import copy
import csv

import pytest
import torch
from torch import nn

from mvit_kernels import MobileViT
from mvit_kernels.__main__ import main
from mvit_kernels.bench import peers, suites
from mvit_kernels.bench.comparison import compare
from mvit_kernels.bench.peers import Peer, Subject, call_of, eager
from mvit_kernels.bench.recipe import recipe_step
from mvit_kernels.bench.suites import Suite, networks

timm_utils = pytest.importorskip("timm.utils")


class Tiny(nn.Module):
    """A classifier with a batch norm and a dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(self.drop(torch.nn.functional.silu(self.norm(self.conv(images))).mean((2, 3))))


def tiny(batch: int = 4, dropout: float = 0.0, **options) -> Subject:
    images = torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    return Subject(Tiny(dropout).eval(), images, training=True, recipe=True, **options)


def test_a_step_is_the_papers_and_moves_no_weight(monkeypatch):
    stepped, averages = [], []
    step, update = torch.optim.AdamW.step, timm_utils.ModelEmaV3.update
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (stepped.append(self), step(self)))
    monkeypatch.setattr(timm_utils.ModelEmaV3, "update", lambda self, m: (averages.append(self), update(self, m)))
    model = Tiny().eval()
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model).train()
    images = tiny().images
    run = recipe_step(model, images)
    losses = [run() for _ in range(3)]
    labels = torch.randint(5, (4,), generator=torch.Generator().manual_seed(0))
    log_odds = twin(images).log_softmax(1)
    wanted = -0.9 * log_odds.gather(1, labels[:, None]).mean() - 0.1 * log_odds.mean(1).mean()
    torch.testing.assert_close(torch.stack(losses), wanted.detach().expand(3))
    wanted.backward()
    for mine, others in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, others.grad)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    (group,) = stepped[0].param_groups
    assert len(stepped) == 3 and (group["weight_decay"], len(group["params"])) == (0.01, 6)
    assert len(averages) == 3 and averages[0].decay == 1 - 5e-4 and averages[0].module is not model
    torch.testing.assert_close(averages[0].module.conv.weight, model.conv.weight)


def test_dropout_is_live_and_bfloat16_is_autocast():
    run = call_of(eager(tiny(dropout=0.5)), tiny(dropout=0.5))  # `eager` turned it off for the gate
    assert run() != run()
    form = eager(tiny(dtype=torch.bfloat16))
    seen = []
    form.model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert call_of(form, tiny(dtype=torch.bfloat16))().isfinite()
    assert seen == [torch.bfloat16] and form.model.conv.weight.dtype == torch.float32


def test_a_compiled_model_is_averaged_and_stepped_too():
    model = Tiny()
    run = recipe_step(torch.compile(model, backend="eager"), tiny().images)
    torch.testing.assert_close(run(), recipe_step(Tiny(), tiny().images)())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_checked_is_smaller_and_without_dropout():
    subject = tiny(batch=8, dropout=0.5)
    assert (subject.mode, subject.checked.mode) == ("recipe", "training")
    large = subject._replace(images=torch.zeros(1, 3, 256, 256).expand(512, -1, -1, -1))
    assert len(large.checked.images) == 64 and len(subject.checked.images) == 8
    enormous = subject._replace(images=torch.zeros(1, 1, 1, 1).expand(4, 3, 4096, 4096))
    assert len(enormous.checked.images) == 2  # a batch norm needs two
    assert tiny()._replace(recipe=False, step=True).mode == "step"


def test_candidates_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(peers, "CHECKED_PIXELS", 3 * 12 * 16)
    batches = []

    def watched(subject):
        form = eager(subject)
        form.model.register_forward_pre_hook(
            lambda module, inputs: batches.append((len(inputs[0]), module.drop.training))
        )
        return form

    monkeypatch.setitem(peers.PEERS, "accelerated", Peer("watched", watched, ours=True))
    results = compare(tiny(6, 0.3), ["channels_last", "accelerated"], seconds=0.05, warmup_seconds=0.0)
    assert [result.candidate for result in results] == ["eager", "channels_last", "accelerated"]
    assert all(result.row.ok and result.timing.count >= 3 for result in results), results
    assert batches[0] == (3, False) and set(batches[1:]) == {(6, True)}


def test_a_wrong_gradient_and_a_full_memory_are_noted(monkeypatch):
    class Wrong(Tiny):
        def forward(self, images):
            out = super().forward(images)
            return out + 1e-3 * (out - out.detach())  # the same values, other gradients

    def full(subject):
        form = eager(subject)

        def forward(images):
            if len(images) > 4:
                raise torch.OutOfMemoryError("out of memory, as on a small GPU")
            return Tiny.forward(form.model, images)

        form.model.forward = forward
        return form

    def wrong(subject):
        form = eager(subject)
        form.model.__class__ = Wrong
        return form

    monkeypatch.setattr(peers, "CHECKED_PIXELS", 4 * 12 * 16)
    monkeypatch.setitem(peers.PEERS, "accelerated", Peer("wrong", wrong, ours=True))
    monkeypatch.setitem(peers.PEERS, "compile", Peer("full", full))
    results = {r.candidate: r for r in compare(tiny(8), ["accelerated", "compile"], seconds=0.05, warmup_seconds=0.0)}
    assert results["eager"].timing is not None
    assert (
        results["accelerated"].timing is None and "not timed: the error of gradient of " in results["accelerated"].note
    )
    assert results["compile"].timing is None and results["compile"].note == "absent: out of memory, as on a small GPU"


def test_our_model_gets_the_papers_dropout():
    plain = MobileViT("xxs", num_classes=7)
    trained = networks._with_dropout(plain)
    assert trained.classifier_dropout == 0.1
    layers = [module for module in trained.modules() if type(module).__name__ == "TransformerLayer"]
    assert [layer.dropout.p for layer in layers] == [0.05] * 9
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trained(images), plain.eval()(images))
        drawn = [trained.train()(images) for _ in range(2)]
        assert not torch.equal(*drawn)
    other = Tiny()
    assert networks._with_dropout(other) is other


def test_on_a_gpu_the_cases_are_those_of_the_issue():
    found = networks.recipes("cuda")
    kinds = {(one.model, one.size, one.batch, one.compiled) for one in found}
    assert all(one.dtype == "bfloat16" and one.training and one.recipe for one in found)
    for compiled in (False, True):
        for model in ("own/xxs", "own/s"):
            assert {(model, 256, batch, compiled) for batch in (64, 128, 256, 512)} <= kinds
            scales = ((160, 327), (192, 227), (288, 101), (320, 81))
            assert {(model, *scale, compiled) for scale in scales} <= kinds
    assert not found[0].compiled and found[len(found) // 2 :] == [
        one._replace(compiled=True) for one in found[: len(found) // 2]
    ]


def test_the_suite_runs_a_recipe(tmp_path, monkeypatch, capsys):
    """From the command line, on the smallest network; and the dry run names it."""
    setting = networks.Setting("own/xxs", 64, 2, "float32", training=True, recipe=True)
    cases = [networks._case(setting, "cpu")]
    monkeypatch.setattr(networks, "MEMORY_SECONDS", 1e9)
    monkeypatch.setattr(networks, "work_of", lambda subject: networks.Work(1.0, 1.0))
    monkeypatch.setattr(suites._case.Context, "ceilings", lambda self, dtype: None)
    monkeypatch.setitem(suites.SUITES, "training", Suite(lambda device: cases, 1.0, {"cpu": 0.1}, 1.0))
    assert main("bench --suite training --dry-run".split()) == 0
    assert capsys.readouterr().out == "training: own/xxs, 64 px, batch 2, float32, whole recipe\n"
    assert main(f"bench --suite training --budget 5 --results {tmp_path}".split()) == 0
    lines = list(csv.DictReader((tmp_path / "training.csv").open()))
    assert [line["candidate"] for line in lines] == ["eager", "channels_last", "accelerated"]
    for line in lines:
        assert (line["subject"], line["mode"], line["size"], line["batch"]) == ("own/xxs", "recipe", "64", "2")
        assert float(line["images_per_s"]) == pytest.approx(2e3 / float(line["median_ms"]), rel=2e-3)
        assert float(line["error"]) <= float(line["allowed"])


def test_without_timm_the_row_says_what_installs_it(monkeypatch):
    def absent():
        raise ImportError("timm is not installed: pip install 'mvit_kernels[timm]'")

    monkeypatch.setattr(networks, "import_timm", absent)
    setting = networks.Setting("own/xxs", 64, 2, "float32", training=True, recipe=True)
    (line,) = networks.measure_setting(setting, suites._case.Context("cpu", "training", seconds=0.1))
    assert line["note"] == "absent: timm is not installed: pip install 'mvit_kernels[timm]'"
    assert line["mode"] == "recipe"
