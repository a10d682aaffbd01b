# SPDX-License-Identifier: Apache-2.0
"""Label files in every form in circulation, and how their contents are printed."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from mvit_kernels import cli
from mvit_kernels.__main__ import main
from mvit_kernels.cli.labels import read_labels
from mvit_kernels.nn import MobileViT

TWO = {
    "index to name": '{"0": "a", "1": "b"}',
    "in any order": '{"1": "b", "0": "a"}',
    "list": ' ["a", "b"]',
    "one a line": "a\nb\n",
    "CRLF": "a\r\nb\r\n",
    "CR": "a\rb\r",
    "blank lines at the end": "a\nb\n\n\r\n  \n",
    "BOM and text": "\ufeffa\nb\n",
    "BOM and JSON": '\ufeff["a", "b"]',
    "Keras": '{"0": ["n01440764", "a"], "1": ["n01443537", "b"]}',
    "list of Keras": '[["n01440764", "a"], ["n01443537", "b"]]',
    "Hugging Face": '{"architectures": ["X"], "num_labels": 2, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0}}',
    "timm": '{"num_classes": 2, "label_names": ["n1", "n2"], "label_descriptions": {"n1": "a", "n2": "b"}}',
    "timm without descriptions": '{"architecture": "x", "label_names": ["a", "b"]}',
    "torchvision": '{"a": 0, "b": 1}',
    "torchvision, inside": '{"class_to_idx": {"b": 1, "a": 0}}',
    "classes": '{"date": "today", "classes": ["a", "b"]}',
    "COCO": '{"categories": [{"id": 1, "name": "b"}, {"id": 0, "name": "a"}]}',
    "objects without index": '[{"name": "a"}, {"name": "b"}]',
    "Python": "{0: 'a',\n 1: 'b'}",
    "numbered lines": "0 a\n1 b",
    "numbered lines in any order": "1: b\n0: a",
    "tabs": "0\ta\n1\tb\n",
}
TABLES = {
    "one column": "a\nb\n",
    "index and name": "0,a\n1,b\n",
    "name and index": "a,0\nb,1\n",
    "with headings": "name,id\nb,1\na,0\n",
    "headings in capitals, and more columns": "Index,Super,Label\n0,x,a\n1,y,b\n",
    "a heading of one": "label\na\nb\n",
    "quoted": '"0","a"\r\n"1","b"\r\n',
}


@pytest.mark.parametrize("case", TWO)
def test_labels(case, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(TWO[case].encode())
    assert read_labels(path) == {0: "a", 1: "b"}


@pytest.mark.parametrize("case", TABLES)
def test_labels_in_tables(case, tmp_path):
    path = tmp_path / "file.csv"
    path.write_bytes(TABLES[case].encode())
    assert read_labels(path) == {0: "a", 1: "b"}
    (tmp_path / "file.tsv").write_bytes(TABLES[case].replace(",", "\t").encode())
    assert read_labels(tmp_path / "file.tsv") == {0: "a", 1: "b"}


def test_labels_keep_their_letters(tmp_path):
    names = ["tench, Tinca tinca", "猫", "2 of hearts", "a\u2028b"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "file").write_bytes("\n".join(names).encode(encoding))
        assert list(read_labels(tmp_path / "file").values()) == names
    (tmp_path / "digits").write_text("1\n2\n3\n")  # none of which is the index of its line
    assert list(read_labels(tmp_path / "digits").values()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "has no labels in it"),
        (b"\n\n", "has no labels in it"),
        (b"[]", "has no labels in it"),
        (b"{", "is not valid JSON"),
        (b'{"a": "b"}', "among its keys is 'a'"),
        (b'{"0": "a", "2": "b"}', r"its keys begin \[0, 2\]"),
        (b'{"0": "a", "00": "b"}', "has the index 0 twice"),
        (b'{"a": 0, "b": 0}', "has the index 0 twice"),
        (b'{"a": true, "b": false}', "has True instead of a label"),
        (b"[1, 2]", "has 1 instead of a label"),
        (b'["a", null]', "has None instead of a label"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"\xe9t\xe9\n", "not UTF-8 text"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"__import__('os').system('true')\n\n[", "line 2 is empty"),
        (b"{__import__('os'): 'a'}", "is not valid JSON"),
    ],
)
def test_labels_that_are_none(data, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(path)
    assert str(path) in str(caught.value)


def test_tables_that_are_none(tmp_path):
    for name, text, message in (
        ("a.csv", "x,y\nz,w\n", "2 columns, and none is called name"),
        ("b.csv", "0,a\n1\n", "rows of different lengths"),
        ("c.yaml", "names:\n  0: a\n", "is YAML"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / name)


# -- output encodings that lack letters


@pytest.fixture
def printed(monkeypatch):
    """Run a command whose output has this encoding: its exit code, stdout and stderr."""

    def printed(encoding, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as end:  # of --help
                code = end.code
        for stream in streams:
            stream.flush()
        return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return printed


NAMES = ["猫", "été", "😀", "Größe", "plain"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_classify_prints_in_every_encoding(encoding, printed, weights, photo, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    strange = os.fsencode(photo) + b"\xff\xe9.png"  # a name that is valid in no encoding
    os.rename(photo, strange)
    command = ["classify", os.fsdecode(strange), "--checkpoint", weights, "--labels", tmp_path / "names.json"]
    code, text, errors = printed(encoding, *command, "--size", "64")
    assert (code, errors) == (0, "")
    shown = [name.encode(encoding, "backslashreplace").decode(encoding) for name in NAMES]
    assert sorted(line.split("  ")[-1] for line in text.splitlines()[1:]) == sorted(shown)
    code, text, errors = printed(encoding, *command, "--size", "64", "--json")
    assert (code, errors) == (0, "")
    (result,) = json.loads(text)
    assert {each["label"] for each in result["predictions"]} == set(NAMES)
    assert os.fsencode(result["image"]) == strange


@pytest.mark.parametrize(
    "arguments",
    [
        *([name, "--help"] for name in cli.COMMANDS),
        ["--help"],
        ["info"],
        ["info", "--json"],
        ["verify", "--model", "own/xxs", "--size", "64", "--output", "a.csv", "--json"],
        ["bench", "--model", "own/xxs", "--size", "32", "--seconds", "0.1", "--no-memory", "--peers", "accelerated"],
        ["profile", "--model", "own/xxs", "--size", "32", "--calls", "1", "--peers", "eager", "--operators", "2"],
    ],
    ids=" ".join,
)
def test_every_command_prints_in_ascii(arguments, printed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, text, _ = printed("ascii", *arguments)
    assert code == 0 and len(text) > 200


def test_errors_are_printed_in_ascii(printed):
    code, text, error = printed("ascii", "verify", "--checkpoint", "模型.pth")
    assert (code, text) == (2, "") and "there is no file \\u6a21\\u578b.pth" in error
    code, text, error = printed("ascii", "verify", "--model", "own/中")
    assert (code, text) == (2, "") and "own/\\u4e2d" in error


def test_strange_names_get_into_files(run, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pth")
    torch.save(MobileViT("xxs", num_classes=5).state_dict(), path)
    command = [
        "verify",
        "--checkpoint",
        path,
        "--size",
        "64",
        "--output",
        tmp_path / "a.csv",
        "--output",
        tmp_path / "a.json",
    ]
    assert run(*command).code == 0
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["checkpoint"] == path
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert {row["checkpoint"] for row in csv.DictReader(file)} == {path.replace("\udcff", "\\udcff")}


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_the_environments_encoding(settings):
    command = [sys.executable, "-m", "mvit_kernels", "classify", "--help"]
    environment = {**os.environ, **settings}
    result = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert (result.returncode, result.stderr) == (0, b"") and b"--labels" in result.stdout
