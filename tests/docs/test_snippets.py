# SPDX-License-Identifier: Apache-2.0
"""The Python of every page runs from top to bottom, and every command is one that the parser takes.

Without the network and in seconds: published names and sizes are replaced by MobileViT-XXS, local and at 64 px.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import mvit_kernels
from mvit_kernels.__main__ import build_parser
from mvit_kernels.cli import models as commands
from support import ROOT
from support.examples import image_folder

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
TRAINING = "training.md"
SKIPPED_COMMANDS = ("contributing.md", "changelog.md", "measuring.md")  # included files, which other tests read


def blocks(language: str, text: str) -> list[str]:
    """Code of fences, also of those in a tab, which may be indented."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "xxs"
    torch.save(timm.create_model("mobilevit_xxs").state_dict(), path)
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch, checkpoint):
    """The folder that snippets run in: `images`, checkpoints, and libraries that give XXS for any published name."""
    pytest.importorskip("transformers")
    from transformers import MobileViTConfig, MobileViTForImageClassification

    create = timm.create_model

    def small(name, *, pretrained=False, **settings):
        return create(re.sub(r"mobilevit_x?s$", "mobilevit_xxs", name), **settings)

    def published(cls, name, **settings):
        assert re.fullmatch(r"apple/mobilevit-(small|x-small|xx-small)", name)
        sizes = dict(hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0)
        return cls(MobileViTConfig(num_labels=1000, **sizes))

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr(MobileViTForImageClassification, "from_pretrained", classmethod(published))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the whole process
    torch.manual_seed(0)
    image_folder(tmp_path / "images")
    for name in ("mobilevit_xxs.pth", "mobilevit_s.safetensors"):  # read by content, not by name
        (tmp_path / name).hardlink_to(checkpoint)
    return tmp_path


def run(page: str) -> dict:
    """The page's snippets, one after the other with the names of those before, as a reader runs them."""
    names: dict = {"__name__": "__main__"}
    for snippet in blocks("python", PAGES[page]):
        code = re.sub(r"\b256, 256\b", "64, 64", snippet)
        exec(compile(code, f"docs/{page}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks("python", text) and page != TRAINING])
def test_page(page, offline):
    run(page)


def test_training_page(offline, capsys):
    names = run(TRAINING)
    assert capsys.readouterr().out.startswith("3 of 3 MobileViT blocks accelerated")
    assert not mvit_kernels.report(names["plain"]).accelerated
    assert len(mvit_kernels.report(names["average"]).accelerated) == 3
    assert {(h, b) for h, _, b in names["sampler"].sizes} >= {(256, 4), (160, 10), (320, 2)}
    assert names["loss"].isfinite() and names["photos"][0, (64, 96)][0].shape == (3, 64, 96)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "mvit-kernels " in text])
def test_commands(page, monkeypatch):
    """Every command of a shell block is one that the parser takes; nothing is run."""
    if page in SKIPPED_COMMANDS:
        pytest.skip("an included file")
    monkeypatch.setattr(commands, "checked_device", lambda name: name)  # pages name GPUs that are not here
    parser = build_parser()
    for line in "".join(blocks("sh", PAGES[page])).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "mvit-kernels" in words[:1]:
            parser.parse_args(words[1:])
