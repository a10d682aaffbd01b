# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the kernels for GPUs that are not here: tensor cores, no spills, shared memory that
fits.

``data/triton_gate.csv`` has every kernel × tile × architecture (``make gate`` rewrites it, in about a quarter of an
hour; another Triton shows up as its diff). Here the whole table is judged, and compared with what the operators would
launch today; a few of its rows, the largest tiles of each kernel, are compiled again.
"""

import re

import pytest
import torch

from gates import addresses, machine_code, table
from gates.triton_gate import (
    ARCHITECTURES,
    TABLE,
    build,
    compiled_for,
    contracted_sums,
    describe,
    different,
    float32_operations,
    judge_limits,
    judge_plans,
    map_of,
    stage,
)
from mvit_kernels.backends import triton as backend

triton = pytest.importorskip("triton", reason="Triton is not installed")
if backend.target.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)


COMMITTED = table.committed(TABLE)


WITHOUT_PRODUCTS = ("_weight_gradients._sum_parts", "_dropout._drop", "layer_norm._forward", "layer_norm._backward")
WITHOUT_PRODUCTS += tuple(
    f"batch_norm_activation.{name}"
    for name in (
        *("_statistics", "_combine_statistics", "_normalise", "_forward"),
        *("_sum_gradients", "_combine_gradients", "_gradient", "_backward"),
    )
)


def judge(row):
    """The rules that every compiled kernel keeps."""
    name = judge_limits(row)
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


@pytest.mark.parametrize(
    "kernel", ["_product", "_product_resident", "_normed_product", "_mlp", "_weight_gradients", "_norm_backward"]
)
def test_large_products_are_hopper_s_own(kernel):
    """wgmma reads its operand from shared memory once for 64 rows; smaller tiles silently fall back to mma.sync."""
    rows = [r for r in COMMITTED if r["kernel"].endswith(f".{kernel}") and r["arch"] == 90 and "16" in r["dtype"]]
    assert rows and all(row["mma"] == "wgmma" for row in rows)
    one_turn = [row for row in rows if row["tile"].startswith("K=64 ") and "BK=64" in row["tile"]]  # nothing to overlap
    assert all(row["async_copies"] for row in rows if row not in one_turn)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_of_what_would_be_launched(arch):
    """A change of tiles, of the plan, or of a kernel's constants needs a new table."""
    judge_plans((row for row, _ in different(arch)), (row for row in COMMITTED if row["arch"] == arch))


# Every kernel, and every architecture, but not each on each: a kernel takes two to six seconds.
AGAIN = [
    *((90, 144, name, "") for name in ("_normed_product", "_mlp", "_norm_backward", "_backward_whole", "_resident")),
    *((90, 144, name, "DROP=1") for name in ("_mlp", "_resident", "_drop")),
    *((90, 240, name, "DROP=1") for name in ("residual._product",)),
    *((80, 144, name, "") for name in ("_hidden", "patch_attention._forward", "layer_norm._backward")),
    (80, 144, "_weight_gradients", "N3="),  # a whole layer's
    (100, 192, "patch_attention._forward", ""),
    (120, 240, "_mlp", ""),
    (120, 240, "_norm_backward", "DROP=1"),
    *((90, 240, name, "") for name in ("short.forward", "short.backward")),
    (90, 192, "patch_attention._forward", ""),
    (90, 64, "_sum_parts", ""),
]


@pytest.mark.parametrize("arch, d, name, has", AGAIN)
def test_compiled_again(arch, d, name, has, monkeypatch):
    """The kernels keep the rules; compiled by the same Triton, they equal their rows of the table."""
    cache = TABLE.parents[2] / "build" / "triton"  # a second run compiles nothing that did not change
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    launches = stage(d, 64, torch.bfloat16, "highest", arch, 0.1)
    described = [(describe("", each, arch), each) for each in launches]
    launch = next(each for row, each in described if row["kernel"].endswith(name) and has in row["tile"])
    known = describe(f"d={d}", launch, arch)
    row = known | build(launch, arch)
    judge(row)
    if arch == 90:
        code = machine_code.disassembled(compiled_for(launch, arch).asm["cubin"])
        assert addresses.outside(code, launch, row["shared"]) == []
    committed = [r for r in COMMITTED if all(r[key] == value for key, value in known.items())]
    assert committed, "run `make gate`"
    if row["triton"] == committed[0]["triton"]:
        assert row in committed, f"{row} is not what {TABLE.name} has: run `make gate` and look at its diff"


