# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the frozen networks' kernels, as test_compile.py has it for the operators'.

``data/triton_networks.csv`` has every convolution of xxs, xs and s; ``make gate`` rewrites it.
"""

import pytest
import torch

from gates import table
from gates.triton_gate import ARCHITECTURES, build, describe, judge_limits, judge_plans
from gates.triton_networks import TABLE, different, launch_of, layers
from mvit_kernels.backends import triton as backend

pytest.importorskip("triton", reason="Triton is not installed")
if backend.target.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)


COMMITTED = table.committed(TABLE)


PRODUCTS = (
    "convolution._convolution",
    "layer_norm_linear._normed_product",
    "projection_norm_linear._projected",
)


def judge(row):
    name = judge_limits(row)
    if row["kernel"] not in PRODUCTS or "ieee" in row["dtype"]:
        assert row["mma"] == "none", f"{name} rounds float32 to TF32"
    elif row["arch"] == 90 and any(f"BM={pixels} " in row["tile"] for pixels in (64, 128)):
        assert row["mma"] == "wgmma", f"{name} does not use wgmma"
    else:
        assert row["mma"] != "none", f"{name} does not use tensor cores"


def test_the_whole_table():
    assert {row["arch"] for row in COMMITTED} == set(ARCHITECTURES)
    assert len({row["triton"] for row in COMMITTED}) == 1
    for row in COMMITTED:
        judge(row)


def test_larger_filters_copy_while_they_multiply():
    rows = [row for row in COMMITTED if "KERNEL=3" in row["tile"] and "STEM" not in row["tile"]]
    assert rows and all(row["async_copies"] for row in rows)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_of_what_would_be_launched(arch):
    judge_plans((row for row, _ in different(arch)), (row for row in COMMITTED if row["arch"] == arch))


AGAIN = [
    (90, "stem.conv"),
    (90, "stages.1.1.depthwise.conv"),
    (90, "stages.1.1.project.conv"),
    (80, "stages.2.1.conv_fusion.conv"),
]


@pytest.mark.parametrize("arch, name", AGAIN)
def test_compiled_again(arch, name, monkeypatch):
    """The kernels keep the rules; compiled by the same Triton, they equal their rows of the table."""
    from mvit_kernels.backends.triton._launch import watching

    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    layer = next(layer for layer in layers("s") if layer.name == name)
    with watching(arch):
        launch = launch_of(layer, 256, torch.bfloat16)
    row = describe("", launch, arch) | build(launch, arch)
    judge(row)
    same = ("kernel", "dtype", "tile", "arch", "triton")
    for committed in COMMITTED:
        if all(committed[key] == row[key] for key in same):
            assert all(committed[key] == row[key] for key in ("registers", "shared", "mma")), "run `make gate`"
