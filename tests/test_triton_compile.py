# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the kernels for GPUs that are not here: tensor cores, no spills, shared memory that
fits.

``data/triton_gate.csv`` has every kernel × tile × architecture (``make gate`` writes it anew, in about a quarter of an
hour; another Triton shows as its diff). Here the whole table is judged, and compared with what the operators would
launch today; a few of its rows, the largest tiles of each kernel, are compiled again.
"""

import csv

import pytest
from _triton_gate import ARCHITECTURES, SHARED_LIMIT, TABLE, build, describe, different, stage

from mvit_kernels import triton as backend

triton = pytest.importorskip("triton", reason="Triton is not installed")
if backend.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)


def _committed():
    with TABLE.open(newline="") as file:
        numbers = ("arch", "registers", "stack", "shared", "async_copies")
        return [row | {name: int(row[name]) for name in numbers} for row in csv.DictReader(file)]


COMMITTED = _committed()


WITHOUT_PRODUCTS = ("_gradients._sum_parts", "_dropout._drop", "layer_norm._forward", "layer_norm._backward")


def judge(row):
    """The rules that every compiled kernel keeps."""
    name = f"{row['kernel']} {row['dtype']} on sm_{row['arch']}: {row['tile']}"
    assert row["stack"] == 0, f"{name} spills: {row['stack']} bytes of stack"
    assert row["shared"] <= SHARED_LIMIT[row["arch"]], f"{name} does not launch: {row['shared']} bytes of shared memory"
    if row["kernel"] in WITHOUT_PRODUCTS:
        return
    if "ieee" in row["dtype"]:
        assert row["mma"] == "none", f"{name} rounds float32 to TF32"
    else:
        assert row["mma"] != "none", f"{name} does not use tensor cores"


def test_the_whole_table():
    assert {row["arch"] for row in COMMITTED} == set(ARCHITECTURES)
    assert len({row["triton"] for row in COMMITTED}) == 1
    for row in COMMITTED:
        judge(row)


@pytest.mark.parametrize("kernel", ["_product", "_normed_product", "_mlp", "_weight_gradients", "_norm_backward"])
def test_large_products_are_hopper_s_own(kernel):
    """wgmma reads its operand from shared memory once for 64 rows; smaller tiles fall back to mma.sync without a
    word."""
    rows = [r for r in COMMITTED if r["kernel"].endswith(f".{kernel}") and r["arch"] == 90 and "16" in r["dtype"]]
    assert rows and all(row["mma"] == "wgmma" and row["async_copies"] for row in rows)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_of_what_would_be_launched(arch):
    """A change of tiles, of the plan, or of a kernel's constants wants a new table."""
    columns = ("case", "kernel", "dtype", "tile", "arch")
    planned = [row for row, _ in different(arch)]
    committed = [{name: row[name] for name in columns} for row in COMMITTED if row["arch"] == arch]

    def count(rows):
        return sorted(tuple(map(str, row.values())) for row in rows)

    assert count(planned) == count(committed), "run `make gate` and look at the table's diff"


AGAIN = [
    *((90, 144, name, "") for name in ("_normed_product", "_mlp", "_norm_backward", "_backward_whole", "_product")),
    *((90, 144, name, "DROP=1") for name in ("_mlp", "_product", "_drop")),
    *((80, 144, name, "") for name in ("_hidden", "patch_attention._forward", "layer_norm._backward")),
    (80, 144, "_weight_gradients", "N3="),  # a whole layer's
    *((100, 192, name, "") for name in ("_mlp", "patch_attention._forward", "_backward_whole")),
    *((120, 240, name, "") for name in ("_mlp", "_normed_product")),
    (120, 240, "_norm_backward", "DROP=1"),
    *((90, 240, name, "") for name in ("short.forward", "short.backward")),
    (90, 64, "_sum_parts", ""),
]


@pytest.mark.parametrize("arch, d, name, has", AGAIN)
def test_compiled_again(arch, d, name, has, monkeypatch):
    """By the rules; and by the same Triton, the same as in the table."""
    import torch

    cache = TABLE.parents[2] / "build" / "triton"  # a second run compiles nothing that did not change
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    launches = stage(d, 64, torch.bfloat16, "highest", arch, 0.1)
    described = [(describe("", each, arch), each) for each in launches]
    launch = next(each for row, each in described if row["kernel"].endswith(name) and has in row["tile"])
    known = describe(f"d={d}", launch, arch)
    row = known | build(launch, arch)
    judge(row)
    committed = [r for r in COMMITTED if all(r[key] == value for key, value in known.items())]
    assert committed, "run `make gate`"
    if row["triton"] == committed[0]["triton"]:
        assert row in committed, f"{row} is not what {TABLE.name} has: run `make gate` and look at its diff"
