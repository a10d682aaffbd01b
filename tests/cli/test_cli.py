# SPDX-License-Identifier: Apache-2.0
"""The command line, run as its users run it: what it prints and writes, its exit codes, its errors."""

import csv
import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mvit_kernels import __version__, backends, cli, zoo
from mvit_kernels.__main__ import main
from mvit_kernels._utils.third_party import import_transformers
from mvit_kernels.adapters import _block
from mvit_kernels.backends import library
from mvit_kernels.cli import info, verify
from support import data
from support.models import blocks

# ---------------------------------------------------------------------------------------------------- the whole


def test_help_of_every_command_comes_without_torch():
    script = f"""
import contextlib, io, sys
from mvit_kernels.__main__ import main
for command in {[[], *([name] for name in cli.COMMANDS)]}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert f"usage: {{' '.join(['mvit-kernels', *command])}} " in text.getvalue(), command
    assert "examples:" in text.getvalue(), command
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "mvit_kernels", "verify", "--model", "own/xxs", "--size", "31"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("mvit-kernels: error: argument --size: '31'")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"mvit-kernels {__version__}\n"


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "mvit_kernels", "info"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that the last flush meets the closed pipe
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "COMMAND"),
        (["verfy"], "invalid choice: 'verfy'"),
        (["verify", "--what"], "unrecognized arguments: --what"),
        (["verify", "--size", "ten"], "--size: 'ten' is not a size"),
        (["verify", "--size", "64x64x64"], "--size: '64x64x64' is not a size"),
        (["verify", "--batch", "0"], "--batch: '0' is not a whole number"),
        (["verify", "--threads", "-1"], "--threads"),
        (["verify", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["verify", "--backend", "gpu"], "--backend: invalid choice: 'gpu'"),
        (["verify", "--output", "/no/such/folder/x.csv"], "the folder /no/such/folder does not exist"),
        (["verify", "--output", "/"], "/ is a folder; name a file in it"),
        (["verify", "--output", ""], ". is a folder; name a file in it"),
        (["profile", "--output", "a.txt"], "'a.txt' ends neither in .csv nor in .json"),
        (["verify", "--json", "a.json"], "unrecognized arguments: a.json"),
        (["verify", "--device", "abacus"], "--device: abacus: unknown or unsupported device; give cpu, cuda or cuda:N"),
        (["verify", "--device", "auto"], "--device auto: unknown or unsupported device"),
        *(
            ([*command, "--device", device], f"argument --device: {device}: unknown or unsupported device")
            for command, device in (
                *((["bench"], "meta"), (["profile"], "mps"), (["demo"], "meta"), (["train", "photos"], "xpu")),
                (["evaluate", "photos", "--checkpoint", "a.pth"], "meta"),
                *(([name, "a.jpg", "--checkpoint", "a.pth"], "meta") for name in ("classify", "detect", "segment")),
            )
        ),
        (["verify", "--size", "10000000"], "--size or --batch"),
        (["verify", "--batch", str(2**31 - 1)], "take 1.69e+06 GB, and this machine has"),
        (["verify", "--batch", str(2**31)], "is not a whole number of 1 or more"),
        *(
            ([*command, "--threads", "100000"], "100000 threads are too many for ")
            for command in (
                *(["verify"], ["bench"], ["profile"], ["demo"], ["train", "photos"]),
                ["evaluate", "photos", "--checkpoint", "a.pth"],
                *([name, "a.jpg", "--checkpoint", "a.pth"] for name in ("classify", "detect", "segment")),
            )
        ),
        (["verify", "--model", ""], "there is no model of this name"),
        (["verify", "--model", "timm/"], "--model timm/: there is no model"),
        (["bench", "--peers", ","], "--peers names no candidate"),
        (["bench", "--peers", ""], "--peers names no candidate"),
        (["bench", "--suite", ""], "--suite: '' names nothing"),
        (["bench", "--suite", "operators", "--results", __file__], "results cannot be written there: File exists"),
        (["bench", "--suite", "operators", "--results", "/proc"], "operators.csv: results cannot be written there"),
        (["profile", "--peers", ","], "--peers names no form"),
        (["verify", "--model", "own/xl"], "did you mean own/xs or own/xxs"),
        (["verify", "--model", "mobilvit_xs"], "did you mean mobilevit_xs"),
        (["verify", "--model", "mobilevit_xs.nowhere"], "nowhere"),
        (["verify", "--model", "appel/mobilevit-small"], "did you mean apple/mobilevit-small"),
        (["verify", "--model", "huggingface/l"], "did you mean huggingface/s"),
        (["verify", "--model", "quite_different"], "known are own/xxs, "),
        (["verify", "--model", "resnet18"], "no MobileViT block found"),
        (["verify", "--model", "mobilevitv2_050"], "its 3 MobileVitV2Block belong to MobileViTv2"),
        (["verify", "--model", "own/s", "--pretrained"], "no weights are published for own/s"),
        (["verify", "--model", "kornia/xs", "--size", "96"], "multiples of 64"),
        (["verify", "--checkpoint", "nowhere.pth"], "no file nowhere.pth"),
        (["verify", "--checkpoint", __file__], "test_cli.py is a text file"),
        (["verify", "--checkpoint", "a.pth", "--pretrained"], "exclude each other"),
        (["verify", "--image", "nowhere.jpg"], "there is no image nowhere.jpg"),
        (["verify", "--frozen", "--gradients"], "exclude each other"),
        (["classify", "cat.jpg"], "give --checkpoint FILE"),
        (["classify", "--checkpoint", "a.pth"], "PHOTO"),
        (["classify", "cat.jpg", "--checkpoint", "a.pth", "--mean", "1,2"], "'1,2' are not three numbers"),
        (["classify", "cat.jpg", "--checkpoint", "a.pth", "--size", "10000000"], "--size or fewer images"),
        (["classify", "nowhere.jpg", "--checkpoint", "a.pth"], "there is no image nowhere.jpg"),
        (["classify", "nowhere.jpg", "--checkpoint", "a.pth", "--labels", "none.txt"], "none.txt: No such file"),
    ],
)
def test_mistakes_get_one_sentence(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_reported(refused):
    for device in ("cuda", "cuda:7"):
        assert f"--device: {device}: PyTorch sees no NVIDIA GPU" in refused("classify", "a.jpg", "--device", device)
    assert "cannot run here" in refused("verify", "--model", "own/xxs", "--backend", "triton")


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="own/xl"):
        main(["verify", "--model", "own/xl", "--debug"])
    monkeypatch.setenv("MVIT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="own/xl"):
        main(["verify", "--model", "own/xl"])


# --------------------------------------------------------------------------------------------------------- info


def test_info(run):
    text = run("info").out
    data = json.loads(run("info", "--json").out)
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["torch_threads"] == torch.get_num_threads()
    assert list(data["backends"]) == list(library.BACKENDS)
    assert data["backends"]["reference"]["reasons_against"] == []
    assert "patch_attention" in data["backends"]["reference"]["operators"]
    lines = text.split("\nbackends\n")[1].splitlines()
    for name, backend in data["backends"].items():
        line = next(line for line in lines if line.startswith(f"  {name:<13} "))
        assert ("not available: " in line) == bool(backend["reasons_against"])
        assert all(reason in line for reason in backend["reasons_against"])
        if backend["reasons_against"] == []:
            assert all(operator in line for operator in backend["operators"])


def test_info_tells_what_is_missing(run, monkeypatch):
    version = importlib.metadata.version

    def without_kornia(name):
        if name == "kornia":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_kornia)
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [f"{name} wants a {device_type}", "rest"])
    text = run("info").out
    assert "  kornia        not installed\n" in text
    assert "  triton        not available: triton wants a cuda; rest\n" in text


def test_info_ends_with_what_to_do(run, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [])
    assert run("info").out.splitlines()[-2:] == [
        "what to do",
        "  nothing, kernels serve this machine; mvit-kernels verify and mvit-kernels bench show it",
    ]
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [f"run `make {name}`"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # then nothing is said about what only a GPU needs
    assert run("info").out.endswith("what to do\n  no kernel serves the CPU: run `make cpu`\n")
    assert json.loads(run("info", "--json").out)["advice"] == ["no kernel serves the CPU: run `make cpu`"]
    monkeypatch.setattr(info, "_gpus", lambda: [{}])
    assert info.gather()["advice"][1:] == [
        "no kernel serves a GPU: run `make cuda`",
        "no kernel serves a GPU: run `make triton`",
    ]
    served = {"cpu": [], "cuda": ["no"], "triton": [], "reference": []}
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: served[name])
    assert info.gather()["advice"] == []


def test_info_without_a_library_names_the_command(run, monkeypatch, tmp_path):
    """Nobody is told to run what runs."""
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    (tmp_path / "build_info.json").write_text(
        json.dumps({"cpu": {"built": False, "reason": "no torch: `pip install`"}})
    )
    text = run("info").out
    assert "mvit-kernels info" not in text
    command = "python setup.py build_native --inplace`"
    assert "libmvit_kernels_cpu.so was not built (no torch); " in text and text.rstrip().endswith(command.split()[-1])
    assert "not built: no torch: `pip install`" in text


def test_info_about_a_wrong_instruction_set():
    environment = {**os.environ, "MVIT_KERNELS_CPU_ISA": "sse"}
    command = [sys.executable, "-m", "mvit_kernels", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    told = json.loads(done.stdout)
    (reason,) = told["backends"]["cpu"]["reasons_against"]
    assert "MVIT_KERNELS_CPU_ISA is 'sse'; choose one of " in reason and "avx2" in reason
    assert told["machine"]["kernels_instruction_set"] == ""
    assert told["advice"] == [f"no kernel serves the CPU: {reason}"]


@pytest.mark.parametrize(
    "build_info, line",
    [
        (
            {"cpu": {"built": True, "time": "2025", "compiler": "g++ 12", "isa": ["avx2"]}},
            "built 2025 by g++ 12 for avx2",
        ),
        (
            {"cpu": {"built": True, "isa": ["amx"], "version": "0.1.0", "commit": "0123abcd+"}},
            "for amx, sources of 0.1.0 0123abcd+",
        ),
        ({"cpu": {"built": True, "isa": [], "isa_left_out": ["avx2"]}}, "baseline only; the compiler has no avx2"),
        ({"cuda": {"built": True, "compiler": "nvcc 13", "architectures": ["sm_80"]}}, "by nvcc 13 for sm_80"),
        ({"cpu": {"built": False, "reason": "no compiler"}}, "not built: no compiler"),
        ("{half", "is damaged"),
        (None, "does not exist"),
    ],
)
def test_info_about_the_build(run, monkeypatch, tmp_path, build_info, line):
    if build_info is not None:
        text = build_info if isinstance(build_info, str) else json.dumps(build_info)
        (tmp_path / "build_info.json").write_text(text)
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    assert line in run("info").out.split("compiled libraries\n")[1].split("what to do\n")[0]


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "name",
    [
        *("own/xxs", "timm/mobilevit_xxs", "huggingface/xxs", "kornia/xxs"),
        *("deeplabv3/xxs", "apple/deeplabv3-mobilevit-xx-small"),
    ],
)
def test_models_without_weights_are_alive_and_always_the_same(name):
    state = torch.random.get_rng_state()
    model, again = zoo.load(name), zoo.load(name)
    assert torch.equal(state, torch.random.get_rng_state())
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, same = zoo.logits(model(x)), zoo.logits(again(x))
    assert torch.equal(y, same) and y.std() > 0.1 and (y[0] - y[1]).abs().max() > 0.1
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not any(norm.training or norm.momentum == 1.0 for norm in norms)
    # So that each norm folds into something: none of these statistics and weights is that of a fresh norm.
    assert all(norm.running_mean.std() > 0 and norm.running_var.std() > 0 and norm.weight.std() > 0 for norm in norms)


@pytest.mark.parametrize(
    "name, num_classes, shape",
    [
        ("xxs", None, (1, 1000)),
        ("own/xs", 7, (1, 7)),
        ("mobilevit_xxs.cvnets_in1k", 7, (1, 7)),
        ("mvit_kernels_mobilevit_xxs", 7, (1, 7)),
        ("apple/mobilevit-xx-small", 7, (1, 7)),
        ("huggingface/xs", 0, (1, 384, 2, 2)),
        ("kornia/xxs", None, (1, 320, 2, 2)),
        ("deeplabv3/xs", None, (1, 21, 4, 4)),
        ("deeplabv3/xxs", 4, (1, 4, 4, 4)),
        ("apple/deeplabv3-mobilevit-x-small", None, (1, 21, 4, 4)),
        ("apple/deeplabv3-mobilevit-small", 4, (1, 4, 4, 4)),
    ],
)
def test_names(name, num_classes, shape):
    model = zoo.load(name, num_classes=num_classes)
    with torch.no_grad():
        assert zoo.logits(model(torch.rand(1, 3, 64, 64))).shape == shape


def test_checkpoint_decides_variant_and_classes(weights):
    model = zoo.load(None, checkpoint=weights)
    assert (model.mode, model.num_classes) == ("xxs", 5)
    with pytest.raises(ValueError, match="XXS"):
        zoo.load("own/s", checkpoint=weights)


@pytest.mark.parametrize("name", [None, "deeplabv3/xxs", "apple/deeplabv3-mobilevit-xx-small"])
def test_checkpoint_decides_the_task(tmp_path, weights, name):
    trained = zoo.load("deeplabv3/xxs", num_classes=4)
    torch.save(trained.state_dict(), tmp_path / "segmentation.pth")
    model = zoo.load(name, checkpoint=tmp_path / "segmentation.pth")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(x)
        assert (zoo.logits(model(x)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="of DeepLabv3 for segmentation, has no"):
        zoo.load("own/xxs", checkpoint=tmp_path / "segmentation.pth")
    with pytest.raises(ValueError, match=r"has no .*load_checkpoint\(model\.(backbone|mobilevit), "):
        zoo.load(name or "deeplabv3/xxs", checkpoint=weights)


def test_segmentation_without_classes():
    for name in ("deeplabv3/xxs", "apple/deeplabv3-mobilevit-small"):
        with pytest.raises(ValueError, match="class"):
            zoo.load(name, num_classes=0)


def test_kornia_loads_its_own_checkpoints_only(tmp_path, weights):
    model = zoo.load("kornia/xxs")
    with torch.no_grad():
        model.conv1[0].weight.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "kornia.pth")
    loaded = zoo.load("kornia/xxs", checkpoint=tmp_path / "kornia.pth")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="do not fit kornia/xs"):
        zoo.load("kornia/xs", checkpoint=tmp_path / "kornia.pth")
    for name, checkpoint in (("own/xxs", tmp_path / "kornia.pth"), ("kornia/xxs", weights)):
        with pytest.raises(ValueError, match="Kornia"):
            zoo.load(name, checkpoint=checkpoint)


def test_pretrained_from_a_folder(tmp_path):
    zoo.load("huggingface/xxs", num_classes=3).save_pretrained(tmp_path)
    model = zoo.load(str(tmp_path), pretrained=True)
    expected = zoo.load("huggingface/xxs", num_classes=3)
    assert not model.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize("name", ["apple/mobilevit-small", "mobilevit_s"])
def test_weights_that_cannot_be_fetched(refused, monkeypatch, tmp_path, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    import_transformers()
    assert f"the weights of {name} could not be fetched" in refused("verify", "--model", name, "--pretrained")


def test_logits_takes_what_models_return():
    value = torch.rand(2, 3)
    for output in (
        value,
        (value, None),
        [value],
        SimpleNamespace(logits=value),
        SimpleNamespace(last_hidden_state=value),
    ):
        assert zoo.logits(output) is value
    for output in ((), {"x": value}, None):
        with pytest.raises(TypeError, match="contains no tensor"):
            zoo.logits(output)


# ------------------------------------------------------------------------------------------------------- verify


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


# ----------------------------------------------------------------------------------------------- files written


def test_an_error_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full.*a.csv"):
        patch.setattr(os, "replace", fail)
        cli.write_csv(path, [{"a": 1}])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.csv"]
    cli.write_csv(path, [{"a": 1, "b": "x,y"}])
    assert path.read_text() == 'a,b\n1,"x,y"\n'


def test_links_and_devices_stay_what_they_are(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    cli.write_json(link, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert link.is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": None, "b": [1.5, None]}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cli.write_json(pipe, [1])
    assert os.read(reader, 100) == b"[\n  1\n]\n" and pipe.is_fifo()
    os.close(reader)
