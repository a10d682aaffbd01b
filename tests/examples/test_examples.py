# SPDX-License-Identifier: Apache-2.0
"""Accelerated models in the training loops of examples/, each on a few images; and what those loops rely on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image

import mvit_kernels
from support import ROOT, TESTS, models
from support.examples import EXAMPLES, image_folder, load, run_here
from support.models import fast_calls

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "images")


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss['\"]?:? '?([0-9.]+)", printed)]


def assert_loads_into_a_plain_model(weights: dict, build=lambda: timm.create_model("mobilevit_xxs", num_classes=2)):
    """Strictly, with the logits of an accelerated model with the same weights."""
    plain, fast = build(), mvit_kernels.accelerate(build())
    for model in (plain, fast):
        model.load_state_dict(weights, strict=True)
    x = models.images(2, 64, 64)
    with torch.no_grad(), fast_calls() as calls:
        expected, ours = (models.output(model.eval()(x)) for model in (plain, fast))
    assert len(calls) == 3 and not mvit_kernels.report(plain).accelerated
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------- a plain loop


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """What was printed by a process with two ranks, and the folder in which they ran the plain loop."""
    target = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "support.two_ranks", str(target), str(folder)]
    # One thread: on a busy machine two are slower. No GPU: the test is the same everywhere.
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "COLUMNS": "120"}
    settings |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    return types.SimpleNamespace(printed=result.stdout, folder=target)


def test_plain_loop_in_two_processes(two_ranks):
    printed = (two_ranks.folder / "printed0").read_text()
    assert printed.count("3 of 3 MobileViT blocks accelerated") == 1
    assert len(losses(printed)) == 2 and all(map(math.isfinite, losses(printed)))
    assert (two_ranks.folder / "printed1").read_text() == ""  # the first rank alone tells
    saved = torch.load(two_ranks.folder / "model.pt", weights_only=True)
    assert saved["schedule"]["last_epoch"] == 4  # 8 images, 2 × 2 at a time, 2 epochs
    assert_loads_into_a_plain_model(saved["model"])
    assert_loads_into_a_plain_model(saved["ema"])


@pytest.fixture
def plain_loop(folder, tmp_path, monkeypatch, capsys):
    """Run the plain loop here; its names, its losses and the calls of the fast path."""

    def run(*arguments, counting=fast_calls):
        options = ["--size", 64, "--batch", 4, "--workers", 0, "--output", tmp_path / "model.pt", *arguments]
        with counting() as calls:
            names = run_here(monkeypatch, "plain_loop.py", folder, *options)
        return names, losses(capsys.readouterr().out), calls

    return run


def test_plain_loop_as_plain_pytorch(plain_loop):
    """The same losses with and without acceleration, and they fall."""
    _, ours, calls = plain_loop("--epochs", 6)
    assert len(calls) == 3 * 2 * 6
    _, plain, calls = plain_loop("--epochs", 6, "--plain")
    assert not calls
    torch.testing.assert_close(ours, plain, rtol=2e-3, atol=0)
    assert ours[-1] < ours[0] - 0.02


def test_plain_loop_recomputes_and_resumes(plain_loop, tmp_path):
    names, whole, calls = plain_loop("--epochs", 3, "--bf16", "--checkpointing")
    assert len(calls) == 2 * 3 * 2 * 3  # twice: forward, and again in backward
    assert len(mvit_kernels.report(names["ema"].module).accelerated) == 3
    _, _, calls = plain_loop("--epochs", 2, "--bf16")
    assert len(calls) == 3 * 2 * 2
    names, more, _ = plain_loop("--epochs", 3, "--bf16", "--resume", tmp_path / "model.pt")
    assert len(more) == 1 and math.isfinite(more[0]) and names["schedule"].last_epoch == 6


def test_plain_loop_compiled(plain_loop):
    """The whole network is one graph over all steps: acceleration breaks none, and none is compiled anew."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    _, found, _ = plain_loop("--epochs", 1, "--compile", "eager", counting=contextlib.nullcontext)
    torch._dynamo.reset()
    assert math.isfinite(found[0]) and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------------------------------------- Hugging Face's Trainer


