# SPDX-License-Identifier: Apache-2.0
"""The command line, run as its users run it: help, exit codes, errors, and the files that it writes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mvit_kernels import __version__, cli
from mvit_kernels.__main__ import main


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
