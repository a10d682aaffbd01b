# SPDX-License-Identifier: Apache-2.0
"""The examples of the public docstrings run, with what a reader has at hand, and print what they say."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import mvit_kernels
from mvit_kernels import MobileViT
from mvit_kernels.training.sized import SizedDataset

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

WIDTH, HIDDEN, OUT = 64, 128, 32  # of the weights that docstrings name
QUICK = {  # XXS for what would take seconds, and nothing from the network
    '"mobilevit_s"': '"mobilevit_xxs"',
    '"mobilevit_s.pth"': '"mobilevit_xxs.pth"',
    '"land_use21.pth"': '"mobilevit_xxs21.pth"',
    'MobileViT("s", num': 'MobileViT("xxs", num',
    'MobileViTSSDLite("s"': 'MobileViTSSDLite("xxs"',
    'MobileViTDeepLabV3("s"': 'MobileViTDeepLabV3("xxs"',
    "512, 512": "128, 128",
    "[2, 21, 32, 32]": "[2, 21, 8, 8]",  # what that prints, at an output stride of 16
    "pretrained=True": "",
    "range(300)": "range(1)",
    "start=120": "start=1",
    "num_workers=8": "num_workers=0",
}
LEFT_OUT = "from_pretrained"  # of Hugging Face: docs/start/one_line.md runs it on a local model


def at_hand(name: str) -> dict:
    """What the examples take for granted, by the names that they use."""
    torch.manual_seed(0)
    norm, qkv, proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
    fc1, fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    layer = [parameter for module in (norm, qkv, proj, norm, fc1, fc2) for parameter in module.parameters()]
    box = {"boxes": torch.tensor([[40.0, 60.0, 200.0, 240.0]]), "labels": torch.tensor([3])}
    given = {
        **{each: getattr(mvit_kernels, each) for each in mvit_kernels.__all__},
        **dict(mvit_kernels=mvit_kernels, timm=timm, torch=torch, DataLoader=DataLoader, SizedDataset=SizedDataset),
        **dict(norm=norm, norm1=norm, norm2=norm, qkv=qkv, qkv_linear=qkv, proj=proj, fc1=fc1, fc2=fc2, weights=layer),
        **dict(x=torch.randn(2, 8, 8, WIDTH), attended=torch.randn(2, 8, 8, WIDTH)),
        "expand": (torch.randn(HIDDEN, WIDTH), torch.zeros(HIDDEN)),
        "depthwise": (torch.randn(HIDDEN, 1, 3, 3), torch.zeros(HIDDEN)),
        "project": (torch.randn(OUT, HIDDEN), torch.zeros(OUT)),
        "images": torch.rand(1, 3, 64, 64),
        "targets": [box, box],
        "folder": [(torch.rand(3, 64, 64), 0)] * 4,
        "transforms": lambda size: lambda image: image.new_zeros(3, *size),
        "loader": [(torch.rand(1, 3, 64, 64), torch.zeros(1))],
        "step": lambda *_: None,
    }
    if name == "batch_norm_activation":
        return given | dict(x=torch.randn(2, WIDTH, 8, 8), norm=nn.BatchNorm2d(WIDTH))
    if name == "transformer":
        return given | dict(weights=[layer, layer])
    if name == "MobileViTSSDLite":
        return given | dict(images=torch.rand(2, 3, 320, 320))
    if name in ("accelerate", "restore", "report", "freeze", "export", "verify", "use_backend"):
        return given | dict(model=timm.create_model("mobilevit_xxs").eval())
    return given


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with the files that the examples read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for file, classes in {"mobilevit_xxs.pth": 1000, "mobilevit_xxs21.pth": 21}.items():
        model = MobileViT("xxs", num_classes=classes).eval()
        torch.save(model.state_dict(), folder / file)
    mvit_kernels.freeze(model).save(folder / "s.mvit", labels=[str(label) for label in range(classes)])
    return folder


@pytest.mark.parametrize("name", [name for name in mvit_kernels.__all__ if name != "__version__"])
def test_example(name, checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    names = at_hand(name)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(mvit_kernels, name)))
    assert examples or name in ("AccelerationReport", "ExportReport", "VerificationReport", "BackendError")
    checker = doctest.OutputChecker()
    for example in examples:
        source, want = example.source, example.want
        for slow, quick in QUICK.items():
            source, want = source.replace(slow, quick), want.replace(slow, quick)
        if LEFT_OUT in source:
            continue
        capsys.readouterr()
        exec(compile(source, f"example of {name}", "single"), names)
        printed = capsys.readouterr().out
        if want:
            assert checker.check_output(want, printed, doctest.NORMALIZE_WHITESPACE), (source, printed)