def _from_folder(path):
    from transformers import MobileViTForImageClassification

    return MobileViTForImageClassification.from_pretrained(path)


def test_huggingface_trainer(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = ["--size", 64, "--batch", 3, "--epochs", 2, "--workers", 0, "--output", tmp_path / "out", "--bf16"]
    run_here(monkeypatch, "huggingface_trainer.py", folder, *options)
    printed = capsys.readouterr().out
    assert "3 of 3 MobileViT blocks accelerated" in printed
    assert len(losses(printed)) >= 4 and all(map(math.isfinite, losses(printed)))
    assert re.search(r"accuracy [01]\.\d{3}\n", printed)
    best = _from_folder(tmp_path / "out" / "best")
    assert best.config.id2label == {0: "blue", 1: "red"}
    assert_loads_into_a_plain_model(best.state_dict(), lambda: type(best)(best.config))
    other = mvit_kernels.MobileViT("xxs", num_classes=2)
    mvit_kernels.load_checkpoint(other, tmp_path / "out" / "best" / "model.safetensors")
    x = models.images(2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), best.eval()(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_huggingface_trainer_recomputes_and_resumes(folder, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = ["--size", 64, "--batch", 3, "--workers", 0, "--output", tmp_path, "--checkpointing"]
    with fast_calls() as calls:
        run_here(monkeypatch, "huggingface_trainer.py", folder, "--epochs", 1, *options)
    steps, evaluations = 2, 2
    assert len(calls) == 3 * (2 * steps + evaluations)
    with fast_calls() as calls:
        run_here(monkeypatch, "huggingface_trainer.py", folder, "--epochs", 2, "--resume", *options)
    assert len(calls) == 3 * (2 * steps + evaluations)  # one epoch more, not two


# ----------------------------------------------------------------------------------------------------------- Lightning


def test_lightning_module(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    options = ["--size", 64, "--batch", 3, "--workers", 0, "--output", tmp_path, "--precision", "bf16-mixed"]
    run_here(monkeypatch, "lightning_module.py", folder, "--epochs", 1, *options)
    printed = capsys.readouterr().out
    assert "3 of 3 MobileViT blocks accelerated" in printed
    assert math.isfinite(losses(printed)[-1])

    options += ["--checkpointing", "--resume", tmp_path / "last.ckpt"]
    with fast_calls() as calls:
        names = run_here(monkeypatch, "lightning_module.py", folder, "--epochs", 2, *options)
    steps, evaluations = 2, 1 + 1  # one of Lightning's own, before training
    assert len(calls) == 3 * (2 * steps + evaluations)

    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    assert_loads_into_a_plain_model(weights)
    plain = mvit_kernels.load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=2), tmp_path / "last.ckpt")
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    again = names["Classifier"].load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert len(mvit_kernels.report(again).accelerated) == 3


# ------------------------------------------------------------------------- a timm model, serving it, and fine-tuning it


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a classifier of three classes, with our model's keys."""
    torch.manual_seed(1)
    path = tmp_path / "pretrained.pth"
    torch.save(mvit_kernels.MobileViT("xxs", num_classes=3).state_dict(), path)
    return path


def test_timm_model(checkpoint, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--classes", 3, "--size", 64, "--rounds", 2]
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "timm_model.py", *options)
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "3 of 3 MobileViT blocks accelerated" in printed
    assert printed.count("output ") == 2 and printed.count(" ok") == 2 * 4
    assert re.findall(r"^(\S+) +[0-9.]+ ms +[0-9.]+ × as fast as eager$", printed, flags=re.MULTILINE) == [
        "eager",
        "channels-last",
        "accelerated",
        "frozen",
    ]


def test_timm_model_tells_when_a_number_is_wrong(monkeypatch, capsys):
    right = mvit_kernels.verify

    def verify(model, images, reference=None):
        return right(model, images) if reference is None else types.SimpleNamespace(ok=False)

    monkeypatch.setattr(mvit_kernels, "verify", verify)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "timm_model.py", "--size", 64, "--rounds", 1)
    assert ended.value.code == 1


def test_serving(monkeypatch, capsys):
    threads = torch.get_num_threads()
    options = ["--size", 64, "--classes", 3, "--workers", 2, "--threads", 1, "--clients", 3, "--requests", 12]
    try:
        run_here(monkeypatch, "serve.py", *options)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "12 answers to 3 clients" in printed
    p50, p90, p99 = (float(ms) for ms in re.search(r"median (.+) ms, p90 (.+) ms, p99 (.+) ms", printed).groups())
    assert 0 < p50 <= p90 <= p99


def test_serving_over_http(folder, checkpoint):
    """The frozen model's classes of a photo; what is no photo is told, and the server goes on."""
    names = load("serve")
    model = mvit_kernels.load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=3), checkpoint)
    service = names.Service(model, 64, torch.float32, workers=2, threads=torch.get_num_threads())
    assert [len(seconds) for seconds in service.warm_up] == [5, 5]
    photo = next(folder.glob("red/*.png"))
    with names.server(service, 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        for body, expected in ((b"no photo", "cannot identify"), (b"", "send a photo")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url, body, timeout=60)
            assert refused.value.code == 400 and expected in json.load(refused.value)["error"]
        with urllib.request.urlopen(url, photo.read_bytes(), timeout=60) as answer:
            found = json.load(answer)
        running.shutdown()
        thread.join()
    with torch.no_grad():
        image = service.transform(Image.open(photo).convert("RGB")).unsqueeze(0)
        expected = mvit_kernels.restore(model.eval())(image)[0].softmax(0)
    assert [one["class"] for one in found] == expected.argsort(descending=True).tolist()
    assert [one["probability"] for one in found] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-4)


