# SPDX-License-Identifier: Apache-2.0
"""docs/training.md and the examples: commands name files and options that exist (its Python: tests/docs)."""

from __future__ import annotations

import re
import shlex

import pytest

from support import ROOT

TEXT = (ROOT / "docs" / "training.md").read_text()


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_commands():
    """Run by test_examples.py; here no option that has been renamed since."""
    text = TEXT + (ROOT / "examples" / "timm_train.md").read_text()
    commands = [shlex.split(line) for block in blocks("sh", text) for line in block.splitlines() if "examples/" in line]
    assert len(commands) >= 6
    for command in commands:
        (script,) = (word for word in command if word.startswith("examples/"))
        known = (ROOT / script).read_text()
        options = [word for word in command[command.index(script) :] if word.startswith("--")]
        assert options and all(f'"{option}"' in known for option in options), command


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_usage_in_docstrings(script):
    """The commands at the head of each example."""
    text = (ROOT / "examples" / script).read_text()
    head = text.split('"""')[1]
    assert f"python examples/{script}" in head
    others = {"--nproc-per-node", "--data-binary"}  # torchrun's, and curl's
    assert all(f'"{option}"' in text for option in set(re.findall(r"--[a-z0-9][a-z0-9-]*", head)) - others)


def test_links():
    """(Those of docs/: tests/docs/test_site.py.)"""
    for name in ("timm_train.md", "README.md"):
        path = ROOT / "examples" / name
        links = re.findall(r"\]\(([^)]+)\)", path.read_text())
        assert links and all(link.startswith("https:") or (path.parent / link).exists() for link in links)
