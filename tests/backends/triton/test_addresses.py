# SPDX-License-Identifier: Apache-2.0
"""The addresses of machine code: an assembler's mistake that was seen on a GPU, and mistakes that are planted.

What is compiled here is looked at in test_compile.py.
"""

import pytest
import torch

from gates import addresses, sass
from gates.triton_gate import stage
from mvit_kernels.backends import triton as backend
from support import TESTS
from support.sass.block import Block
from support.sass.operands import Unknown

pytest.importorskip("triton", reason="Triton is not installed")
if backend.target.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: launches are not planned for a GPU", allow_module_level=True)

LISTING = (TESTS / "data" / "attention_by_ptxas_12_8.sass").read_text()
RIGHT = LISTING.replace("UR21", "UR4")
SHARED = 12288  # bytes of this kernel's block


@pytest.fixture(scope="module")
def attention():
    """The kernel's launch: stage 4 of S, 64 images."""
    for launch in stage(192, 64, torch.bfloat16, "highest", 90):
        kernel = launch.plan.kernel.fn
        if kernel.__name__ == "_forward" and kernel.__module__.endswith(".patch_attention"):
            return launch
    raise AssertionError("there is no such launch")


def code_of(listing):
    return list(filter(None, map(sass.instruction, listing.splitlines())))


def test_operands_from_a_register_that_nothing_writes(attention):
    lines = addresses.outside(code_of(LISTING), attention, SHARED)
    assert [line.partition(",")[0] for line in lines] == [
        f"shared memory at {at:#x}" for at in (0x1960, 0x19B0, 0x1A10)
    ]
    assert all("HGMMA.64x16x16" in line for line in lines)
    assert addresses.outside(code_of(RIGHT), attention, SHARED) == []


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ("[R64+UR18+0x1800], R8", "[R64+UR18+0x3000], R8", "shared memory at 0x700, STS.128"),
        ("[R64+UR18+0x1800], R8", "[R64+UR18-0x100], R8", "shared memory at 0x700, STS.128"),
        ("UR5, UR18, 0x2000, URZ", "UR5, UR18, 0x2c00, URZ", "shared memory at 0x840, HGMMA"),
        ("UIMAD.WIDE.U32 UR4, UR19, 0x48000, URZ", "UIMAD.WIDE.U32 UR4, UR19, 0x49000, URZ", "global memory at 0x460"),
        ("LDG.E.128 R24, desc[UR22][R24.64]", "LDG.E.128 R24, desc[UR22][R24.64-0x4000]", "global memory at 0x460"),
    ],
)
def test_planted_mistakes_are_found(attention, before, after, where):
    """A store behind shared memory and before it, an operand behind it, images too far apart, a row too early."""
    assert before in RIGHT
    lines = addresses.outside(code_of(RIGHT.replace(before, after)), attention, SHARED)
    assert any(line.startswith(where) for line in lines), lines


def test_tensors_and_shared_memory_that_are_too_small(attention):
    qkv, out, logsumexp = attention.tensors
    fewer = attention._replace(tensors=(qkv[:63], out, logsumexp))
    assert any("LDG" in line for line in addresses.outside(code_of(RIGHT), fewer, SHARED))
    fewer = attention._replace(tensors=(qkv, out, logsumexp[:, :, :, :63]))
    assert any("STG" in line for line in addresses.outside(code_of(RIGHT), fewer, SHARED))
    assert any("shared" in line for line in addresses.outside(code_of(RIGHT), attention, SHARED - 16))


@pytest.mark.parametrize(("columns", "size"), [(64, 0x3000 + 0x400), (128, 0x8000 + 0x3000 + 0x400)])
def test_a_transposed_operand_is_as_wide_as_the_product(columns, size):
    """Rows of 128 bytes have 64 of its columns; the next 64 are the leading offset away, 0x8000 bytes. Its sixteen
    rows are two groups of eight, 0x3000 bytes apart, and a group takes 0x400."""
    low, high = 0x8000 >> 4 << 16 | 0x400 >> 4, 1 << 30 | 0x3000 >> 4
    lines = (
        f"UMOV UR6, {low:#x}",
        f"UMOV UR7, {high:#x}",
        f"HGMMA.64x{columns}x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24",
    )
    block = Block(
        code_of("\n".join(f" /*{16 * at:04x}*/ {line} ;" for at, line in enumerate(lines))),
        128,
        bytes(0x1000),
        (0, 0, 0),
    )
    block.run()
    (access,) = block.accesses
    assert (access.address[0], access.size[0]) == (0x400, size)


def test_what_is_not_known_is_said():
    with pytest.raises(Unknown, match="FROBNICATE R1, R2"):
        Block(code_of(" /*0000*/ FROBNICATE R1, R2 ;"), 32, bytes(0x1000), (0, 0, 0)).run()
    with pytest.raises(Unknown, match="no end"):
        Block(code_of(" /*0000*/ MOV R1, R2 ;\n /*0010*/ BRA 0x0 ;"), 32, bytes(0x1000), (0, 0, 0)).run(most=100)
