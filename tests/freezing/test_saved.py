# SPDX-License-Identifier: Apache-2.0
"""Frozen networks as files: what they hold, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import zlib

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import MobileViT, MobileViTDeepLabV3, MobileViTSSDLite, runtime
from mvit_kernels.freezing import saved
from support import models
from support.native import skip_without_a_compiler

skip_without_a_compiler()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def frozen() -> nn.Module:
    torch.manual_seed(0)
    return mvit_kernels.freeze(MobileViT("xxs", num_classes=6).eval())


@pytest.fixture(scope="module")
def path(frozen, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "xxs.mvit"
    frozen.save(file, labels=[f"größe {i}" for i in range(6)])
    return file


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize(
    "library, dtype",
    [*((name, "float32") for name in models.LIBRARIES), ("timm", "bfloat16"), ("huggingface", "float16")],
)
def test_every_librarys_network_in_a_file(library, dtype, tmp_path):
    """The bits of the frozen model, with PyTorch and without; the frozen model is told what it is in the file."""
    odd = {"num_labels" if library == "huggingface" else "num_classes": 9}  # a class more is computed
    options = {} if library == "kornia" else odd  # which has no classifier
    model = mvit_kernels.freeze(models.build(library, **options), dtype=DTYPES[dtype])
    model.save(tmp_path / "network.mvit")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = logits(model, x)
    assert expected.shape == ((2, 320, 2, 2) if library == "kornia" else (2, 9))
    loaded = mvit_kernels.load(tmp_path / "network.mvit")
    assert torch.equal(logits(loaded, x), expected)
    assert loaded.metadata["kind"] == library and loaded.metadata["architecture"] == "mobilevit_xxs"
    with runtime.Network(tmp_path / "network.mvit") as network:
        assert torch.equal(torch.from_numpy(network(x.numpy())), expected.float())
        assert network.metadata == loaded.metadata


def test_segmentation_and_features(tmp_path):
    torch.manual_seed(3)
    for name, model in (
        ("map", MobileViTDeepLabV3("xxs", num_classes=5).eval()),
        ("features", models.timm("xxs", num_classes=0).eval()),
    ):
        model = mvit_kernels.freeze(model)
        model.save(tmp_path / name, size=(96, 64))
        x = torch.randn(1, 3, 96, 64)
        loaded, expected = mvit_kernels.load(tmp_path / name), logits(model, x)
        assert loaded.input_size == (96, 64) and torch.equal(logits(loaded, x), expected)
        with runtime.Network(tmp_path / name) as network:
            assert torch.equal(torch.from_numpy(network(x.numpy())), expected)


def test_what_cannot_be_a_file(tmp_path, frozen):
    file = tmp_path / "none.mvit"
    detector = mvit_kernels.freeze(MobileViTSSDLite("xxs", num_classes=4).eval())
    with pytest.raises(ValueError, match="^save: "):
        detector.save(file)
    hooked = copy.deepcopy(frozen)
    next(part for part in hooked.modules() if part is not hooked).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="save: .*hook"):
        hooked.save(file)
    with pytest.raises(ValueError, match="5 labels and 6 classes"):
        frozen.save(file, labels=list("abcde"))
    with pytest.raises(TypeError, match="a list of names is wanted"):
        frozen.save(file, labels="abcdef")
    for preprocessing, says in (
        ({"mean": [1.0], "std": [1.0]}, "3 numbers are wanted"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "numbers above 0"),
        ({"mean": (0, 0, float("nan")), "std": (1, 1, 1)}, "3 numbers are wanted"),
        ({"channel_order": "GRB"}, "'RGB' or 'BGR' is wanted"),
        ({"size": (256,)}, r"\(height, width\) is wanted"),
    ):
        with pytest.raises(ValueError, match=f"save: .*{says}"):
            frozen.save(file, preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"save: size is \[0, 0\]"):
        frozen.save(file, size=0)
    with pytest.raises(OSError, match=r"nowhere/x\.mvit"):
        frozen.save(tmp_path / "nowhere" / "x.mvit")
    assert not list(tmp_path.iterdir())


def test_copies_of_a_frozen_model_save_themselves(frozen, tmp_path):
    x = torch.randn(1, 3, 32, 32)
    for number, other in enumerate((copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)))):
        for buffer in other.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1 + number / 10)
        other = mvit_kernels.freeze(other)
        other.save(tmp_path / "copy")
        assert torch.equal(logits(mvit_kernels.load(tmp_path / "copy"), x), logits(other, x))
        assert other.save._model is other
    assert frozen.save._model is frozen and "save of a frozen MobileViT" in repr(frozen.save)
    assert not any("save" in key for key in frozen.state_dict())


def test_the_same_model_gives_the_same_file(frozen, path, tmp_path):
    frozen.save(tmp_path / "again", labels=[f"größe {i}" for i in range(6)])
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_loaded_network(path):
    network = mvit_kernels.load(path)
    assert network.labels == [f"größe {i}" for i in range(6)] and network.input_size == (256, 256)
    assert network.preprocessing["channel_order"] == "RGB" and not network.training and not network.state_dict()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        network.train()
    with pytest.raises(TypeError, match="load the file again"):
        pickle.dumps(network)
    for wrong, error, says in (
        ([1], TypeError, "x is list"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "x is torch.uint8"),
        (torch.zeros(3, 32, 32), ValueError, r"x is \(3, 32, 32\) on cpu; \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"\(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "on meta"),
    ):
        with pytest.raises(error, match=says):
            network(wrong)
    with torch.enable_grad():
        assert not network(torch.zeros(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_a_file_with_a_right_checksum_and_wrong_contents(path, tmp_path):
    """What a checksum does not see is refused by its own check."""
    content = path.read_bytes()
    where = struct.unpack_from("<6Q", content, 24)

    def refused(change, says: str) -> None:
        wrong = bytearray(content)
        change(wrong)
        struct.pack_into("<I", wrong, 12, zlib.crc32(memoryview(wrong)[16:]))
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ValueError, match=f"load: .*{says}"):
            mvit_kernels.load(tmp_path / "wrong")
        with pytest.raises((RuntimeError, ValueError)):
            runtime.Network(bytes(wrong))

    refused(lambda w: struct.pack_into("<Q", w, 24, 2**62), "a part of it would lie outside")
    refused(lambda w: struct.pack_into("<Q", w, 64, 2**63), "a part of it would lie outside")
    refused(lambda w: struct.pack_into("<I", w, 72, 0), "its program makes 6 channels, and 0 are wanted")
    refused(lambda w: struct.pack_into("<I", w, 72, 7), "its program makes 6 channels, and 7 are wanted")
    refused(lambda w: struct.pack_into("<q", w, where[2] + 8, 9), "it has no program")
    refused(lambda w: struct.pack_into("<q", w, where[2], 9), "no stored network of version 1")
    refused(lambda w: struct.pack_into("<B", w, where[0], 0x5D), "")
    assert json.loads(content[where[0] : where[0] + where[1]])["num_classes"] == 6


def test_the_header_is_what_the_runtime_reads():
    assert saved.HEADER.size == 128
