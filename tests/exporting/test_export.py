# SPDX-License-Identifier: Apache-2.0
"""`export`: what it writes, reports, refuses, and leaves behind."""

import copy
import json
import os
import sys

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import exporting
from mvit_kernels.__main__ import main
from mvit_kernels.exporting import comparison, export
from mvit_kernels.exporting.plain import PlainBlock
from mvit_kernels.exporting.plan import Plan
from mvit_kernels.exporting.targets import TARGETS, target_named
from mvit_kernels.nn.layers import ConvNormAct
from support import models


class Small(nn.Module):
    """A classifier of one MobileViT block of ours between two convolutions: exported in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 24, 3, stride=8)
        self.block = models.build("own").stages[2][1]
        self.narrow = ConvNormAct(24, self.block.conv_local.conv.in_channels)
        self.classifier = nn.Linear(self.narrow.conv.out_channels, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.block(self.narrow(self.stem(images))).mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return models.sensible(Small()).eval()


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """A file of any batch and size in each format that can be so, and its report."""
    folder = tmp_path_factory.mktemp("written")
    found = {}
    for name in ("onnx", "openvino", "torch"):
        path = folder / f"small{target_named(name).suffix}"
        found[name] = path, export(small, path, sizes="dynamic", batch="dynamic")
    return found


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_any_batch_and_size(small, written, name):
    path, report = written[name]
    run = target_named(name).load(path, Plan(((256, 256),)))
    for shape in ((1, 3, 64, 64), (3, 3, 72, 104)):  # maps of 8 × 8, and of 9 × 13: no whole patches
        images = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(images)["output"], small(images), rtol=1e-4, atol=1e-5)
    assert report.ok and report.images == "any number × 3 × any size"
    kinds = [row.inputs for row in report.differences]
    assert kinds == ["random 256x256", "photos 256x256", "4 random 278x294"]
    assert report.agreement is not None and report.agreement.same == report.agreement.images >= 6


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_the_report(written, name):
    path, report = written[name]
    suffixes = {"onnx": [".onnx"], "openvino": [".xml", ".bin"], "torch": [".pt2"]}[name]
    assert report.bytes == sum(path.with_suffix(suffix).stat().st_size for suffix in suffixes)
    assert len(os.listdir(path.parent)) == 4  # nothing else is left
    assert (report.target, report.form, report.path) == (name, "plain", path)
    assert report.contents.highest_rank == 4
    text = str(report)
    assert f"{report.contents.transposes} transposes of {report.contents.nodes.total()} nodes" in text
    assert "no tensor of more than 4 axes" in text and "TOO LARGE" not in text
    for row in report.differences:
        assert 0 < row.error <= row.allowed and f"{row.error:9.2e}" in text
    assert json.loads(json.dumps(report.as_dict()))["contents"]["nodes"] == dict(report.contents.nodes)


def test_transposes_of_a_block(small, tmp_path):
    """Three to sequences and three back; a layer's attention is one node, or three transposes."""
    new = export(small, tmp_path / "a.onnx", sizes=64, batch=1, opset=23).contents
    assert (new.transposes, new.nodes["Attention"]) == (6, 2)
    old = export(small, tmp_path / "b.onnx", sizes=64, batch=1).contents
    assert (old.transposes, old.nodes["Attention"], old.nodes["Softmax"]) == (12, 0, 2)
    for contents in (new, old):
        assert not contents.nodes["Resize"] and not contents.nodes["BatchNormalization"]


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        (dict(path="a.tar"), ValueError, "export: path is .*a.tar', whose suffix names no target; give target="),
        (dict(path="a.onnx", target="openvino"), ValueError, "one that ends in .xml is wanted for openvino"),
        (dict(path="a.onnx", target="tensorflow"), ValueError, "target is 'tensorflow'; one of onnx, openvino"),
        (dict(path="no/a.onnx"), FileNotFoundError, "the folder .*no does not exist"),
        (dict(path="a.onnx", dtype=torch.bfloat16), ValueError, "onnx files have float32, float16"),
        (dict(path="a.onnx", dtype=torch.float64), ValueError, "dtype is torch.float64"),
        (dict(path="a.onnx", sizes=[64, 96]), ValueError, "onnx files take one size; give one"),
        (dict(path="a.onnx", sizes="any"), ValueError, "sizes is 'any'; a size, a list of sizes or 'dynamic'"),
        (dict(path="a.onnx", sizes=16), ValueError, "a size is 16; 32 or more pixels"),
        (dict(path="a.onnx", sizes=(64, 64, 3)), ValueError, "a size is"),
        (dict(path="a.onnx", sizes=[]), ValueError, "sizes is \\[\\]"),
        (dict(path="a.onnx", batch=0), ValueError, "batch is 0; a whole number of 1 or more"),
        (dict(path="a.onnx", batch="many"), ValueError, "batch is 'many'; a number of images or 'dynamic'"),
        (dict(path="a.onnx", opset=17), ValueError, "opset is 17; 18 or 23 is wanted"),
        (dict(path="a.pt2", opset=18), ValueError, "opset is 18; none for torch, which has no operators of ONNX,"),
    ],
    ids=str,
)
def test_refusals(small, tmp_path, arguments, kind, says):
    with pytest.raises(kind, match=says):
        export(small, tmp_path / arguments.pop("path"), **arguments)
    assert not os.listdir(tmp_path)


def test_a_model_is_wanted(tmp_path):
    with pytest.raises(TypeError, match="export: model is the str 'mobilevit_s'"):
        export("mobilevit_s", tmp_path / "a.onnx")