def test_finetuning(folder, checkpoint, tmp_path, monkeypatch, capsys):
    """The pretrained weights are taken without their classifier, the loss falls, and what is saved is timm's."""
    options = ["--checkpoint", checkpoint, "--size", 64, "--batch", 3, "--epochs", 2, "--output", tmp_path / "new.pth"]
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "finetune.py", folder, *options, "--lr", 0)
    untouched = torch.load(tmp_path / "new.pth", weights_only=True)
    pretrained = mvit_kernels.load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=3), checkpoint)
    for name, value in pretrained.named_parameters():
        assert name.startswith("head.") or torch.equal(untouched["state_dict"][name], value), name
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "finetune.py", folder, *options, "--bf16")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.count("3 of 3 MobileViT blocks accelerated") == 2
    assert len(losses(printed)) == 4 and losses(printed)[-1] < losses(printed)[0]
    assert re.search(r"frozen: accuracy [01]\.\d{3}", printed)
    saved = torch.load(tmp_path / "new.pth", weights_only=True)
    assert saved["classes"] == ["blue", "red"]
    assert_loads_into_a_plain_model(saved["state_dict"])


def test_finetuning_without_photos(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "finetune.py", "--size", 64, "--epochs", 1, "--output", tmp_path / "new.pth")
    assert ended.value.code == 0 and len(losses(capsys.readouterr().out)) == 1


# ------------------------------------------------------------------------------------------------------- all of them


def test_the_list_of_examples_is_whole():
    links = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())
    assert all((EXAMPLES / link).exists() for link in links)
    listed = {link for link in links if "/" not in link}
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_needs_no_data(script, monkeypatch, capsys):
    """Here, where their libraries are loaded already."""
    for library in re.findall(
        r"^(?:import|from) (lightning|transformers)", (EXAMPLES / script).read_text(), re.MULTILINE
    ):
        pytest.importorskip(library)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, script, "--help")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- what all of these loops rely on


def test_two_processes_get_the_mean_of_plain_gradients(two_ranks):
    assert two_ranks.printed.split() == ["timm", "huggingface", "own"]


@pytest.mark.parametrize("library", ["timm", "huggingface", "own"])
def test_a_compiled_block_trains_as_one_graph(library):
    """`fullgraph=True` raises at a graph break; gradients are those of the block as it is."""
    block = models.blocks(models.accelerated(models.build(library)))[0].double().train()
    x = torch.randn(2, 24 if library == "huggingface" else 48, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    results = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = call(x)
        y.square().mean().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    torch._dynamo.reset()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
