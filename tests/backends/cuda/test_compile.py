# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: tensor cores in every one, and no spills.

``data/cuda_gate.csv`` has every kernel × architecture (``make gate`` rewrites it, in minutes; another nvcc shows up as
its diff). Here the whole table is judged; and where the CUDA library was built, its contents are compared with it.
"""

import csv
import json

import pytest

from gates.cuda_gate import ARCHITECTURES, TABLE, products, readable, tool, usage
from mvit_kernels.backends import library

LIBRARY = library.LIBRARY_DIRECTORY / "libmvit_kernels_cuda.so"


def _committed():
    with TABLE.open(newline="") as file:
        numbers = ("arch", "registers", "stack", "shared", "mma")
        return [row | {name: int(row[name]) for name in numbers} for row in csv.DictReader(file)]


COMMITTED = _committed()
# Bytes of stack that do not matter: two registers of the loop over layers, in a kernel that uses all 255.
DECLARED_STACK = {"transformer_kernel<BFloat16, 192, 48, 2>": 8, "transformer_kernel<Half, 192, 48, 2>": 8}


def test_the_whole_table():
    assert {row["arch"] for row in COMMITTED} == set(ARCHITECTURES)
    assert len({row["nvcc"] for row in COMMITTED}) == 1
    kernels = [{row["kernel"] for row in COMMITTED if row["arch"] == arch} for arch in ARCHITECTURES]
    assert all(each == kernels[0] for each in kernels)
    for row in COMMITTED:
        name = f"{row['kernel']} on sm_{row['arch']}"
        assert row["stack"] <= DECLARED_STACK.get(row["kernel"], 0), f"{name} spills: {row['stack']} bytes of stack"
        assert row["shared"] <= 1024, f"{name} has {row['shared']} bytes of shared memory that its plan does not know"
        assert row["registers"] <= 255
        assert row["mma"] > 0, f"{name} does not use tensor cores"


def built_architectures():
    """The architectures of the library that was built here, and the compiler's version."""
    if not LIBRARY.exists():
        info = json.loads((library.LIBRARY_DIRECTORY / "build_info.json").read_text())["cuda"]
        assert info["reason"].startswith("no CUDA compiler"), info
        pytest.skip(info["reason"])
    if tool("cuobjdump") is None:
        pytest.skip("there is no cuobjdump: neither a CUDA toolkit's nor Triton's")
    info = json.loads((LIBRARY.parent / "build_info.json").read_text())["cuda"]
    wanted = {f"sm_{arch}": arch for arch in ARCHITECTURES}
    return [wanted[name] for name in info["architectures"] if name in wanted], info["compiler"]


def test_the_library_is_what_the_table_has():
    """Every kernel of every architecture that was built keeps the rules; built by the same nvcc, it equals its row."""
    architectures, compiler = built_architectures()
    assert architectures
    for arch in architectures:
        known = {row["kernel"]: row for row in COMMITTED if row["arch"] == arch}
        used = usage(LIBRARY, arch)
        names = readable(list(used))
        assert set(names) == set(known), "run `make gate` and look at the diff of the table"
        for name, found in zip(names, used.values(), strict=True):
            assert found["stack"] <= DECLARED_STACK.get(name, 0), f"{name} on sm_{arch} spills"
            if f"nvcc {known[name]['nvcc']} " in compiler:
                assert found == {key: known[name][key] for key in found}, f"{name} on sm_{arch}: run `make gate`"


@pytest.mark.parametrize("kernel", ["transformer_kernel<BFloat16, 144, 36, 2>", "transformer_kernel<Half, 240, 60, 1>"])
def test_products_of_the_library(kernel):
    """Counted again for a few: listing all of them takes half a minute."""
    architectures, compiler = built_architectures()
    for arch in architectures:
        (known,) = (row for row in COMMITTED if row["arch"] == arch and row["kernel"] == kernel)
        used = usage(LIBRARY, arch)
        symbol = next(s for s, name in zip(used, readable(list(used)), strict=True) if name == kernel)
        counted = products(LIBRARY, arch, symbol)[symbol]
        assert counted > 0
        if f"nvcc {known['nvcc']} " in compiler:
            assert counted == known["mma"], "run `make gate`"