@pytest.mark.parametrize("kernel, waits", [("_normed_product", 3), ("_mlp", 4), ("_product_resident", 9)])
def test_rows_on_hopper_take_wide_products_and_copies(kernel, waits, monkeypatch):
    """144 = 64 + 64 + 16 columns: all but the last 16 are multiplied 32 and more at a time and copied by 16 bytes, and
    a wait comes behind the products of a chunk. (With chunks of 16 the MLP had 36 products of 16 and 8 columns, copied
    by 4 bytes.)"""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    launches = stage(144, 64, torch.bfloat16, "highest", 90, 0.0)
    launch = next(each for each in launches if each.plan.kernel.fn.__name__ == kernel)
    ptx = compiled_for(launch, 90).asm["ptx"]
    columns = [int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", ptx)]
    sizes = [int(n, 16) for n in re.findall(r"cp\.async\.c\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)]
    assert sum(n for n in columns if n >= 32) >= 0.85 * sum(columns) > 0
    assert sum(n for n in sizes if n == 16) >= 0.8 * sum(sizes) > 0
    assert ptx.count("wgmma.wait_group") <= waits


@pytest.mark.parametrize(
    "kernel", ["_statistics", "_normalise", "_sum_gradients", "_gradient", "_forward", "_backward"]
)
def test_maps_are_read_and_written_in_vectors(kernel, monkeypatch):
    """A width is known at run time alone, and is a multiple of 8 all the same: 16 bytes a load, and a store. (The one
    load of 2 bytes is of the value that a channel's sums start from.)"""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    launches = map_of(144, 1 if kernel in ("_forward", "_backward") else 64, torch.bfloat16, 90)
    launch = next(each for each in launches if each.plan.kernel.fn.__name__ == kernel)
    ptx = compiled_for(launch, 90).asm["ptx"]
    loads = re.findall(r"ld\.global\S*", ptx)
    assert any(".v4." in load for load in loads)
    assert sum(".b16" in load for load in loads) <= 1
    results = [store for store in re.findall(r"st\.global\S*", ptx) if ".b16" in store or ".v4." in store]
    assert all(".v4." in store for store in results) and bool(results) == (
        kernel not in ("_statistics", "_sum_gradients")
    )
    row = describe("d=144", launch, 90)
    row |= build(launch, 90)
    judge(row)
    if row["triton"] == COMMITTED[0]["triton"]:
        assert row in COMMITTED, "run `make gate` and look at the table's diff"


# ----------------------------------------------------------------------------------------------- how float32 is rounded


def operations_of(arch, monkeypatch, kernel, launch):
    """The float32 operations of the kernel of this name; `launch` is called with the kernels' modules, to launch it."""
    from mvit_kernels.backends.triton import layer_norm, layer_norm_linear, layer_norm_mlp, linear_residual
    from mvit_kernels.backends.triton._launch import watching

    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    with watching(arch) as launches:
        launch(layer_norm, layer_norm_linear, layer_norm_mlp, linear_residual)
    (found,) = [each for each in launches if each.plan.kernel.fn.__name__ == kernel]
    return float32_operations(compiled_for(found, arch).asm["ptx"])


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("d, dtype", [(1, torch.float32), (24, torch.bfloat16)])
@pytest.mark.parametrize("kernel", ["_backward", "_norm_backward", "_gradient"])
def test_a_mean_is_subtracted_from_rounded_products(kernel, d, dtype, arch, monkeypatch):
    """In rows of one column the gradient of x is g · γ minus its mean, which is g · γ itself: 0. Unless prevented, the
    compiler fuses g · γ − mean into one fma with an unrounded product: 1e-5 on an H200, and 0 in any interpreter.
    Batch norm's is SiLU's gradient less its mean."""

    def launch(layer_norm, layer_norm_linear, *_):
        x, norm, rows = empty(5, d, dtype=dtype), empty(d), empty(5)
        if kernel == "_backward":
            layer_norm.backward(x, x, rows, rows, norm)
        else:
            weight = empty(8, d, dtype=dtype)
            layer_norm_linear.backward(empty(5, 8, dtype=dtype), x, rows, rows, norm, norm, weight, None, "")

    if kernel == "_gradient":
        given = map_of(d, 64, dtype, arch)
        found = next(each for each in given if each.plan.kernel.fn.__name__ == kernel)
        operations = float32_operations(compiled_for(found, arch).asm["ptx"])
    else:
        operations = operations_of(arch, monkeypatch, kernel, launch)
    kinds = [kind for kind, _ in operations.values()]
    assert "sub" in kinds and "fma" in kinds

    def kind_of(register):
        return operations.get(register, ("",))[0]

    if kernel == "_gradient":  # from the fma that rounds the product
        assert [True for kind, operands in operations.values() if kind == "sub" and kind_of(operands[0]) == "fma"]

    for register, (kind, operands) in operations.items():
        if kind == "fma":
            assert kind_of(operands[2]) != "neg", f"{register}: a product in full, less a rounded number"
        if kind == "sub":
            assert "mul" not in map(kind_of, operands), f"{register}: ptxas may make an fma of it"


def test_lanes_agree_about_a_sum(monkeypatch):
    """Where each has one product of it; `contracted_sums` knows the pattern, under Triton 3.6's register names too."""
    from mvit_kernels.backends.triton import layer_norm, layer_norm_linear
    from mvit_kernels.backends.triton._launch import watching

    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    x, norm, rows = empty(130, 24), empty(24), empty(130)
    with watching(80) as launches:
        layer_norm.backward(x, x, rows, rows, norm)
        layer_norm_linear.backward(empty(130, 8), x, rows, rows, norm, norm, empty(8, 24), None, "")
    for launch in launches:
        ptx = compiled_for(launch, 80).asm["ptx"]
        assert contracted_sums(ptx) == [], launch.plan.kernel.fn.__name__
    step = "mul.f32 \t%{0}1, %{0}2, %{0}3;\n{1}\nfma.rn.f32 \t%{0}6, %{0}2, %{0}3, %{0}5;"
    for register, shuffle in (
        ("r", "shfl.sync.bfly.b32 \t%r5, %r1, 16, 31, -1;"),
        ("f", "mov.b32 \t%r1, %f1;\nshfl.sync.bfly.b32 \t%r5, %r1, 16, 31, -1;\nmov.b32 \t%f5, %r5;"),
    ):
        text = step.format(register, shuffle)
        assert len(contracted_sums(text)) == 1
        assert contracted_sums(text.replace("fma.rn.f32", "add.f32")) == []


@pytest.mark.parametrize("kernel", ["_product", "_normed_product", "_norm_backward", "_mlp", "_hidden"])
def test_float32_products_are_summed_in_blocks(kernel, monkeypatch):
    """Each step of a long product starts a new chain from 0; left alone, Triton would make one chain of them all."""

    def launch(_, layer_norm_linear, layer_norm_mlp, linear_residual):
        x, norm, rows, weight = empty(5, 96), empty(96), empty(5), empty(96, 96)
        if kernel == "_product":
            linear_residual.forward(x, weight, None, x)
        elif kernel == "_normed_product":
            layer_norm_linear.forward(x, norm, norm, weight, None, 1e-5, "")
        elif kernel == "_norm_backward":
            layer_norm_linear.backward(x, x, rows, rows, norm, norm, weight, None, "")
        elif kernel == "_mlp":
            layer_norm_mlp.forward(x, norm, norm, weight, norm, weight, norm, 1e-5)
        else:
            layer_norm_mlp.backward(x, x, rows, rows, norm, norm, weight, norm, weight)

    operations = operations_of(90, monkeypatch, kernel, launch)
    sums = {register: operands[2] for register, (kind, operands) in operations.items() if kind == "fma"}
    followed = set(sums.values())
    longest = 0
    for last in sums.keys() - followed:
        terms, at = 0, last
        while at in sums:
            terms, at = terms + 1, sums[at]
        if terms >= 16:
            longest = max(longest, terms)
            assert at == "0f00000000", f"a chain of {terms} products goes on from {at}"
    assert 16 <= longest <= 32
