# SPDX-License-Identifier: Apache-2.0
"""The names of PyTorch's C++ interface that csrc uses, and those that the oldest supported torch has.

What a later torch added compiles where that is installed, and fails at whoever builds with the oldest one; macros are
not behind TORCH_TARGET_VERSION. ``tests/data/oldest_torch_names.txt`` has what csrc uses and the oldest torch declares;
``make test-oldest`` writes it, and compiles.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import ROOT

LIST = ROOT / "tests" / "data" / "oldest_torch_names.txt"
OLDEST = "2.10.0"  # as in pyproject.toml's dependencies and TORCH_TARGET_VERSION

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:[^\"\\\n]|\\.)*\"", re.DOTALL)
_NAME = re.compile(
    r"\b(?:[A-Z]+_)*TORCH_[A-Z0-9_]+\b"  # macros
    r"|\baoti_torch_\w+|\btorch_\w+(?=\()|\bAten\w+|\bAOTI\w+"  # the C interface
    r"|\btorch::(?:\w+::)*\w+"  # the C++ one
)
_OWN = {"TORCH_TARGET_VERSION"}  # what the build defines


def used_in(text: str) -> set[str]:
    """The names of PyTorch's C++ interface in C++ source: of `torch::stable::Tensor` its last part.

    Example:
        >>> used_in("STD_TORCH_CHECK(x.dim() == 2); torch::stable::clone(x);  // TORCH_BOX")
        {'STD_TORCH_CHECK', 'clone'}
    """
    found = {name.rpartition("::")[2] for name in _NAME.findall(_COMMENT.sub(" ", text))}
    return found - _OWN


def used() -> dict[str, list[str]]:
    """For each name that csrc uses, the files that do."""
    files: dict[str, list[str]] = {}
    for file in sorted(ROOT.glob("csrc/*/*")):
        if file.suffix in (".cpp", ".h", ".cu"):
            for name in used_in(file.read_text(encoding="utf-8")):
                files.setdefault(name, []).append(str(file.relative_to(ROOT)))
    return files


def words(folder: Path) -> set[str]:
    """Every word in the headers of a torch's `include` folder that csrc may include."""
    found: set[str] = set()
    for part in ("csrc/stable", "csrc/inductor/aoti_torch", "headeronly"):
        for file in (folder / "torch" / part).rglob("*.h"):
            found.update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return found
