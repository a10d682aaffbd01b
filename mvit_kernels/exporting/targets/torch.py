# SPDX-License-Identifier: Apache-2.0
"""PyTorch without this package: a program of ``torch.export``, and one compiled for this machine by AOTInductor."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import IMAGES, Contents, Plan
from . import Loaded, Target

_PERMUTES = ("permute", "transpose", "t")


def exported_program(network: nn.Module, plan: Plan) -> torch.export.ExportedProgram:
    """The ``torch.export`` program of `network`."""
    return torch.export.export(network, (plan.example(),), dynamic_shapes=dynamic_shapes(plan))


def dynamic_shapes(plan: Plan) -> dict[str, dict[int, Any]] | None:
    """What ``torch.export`` is told about the axes of the images; None where all are fixed."""
    axes = [0] * plan.dynamic_batch + [2, 3] * plan.dynamic_size
    return {IMAGES: {axis: torch.export.Dim.DYNAMIC for axis in axes}} if axes else None


class Torch(Target):
    """A ``torch.export`` program: ``torch.export.load(path).module()(images)`` is a tuple of the outputs."""

    name, suffix, form = "torch", ".pt2", "plain"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    attention = "pytorch"
    dynamic_batch = dynamic_batch_is_free = dynamic_size = True

    def require(self) -> None:
        pass

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        torch.export.save(exported_program(network, plan), path)

    def load(self, path: Path, plan: Plan) -> Loaded:
        return _by_name(torch.export.load(path).module(), plan)

    def contents(self, path: Path) -> Contents:
        nodes: Counter[str] = Counter()
        ranks = []
        for node in torch.export.load(path).graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                nodes[node.target._schema.name.partition("::")[2]] += 1
                if isinstance(node.meta.get("val"), Tensor):
                    ranks.append(node.meta["val"].dim())
        return Contents(nodes, sum(nodes[kind] for kind in _PERMUTES), max(ranks, default=None))


class AOTInductor(Torch):
    """Compiled for this machine's kind of processor, to run without Python:
    ``torch._inductor.aoti_load_package(path)(images)``, or ``AOTIModelPackageLoader`` in C++. It takes a C++ compiler.
    """

    name = "aotinductor"
    dynamic_batch_is_free = False

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        from torch._inductor import aoti_compile_and_package  # loaded when it is used: it brings the compiler

        # freezing: weights are laid out for oneDNN once, when the file is made
        options = {"freezing": True}
        aoti_compile_and_package(exported_program(network, plan), package_path=str(path), inductor_configs=options)

    def load(self, path: Path, plan: Plan) -> Loaded:
        from torch._inductor import aoti_load_package

        return _by_name(aoti_load_package(str(path)), plan)

    def contents(self, path: Path) -> Contents:
        """Calls of PyTorch's operators, and of loops that were fused (cpp_fused), in the program that was compiled."""
        nodes: Counter[str] = Counter()
        with zipfile.ZipFile(path) as package:
            for name in package.namelist():
                if name.endswith(".wrapper.cpp"):
                    text = package.read(name).decode()
                    nodes.update(re.findall(r"\baoti_torch_cpu_(\w+)\(", text))
                    nodes.update(re.findall(r"^ +(cpp_fused)\w+\(", text, re.MULTILINE))
        return Contents(nodes, sum(nodes[kind] for kind in _PERMUTES))


def _by_name(program: Any, plan: Plan) -> Loaded:
    def run(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(plan.outputs, program(images), strict=True))

    return run


TARGETS = (Torch(), AOTInductor())
