# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: damaged, written by training scripts, malicious, or not checkpoints at all."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import gzip
import io
import lzma
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import timm
import timm.utils
import torch
from torch import nn

from mvit_kernels.checkpoints import load_checkpoint
from mvit_kernels.checkpoints.files import read_file
from mvit_kernels.nn import MobileViT

CLASSES = 5


@pytest.fixture(scope="module")
def xxs() -> dict[str, torch.Tensor]:
    """A classifier's state dict. Do not write to it."""
    torch.manual_seed(0)
    return MobileViT("xxs", num_classes=CLASSES).state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_checkpoint(MobileViT("xxs"), path)
    message = str(caught.value)
    assert message.startswith(f"load_checkpoint: {path} ") and "\n" not in message
    return message


# -- damage


def saved(weights, path: Path, kind: str) -> bytes:
    if kind == "safetensors":
        safetensors.torch.save_file(dict(weights), path)
    else:
        torch.save(dict(weights), path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


def test_a_flipped_bit_in_the_weights_names_the_record(xxs, tmp_path):
    path = tmp_path / "weights.pth"
    whole = bytearray(saved(xxs, path, "zip"))
    at = whole.index(xxs["stages.4.0.project.conv.weight"].numpy().tobytes()) + 4 * 17 + 3  # sign and exponent
    whole[at] ^= 0x44
    path.write_bytes(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        record = max((r for r in archive.infolist() if r.header_offset < at), key=lambda r: r.header_offset)
    assert f"is corrupt: its record {record.filename} is damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_bits_are_seen_or_change_no_weight(kind, tmp_path):
    """Anywhere in an archive, which has checksums; in other files before the weights, where the structure is."""
    path = tmp_path / "weights.bin"
    torch.manual_seed(0)
    weights = {f"layer.{i}.weight": torch.randn(4, 3, 2, 2) for i in range(3)} | {"bias": torch.randn(5)}
    weights["count"] = torch.tensor(0x123456789ABCDEF)  # a value that occurs nowhere else in the file
    whole = saved(weights, path, kind)
    data = [whole.index(tensor.numpy().tobytes()) for tensor in weights.values()]  # in an order that varies
    end = len(whole) if kind == "zip" else min(data)
    rng = random.Random(0)
    spots = [(at, 1 << rng.randrange(8)) for at in rng.sample(range(end), 250)]
    if kind == "zip":  # the bit that marks a folder: PyTorch's reader then leaves the tensor unwritten
        entries = [at for at in range(end) if whole.startswith(b"PK\1\2", at)]
        assert len(entries) > 5
        spots += [(at + 38, 0x10) for at in entries]
    seen = 0
    for at, bit in spots:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            read = read_file(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), (at, bit)
            seen += 1
            continue
        # Without checksums a name, a shape or a dtype may come out changed, and then fits no model.
        if kind != "zip" and (not isinstance(read, dict) or list(read) != list(weights)):
            continue
        for key, expected in weights.items():
            same_kind = kind == "zip" or (read[key].shape == expected.shape and read[key].dtype == expected.dtype)
            assert not same_kind or torch.equal(read[key], expected), (key, at, bit)
    assert seen > 40
    path.write_bytes(whole)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in read_file(path).items())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_prolonged_files(kind, xxs, tmp_path):
    path = tmp_path / "weights.bin"
    whole = saved(xxs, path, kind)
    for length in (1, 9, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refusal(path)
    for length in (len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        assert "is corrupt" in refusal(path)
    path.write_bytes(whole + bytes(64))
    if kind == "zip":  # zip allows a comment there
        with contextlib.suppress(ValueError):
            assert all(torch.equal(tensor, xxs[key]) for key, tensor in read_file(path).items())
    else:
        assert "is corrupt" in refusal(path)


def test_archives_without_checksums_load(xxs, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(xxs), tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(torch.equal(tensor, xxs[key]) for key, tensor in read_file(tmp_path / "weights.pth").items())


# -- what training scripts save


def test_timm_checkpoint_saver(xxs, tmp_path):
    """timm's own file, with its arguments and NumPy's metric in it; the averaged weights are taken."""
    model = timm.create_model("mobilevit_xxs", num_classes=CLASSES)
    load_checkpoint(model, {key: torch.zeros_like(value) for key, value in xxs.items()})
    average = timm.utils.ModelEmaV3(load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=CLASSES), xxs))
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=argparse.Namespace(model="mobilevit_xxs", lr=np.float64(0.1), sizes=np.arange(3), folder=tmp_path),
        model_ema=average,
        amp_scaler=timm.utils.NativeScaler(device="cpu"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.pth.tar", weights_only=True)
    safe = set(torch.serialization.get_safe_globals())  # a list in no particular order
    loaded = load_checkpoint(MobileViT("xxs", num_classes=CLASSES), tmp_path / "last.pth.tar").state_dict()
    assert all(torch.equal(tensor, xxs[key]) for key, tensor in loaded.items())
    assert set(torch.serialization.get_safe_globals()) == safe


@pytest.mark.parametrize("new_format", [True, False])
def test_objects_beside_the_weights_become_stand_ins(new_format, xxs, tmp_path):
    path = tmp_path / "training.pth"
    beside = {
        "args": argparse.Namespace(lr=0.1, folder=pathlib.PurePosixPath("runs")),
        "best": [np.float32(0.7), np.int64(3), np.arange(4), np.dtype("float16")],
        "when": datetime.datetime(2025, 1, 1),
        "history": collections.defaultdict(list, loss=[1.0, 0.5]),
        "torch": torch.__version__,
    }
    torch.save({"state_dict": dict(xxs), **beside}, path, _use_new_zipfile_serialization=new_format)
    loaded = load_checkpoint(MobileViT("xxs", num_classes=CLASSES), path).state_dict()
    assert all(torch.equal(tensor, xxs[key]) for key, tensor in loaded.items())


def test_other_objects_are_named(xxs, tmp_path):
    torch.save({"model": nn.Linear(2, 2), "weights": dict(xxs)}, tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert "Python objects besides tensors (torch.nn.modules.linear.Linear)" in message and "state_dict()" in message


class Malicious:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4"])
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen"])
def test_malicious_files_are_called_so_and_do_nothing(save, name, xxs, tmp_path):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    call, *arguments = {
        "posix.system": (os.system, f"touch {made}"),
        "builtins.eval": (eval, f"open({str(made)!r}, 'w')"),
        "builtins.getattr": (getattr, made, "touch"),
        "subprocess.Popen": (subprocess.Popen, ["touch", str(made)]),
    }[name]
    content = {"state_dict": dict(xxs), "more": Malicious(call, *arguments)}
    if save.startswith("pickle"):
        path.write_bytes(pickle.dumps(content["more"], protocol=int(save[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    message = refusal(path)
    assert f"is a pickle that calls {name}" in message and "Nothing in it was executed" in message
    assert not made.exists()


def test_newer_pickle_protocols_are_named(xxs, tmp_path):
    torch.save(dict(xxs), tmp_path / "weights.pth", pickle_protocol=4)
    assert "was saved with pickle protocol 4" in refusal(tmp_path / "weights.pth")


# -- what is not a checkpoint


def archive_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("weights.pth")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def onnx_model() -> bytes:
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


def numpy_file(save, *args, **kwargs) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


FOREIGN = {
    "empty": (b"", "is empty"),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>Log in", r"a web page \(HTML\).*'raw'"),
    "HTML after a BOM": (b"\xef\xbb\xbf\n<html>", "a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML document.*a server's error"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5", "a Git LFS pointer.*git lfs pull"),
    "JSON": (b'{"id2label": {"0": "cat"}}', "JSON text"),
    "index of shards": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "an index of several files"),
    "text": ("hello, world: no weights in here, Größe 3".encode(), "a text file, which begins 'hello, world"),
    "ONNX": (onnx_model, "an ONNX model"),
    "TensorFlow": (b"\x08\x01\x12\xd0\x01\n\x80", "a TensorFlow SavedModel"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3\x14\0", "a TensorFlow Lite model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08", "an HDF5 file, as Keras saves"),
    "Keras 3": (lambda: archive_of(**{"metadata.json": b"", "model.weights.h5": b""}), "a Keras model"),
    "GGUF": (b"GGUF\3\0\0\0\0\0", "a GGUF file"),
    "gzip": (lambda: gzip.compress(b"x" * 99), "compressed by gzip.*unpack it"),
    "xz": (lambda: lzma.compress(b"x" * 99), "compressed by xz.*unpack it"),
    "tar": (lambda: tar_of(b"x" * 99), "a tar archive.*unpack it"),
    "zip": (lambda: archive_of(**{"weights.pth": b"x"}), "a zip archive of weights.pth.*unpack it"),
    "npz": (lambda: numpy_file(np.savez, a=np.ones(3)), r"NumPy arrays \(.npz\)"),
    "npy": (lambda: numpy_file(np.save, np.ones(3)), "a NumPy array"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image"),
    "zip, damaged": (b"PK\x03\x04" + bytes(100), "is corrupt: the archive's directory"),
    "pickle, damaged": (b"\x80\x02}q\x00(X", "corrupt pickle"),
    "pickle of arrays": (lambda: pickle.dumps({"a": [1.0]}), "pickle.dump or joblib"),
    "safetensors, damaged": (b"\x40\0\0\0\0\0\0\0{" + bytes(8), "corrupt or not a safetensors"),
    "noise": (bytes(range(200, 256)) * 9, "is corrupt or not a file of torch.save or safetensors .it begins c8 c9"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", FOREIGN)
def test_other_kinds_of_files_are_named(case, suffix, tmp_path):
    content, message = FOREIGN[case]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content())
    if case == "noise" and suffix == ".safetensors":
        message = "corrupt or not a safetensors file"
    assert re.search(message, refusal(path))


def test_torchscript_and_exported_programs_are_named(tmp_path):
    model = nn.Linear(2, 2)
    torch.jit.trace(model, torch.ones(1, 2)).save(tmp_path / "script.pt")
    assert "is a TorchScript archive" in refusal(tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), tmp_path / "program.pt2")
    assert "is an exported program" in refusal(tmp_path / "program.pt2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is a directory; give the file inside it$"),
        (["config.json", "model.safetensors"], "give the file inside it, as .*model.safetensors$"),
        ([".metadata", "__0_0.distcp"], "a distributed checkpoint; .*dcp_to_torch_save"),
        (["saved_model.pb"], "a TensorFlow SavedModel"),
        (["data.pkl", "version"], "an unpacked file of torch.save"),
    ],
)
def test_directories(files, message, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(IsADirectoryError, match=message):
        load_checkpoint(MobileViT("xxs"), tmp_path)


def test_paths_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.pth"):
        load_checkpoint(MobileViT("xxs"), tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="is a URL; download"):
        load_checkpoint(MobileViT("xxs"), "https://example.com/weights.pth")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe or a device"):
        load_checkpoint(MobileViT("xxs"), tmp_path / "pipe")


def test_a_name_does_not_decide(xxs, tmp_path):
    """torch.save's format under a safetensors name, and the other way round."""
    torch.save(dict(xxs), tmp_path / "a.safetensors")
    safetensors.torch.save_file(dict(xxs), tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert all(torch.equal(tensor, xxs[key]) for key, tensor in read_file(tmp_path / name).items())


def test_safetensors_not_installed(xxs, tmp_path, monkeypatch):
    safetensors.torch.save_file(dict(xxs), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_checkpoint(MobileViT("xxs"), tmp_path / "weights.safetensors")
