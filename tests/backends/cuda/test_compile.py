# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: tensor cores in every one, and in no loop a division or a spill.

``data/cuda_gate.csv`` has every kernel × architecture (``make gate`` rewrites it, in minutes; another nvcc shows up as
its diff). Here the whole table is judged; and where the CUDA library was built, its contents are compared with it.
"""

import json

import pytest

from gates import sass, table
from gates.cuda_gate import ARCHITECTURES, TABLE, listed, readable, tool, usage
from mvit_kernels.backends import library

LIBRARY = library.LIBRARY_DIRECTORY / "libmvit_kernels_cuda.so"


COMMITTED = table.committed(TABLE)
# Bytes of stack, and accesses to them in loops, by rows and heads and architecture, in kernels that use all of 255
# registers: at 192 the accumulators of 32 rows are 192 of them, at 240 those of 16 rows 120, beside all heads' results.
DECLARED = {
    ("192, 48, 2", 100): (8, 2),
    ("240, 60, 1", 90): (8, 0),
    ("240, 8, 1", 80): (8, 9),
}
# Integer divisions in loops: where the next row or chunk lies, once in many instructions. A layer of the one-launch
# kernel has none; 85 made it take twice as long.
DIVISIONS = {
    "few_rows_mlp_kernel": 0,
    "inverted_residual_kernel": 0,
    "layer_norm_mlp_kernel": 0,
    "patch_attention_backward_kernel": 2,
    "patch_attention_backward_whole_kernel": 1,
    "patch_attention_kernel": 1,
    "row_product_kernel": 0,
    "transformer_kernel": 0,
}


def declared(kernel, arch):
    """Stack, and accesses to it in loops, of `transformer_kernel<BFloat16, 192, 48, 2>`."""
    name, _, constants = kernel.rstrip(">").partition("<")
    return DECLARED.get((constants.partition(", ")[2], arch), (0, 0)) if name == "transformer_kernel" else (0, 0)


def test_the_whole_table():
    assert {row["arch"] for row in COMMITTED} == set(ARCHITECTURES)
    assert len({row["nvcc"] for row in COMMITTED}) == 1
    kernels = [{row["kernel"] for row in COMMITTED if row["arch"] == arch} for arch in ARCHITECTURES]
    assert all(each == kernels[0] for each in kernels)
    for row in COMMITTED:
        name = f"{row['kernel']} on sm_{row['arch']}"
        stack, spilled = declared(row["kernel"], row["arch"])
        assert row["stack"] <= stack, f"{name} spills: {row['stack']} bytes of stack"
        assert row["spilled"] <= spilled, f"{name} spills in a loop: {row['spilled']} accesses"
        most = DIVISIONS[row["kernel"].partition("<")[0]]
        assert row["divisions"] <= most, f"{name} divides in loops, {row['divisions']} times"
        assert row["shared"] <= 1024, f"{name} has {row['shared']} bytes of shared memory that its plan does not know"
        assert row["registers"] <= 255
        assert row["mma"] > 0, f"{name} does not use tensor cores"


# A division before the loop from 0x30 to 0x60, one in a function that the loop calls, none or one in the loop itself.
LISTING = """
		Function : _Z6kernelv
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/                   I2F.U32.RP R4, R15 ;      /* 0x0000000f00047306 */
        /*0020*/               @P0 BRA 0x70 ;                /* 0x0000000400000947 */
        /*0030*/                   {inside} ;                /* 0x0000000000000000 */
        /*0040*/                   {call} ;                  /* 0x0000000000000000 */
        /*0050*/                   LDL R3, [R1] ;            /* 0x0000000000000000 */
        /*0060*/              @!P1 BRA 0x30 ;                /* 0xfffffffc00e09947 */
        /*0070*/                   STL [R1], R3 ;            /* 0x0000000000000000 */
        /*0080*/                   EXIT ;                    /* 0x000000000000794d */
        /*0090*/                   I2F.RP R4, R5 ;           /* 0x0000000000000000 */
        /*00a0*/                   RET.REL.NODEC R2 0x0 ;    /* 0x0000000000000000 */
        /*00b0*/                   BRA 0xb0;                 /* 0xfffffffc00fc7947 */
"""


@pytest.mark.parametrize(
    "inside, call, divisions",
    [
        ("I2F.RP R4, R15", "NOP", 1),
        ("I2F.U32.RP R4, R15", "NOP", 1),
        ("I2F.S64 R4, R15", "NOP", 0),  # a conversion
        ("FADD R4, R15, R3", "NOP", 0),
        ("FADD R4, R15, R3", "CALL.REL.NOINC 0x90", 1),
    ],
)
def test_what_is_counted_in_loops(inside, call, divisions):
    ((name, code),) = sass.functions(LISTING.format(inside=inside, call=call).splitlines())
    assert (name, len(code)) == ("_Z6kernelv", 12)
    assert sum(each.divides for each in code) == 2 + inside.startswith(("I2F.RP", "I2F.U32"))
    assert sass.in_loops(code, lambda each: each.divides) == divisions
    assert sass.in_loops(code, lambda each: each.spills) == 1


def test_a_jump_to_nowhere_is_refused():
    listing = LISTING.format(inside="BRX R4 -0x20", call="NOP")
    ((_, code),) = sass.functions(listing.splitlines())
    with pytest.raises(ValueError, match="BRX R4 -0x20 at 0x30 jumps to where the listing does not tell"):
        sass.in_loops(code, lambda each: each.divides)


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
            assert found["stack"] <= declared(name, arch)[0], f"{name} on sm_{arch} spills"
            if f"nvcc {known[name]['nvcc']} " in compiler:
                assert found == {key: known[name][key] for key in found}, f"{name} on sm_{arch}: run `make gate`"


@pytest.mark.parametrize("kernel", ["transformer_kernel<BFloat16, 144, 36, 2>", "transformer_kernel<Half, 240, 60, 1>"])
def test_listings_of_the_library(kernel):
    """Counted again for a few: listing all of them takes half a minute."""
    architectures, compiler = built_architectures()
    for arch in architectures:
        (known,) = (row for row in COMMITTED if row["arch"] == arch and row["kernel"] == kernel)
        used = usage(LIBRARY, arch)
        symbol = next(s for s, name in zip(used, readable(list(used)), strict=True) if name == kernel)
        counted = listed(LIBRARY, arch, symbol)[symbol]
        assert counted["mma"] > 0 and counted["divisions"] == 0
        if f"nvcc {known['nvcc']} " in compiler:
            assert counted == {key: known[key] for key in counted}, "run `make gate`"
