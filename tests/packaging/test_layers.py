# SPDX-License-Identifier: Apache-2.0
"""Imports run downwards only, and never in circles: every import statement, checked against CONTRIBUTING.md's map."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

import mvit_kernels
from support import ROOT

# From the bottom to the top; each may import those before it.
LAYERS = (
    "runtime",  # without PyTorch
    "_utils",
    "dropout",
    "backends",
    "ops",
    "rounding",
    "checkpoints",
    "adapters",
    "nn",
    "freezing",
    "verification",
    "zoo",
    "exporting",
    "training",
    "bench",
    "cli",
    "__main__",
)
PACKAGE = ROOT / "mvit_kernels"
MODULES = {
    ".".join(("mvit_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str, source: str, is_package: bool) -> Iterator[str]:
    """The modules of this package that `source` imports, inside of functions and for type checkers too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names if base in MODULES else ():
                if base == "mvit_kernels" and alias.name in mvit_kernels._EXPORTS:
                    yield f"mvit_kernels.{mvit_kernels._EXPORTS[alias.name]}"
                elif (name := f"{base}.{alias.name}") in MODULES or base != "mvit_kernels":
                    yield name if name in MODULES else base


def layer(module: str) -> str:
    return module.split(".")[1]


# The package's own __init__ names everything, and imports it on first use.
GRAPH = {
    module: set(imported(module, path.read_text(), path.name == "__init__.py")) - {module}
    for module, path in MODULES.items()
    if module != "mvit_kernels"
}


def test_every_module_has_its_layer():
    assert {layer(module) for module in GRAPH} == set(LAYERS)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_run_downwards(module):
    allowed = LAYERS[: LAYERS.index(layer(module)) + 1]
    upwards = [other for other in GRAPH[module] if layer(other) not in allowed]
    assert not upwards, f"{module} imports {', '.join(upwards)}, which is above it"


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize(
    "source, found",
    [
        ("from .. import accelerate, ops", {"adapters", "ops"}),
        ("def later():\n    from ..bench.suites import run", {"bench.suites"}),
        ("from ..backends import cpu, choose", {"backends", "backends.cpu"}),
        ("import mvit_kernels.cli.bench, torch", {"cli.bench"}),
        ("from .. import __version__\nfrom torch import nn", set()),
    ],
)
def test_every_way_to_import_is_seen(source, found):
    assert set(imported("mvit_kernels.ops.layer_norm", source, False)) == {f"mvit_kernels.{name}" for name in found}


def test_a_circle_would_be_seen():
    with pytest.raises(CycleError):
        TopologicalSorter(GRAPH | {"mvit_kernels._utils.files": {"mvit_kernels.cli"}}).prepare()