@pytest.mark.parametrize("module, extra", [("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_library_is_said_with_its_extra(small, tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / ("a.onnx" if extra == "onnx" else "a.xml")
    with pytest.raises(ImportError, match=rf"{module} is not installed: pip install 'mvit_kernels\[{extra}\]'"):
        export(small, path)
    assert not os.listdir(tmp_path)


def test_a_wrong_file_is_not_left(small, tmp_path, monkeypatch):
    """A block off by 0.1 %: found, and what was there before stays."""
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")
    right = PlainBlock.transformer
    monkeypatch.setattr(PlainBlock, "transformer", lambda self, x: right(self, x) * 1.001)
    with pytest.raises(RuntimeError, match="export: the file computes something else than the model") as error:
        export(small, path, sizes=64)
    assert "TOO LARGE" in str(error.value)
    assert os.listdir(tmp_path) == ["a.onnx"] and path.read_bytes() == b"before"


def test_a_file_of_not_a_number_is_not_left(small, tmp_path, monkeypatch):
    right = PlainBlock.transformer
    monkeypatch.setattr(PlainBlock, "transformer", lambda self, x: right(self, x) * float("nan"))
    with pytest.raises(RuntimeError, match="the file computes something else"):
        export(small, tmp_path / "a.pt2", sizes=64)
    assert not os.listdir(tmp_path)


def test_not_a_number_in_one_batch_is_the_worst():
    rows = [comparison.Difference("photos", "output", error, 1.0, 1.0, 9.0) for error in (2.0, float("nan"), 3.0)]
    assert comparison._worst(rows) is rows[1] and not rows[1].ok
    assert comparison._worst(rows[::2]) is rows[2]


def test_a_failure_while_writing_leaves_nothing(small, tmp_path, monkeypatch):
    target = type(target_named("torch"))

    def write(self, network, plan, path):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(target, "write", write)
    with pytest.raises(OSError, match="the disk is full"):
        export(small, tmp_path / "a.pt2", sizes=64)
    assert not os.listdir(tmp_path)


def test_the_model_is_not_changed(small, tmp_path):
    accelerated = mvit_kernels.accelerate(copy.deepcopy(small)).train()
    before = {name: value.clone() for name, value in accelerated.state_dict().items()}
    export(accelerated, tmp_path / "a.pt2", sizes=64)
    assert accelerated.training and all(module.training for module in accelerated.modules())
    assert all(torch.equal(value, before[name]) for name, value in accelerated.state_dict().items())
    assert mvit_kernels.report(accelerated).accelerated


@pytest.mark.parametrize(
    "name, dtype", [("onnx", torch.float16), ("openvino", torch.float16), ("torch", torch.bfloat16)]
)
def test_half_precision(small, written, tmp_path, name, dtype):
    """Half the bytes or a little more, an error of that dtype, and images and outputs in float32."""
    path, whole = written[name]
    report = export(small, tmp_path / path.name, sizes=64, dtype=dtype)
    assert report.ok and report.differences[0].error > 10 * whole.differences[0].error
    assert report.bytes < whole.bytes
    outputs = target_named(name).load(report.path, Plan(((64, 64),)))(torch.rand(1, 3, 64, 64))
    assert outputs["output"].dtype == torch.float32


def test_aotinductor(tmp_path):
    """Compiled with the weights laid out for oneDNN: the convolution and its activation are one call."""
    torch.manual_seed(0)
    layers = (ConvNormAct(3, 16, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model = models.sensible(nn.Sequential(*layers)).eval()
    report = export(model, tmp_path / "a.pt2", target="aotinductor", sizes=64)
    assert report.ok and report.agreement is not None
    assert report.contents.nodes["mkldnn__convolution_pointwise"] == 1 and not report.contents.transposes
    assert os.listdir(tmp_path) == ["a.pt2"]


def test_kornia_takes_whole_patches_alone(tmp_path):
    model = models.build("kornia")
    with pytest.raises(ValueError, match="the model does not take images 1 × 3 × 96x96; give other sizes: shape"):
        export(model, tmp_path / "b.pt2", sizes=96, batch=1)
    assert not os.listdir(tmp_path)


def test_without_photographs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "sample_photos", list)
    report = export(small, tmp_path / "a.pt2", sizes=64, batch=2)
    assert [row.inputs for row in report.differences] == ["random 64x64"] and report.images == "2 × 3 × 64x64"


def test_the_table_of_targets():
    """Every suffix names a target, whose module is there and says what it can."""
    assert set(exporting._SUFFIXES.values()) == set(TARGETS) - {"aotinductor"}
    for name in ("onnx", "openvino", "torch", "aotinductor"):
        target = target_named(name)
        assert (target.name, exporting._SUFFIXES[target.suffix]) in ((name, name), ("aotinductor", "torch"))
        assert target.form in ("plain", "phone") and torch.float32 in target.dtypes


def test_the_command(tmp_path, capsys):
    command = f"export --model own/xxs --size 64 --batch 1 --output {tmp_path / 'a.pt2'}"
    assert main([*command.split(), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and data["target"] == "torch" and data["bytes"] == (tmp_path / "a.pt2").stat().st_size
    assert main(["export", "--model", "own/xxs", "--output", str(tmp_path / "a.zip")]) == 2
    assert "whose suffix names no target" in capsys.readouterr().err
    assert main(["export", "--model", "own/xxs", "--size", "dynamic", "64", "--output", str(tmp_path / "a.onnx")]) == 2
    assert "--size: dynamic is any size" in capsys.readouterr().err
    from mvit_kernels.cli.export import TARGETS as offered

    assert offered == tuple(TARGETS)
