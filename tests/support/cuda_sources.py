# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' sources and what each is compiled with, as csrc/cuda/CMakeLists.txt has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import ROOT

FOLDER = ROOT / "csrc" / "cuda"


@dataclass(frozen=True)
class Source:
    """One object of the library: a kernel's file, compiled with a macro defined as a value."""

    path: Path
    macro: str
    value: str

    @property
    def name(self) -> str:
        return f"{self.path.stem}_{self.value}"

    @property
    def define(self) -> str:
        return f"-D{self.macro}={self.value}"


def cuda_sources() -> list[Source]:
    lines = re.findall(r"^compile_kernel\((\w+) (\w+) ([\w ]+)\)$", (FOLDER / "CMakeLists.txt").read_text(), re.M)
    kernels = {FOLDER / f"{kernel}.cu": (macro, values.split()) for kernel, macro, values in lines}
    assert set(kernels) == set(FOLDER.glob("*.cu")), "csrc/cuda/CMakeLists.txt and the folder's .cu files differ"
    return [Source(path, macro, value) for path, (macro, values) in kernels.items() for value in values]
