# SPDX-License-Identifier: Apache-2.0
"""How PTX is read, translated and executed on the CPU (support/ptx), by texts written by hand."""

import struct

import pytest
import torch

from support.emulation import EmulationFault
from support.ptx.parse import parse
from support.ptx.program import Program, kind_of, written
from support.ptx.translate import translate


def entry(body, parameters=".param .u64 out"):
    return f"""
.version 8.8
.target sm_80
.extern .shared .align 16 .b8 dynamic[];
.visible .entry made({parameters})
.reqntid 32
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .b64 %d<9>;
    .loc 1 7 3 // written.py:7:3
    ld.param.u64 %d1, [out];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %d2, %r0, 4, %d1; // each thread's place
{body}
    ret;
}}"""


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


A, B = 0xDEADBEEF, 0x12345678
ONE, THREE, TINY = bits(1.0), bits(3.0), 0x00000001
# An instruction that sets %r9 from %r1 = A and %r2 = B, or from what is written out; and the value.
OPERATIONS = {
    "add.s32 %r9, %r1, %r2": (A + B) & 0xFFFFFFFF,
    "sub.s32 %r9, %r2, %r1": (B - A) & 0xFFFFFFFF,
    "mul.lo.s32 %r9, %r1, %r2": A * B & 0xFFFFFFFF,
    "mul.hi.u32 %r9, %r1, %r2": A * B >> 32,
    "mul.hi.s32 %r9, %r1, %r2": (A - 2**32) * B >> 32 & 0xFFFFFFFF,
    "mad.lo.s32 %r9, %r1, 3, 4": A * 3 + 4 & 0xFFFFFFFF,
    "div.s32 %r9, -7, 2": -3 & 0xFFFFFFFF,
    "rem.s32 %r9, -7, 2": -1 & 0xFFFFFFFF,
    "div.u32 %r9, %r1, 1000": A // 1000,
    "shl.b32 %r9, %r1, 4": A << 4 & 0xFFFFFFFF,
    "shl.b32 %r9, %r1, 32": 0,
    "shr.u32 %r9, %r1, 4": A >> 4,
    "shr.s32 %r9, %r1, 4": (A - 2**32) >> 4 & 0xFFFFFFFF,
    "shr.s32 %r9, %r1, 99": 0xFFFFFFFF,
    "bfe.u32 %r9, %r1, 4, 8": A >> 4 & 255,
    "bfe.s32 %r9, %r1, 4, 8": (A >> 4 & 255) - 256 & 0xFFFFFFFF,
    "bfi.b32 %r9, %r2, %r1, 8, 16": A & 0xFF0000FF | (B & 0xFFFF) << 8,
    "prmt.b32 %r9, %r1, %r2, 0x5410": B << 16 & 0xFFFF0000 | A & 0xFFFF,
    "prmt.b32 %r9, %r1, %r2, 0x8c08": 0xFF00EFFF,
    "lop3.b32 %r9, %r1, %r2, 0xff, 0x6a": (A & B) ^ 0xFF,
    "shf.l.wrap.b32 %r9, %r1, %r2, 8": B << 8 & 0xFFFFFFFF | A >> 24,
    "min.s32 %r9, %r1, %r2": A,
    "max.u32 %r9, %r1, %r2": A,
    "not.b32 %r9, %r1": ~A & 0xFFFFFFFF,
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1": 1,
    "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1": 2,
    "setp.neu.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r9, 1, 2, %p1": 1,
    "setp.ne.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r9, 1, 2, %p1": 2,
    "setp.eq.s32 %p2, %r1, %r2; setp.lt.and.s32 %p1|%p3, 1, 2, !%p2; selp.b32 %r9, 1, 2, %p1": 1,
    "mov.pred %p1, -1; mov.b32 %r9, 5; @!%p1 mov.b32 %r9, 6": 5,
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r9, {%h2, %h1}": 0xBEEFDEAD,
    "mov.b64 %d5, {%r1, %r2}; shr.u64 %d5, %d5, 16; cvt.u32.u64 %r9, %d5": 0x5678DEAD,
    "mov.b64 {_, %r9}, 0x0000000700000001": 7,
    "cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r9, %h1": 0xFFFFBEEF,
    "{ .reg .b32 %r1; mov.b32 %r1, 3; } mov.b32 %r9, %r1": A,
    f"add.f32 %r9, 0f{ONE:08X}, 0f{THREE:08X}": bits(4.0),
    "fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002": 0x28800000,  # 2⁻⁴⁶, exactly
    f"add.ftz.f32 %r9, 0f{TINY:08X}, 0f{TINY:08X}": 0,
    f"add.rn.f32 %r9, 0f{TINY:08X}, 0f{TINY:08X}": 2,
    "max.f32 %r9, 0f7FC00000, 0f3F800000": ONE,
    "neg.f32 %r9, 0f3F800000": bits(-1.0),
    "div.rn.f32 %r9, 0f3F800000, 0f40400000": bits(1 / 3),
    "cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40400000": 0x3F804040,  # the first is the upper half
    "cvt.rn.f16x2.f32 %r9, 0f3F800000, 0f40400000": 0x3C004200,
    "cvt.rn.bf16.f32 %h1, 0f3F808000; cvt.f32.bf16 %r9, %h1": ONE,  # a tie, to even
    "cvt.rn.f32.s32 %r9, -3": bits(-3.0),
    "cvt.rzi.s32.f32 %r9, 0fC0700000": -3 & 0xFFFFFFFF,  # of −3.75
}


def test_operations():
    body = f"mov.b32 %r1, {A:#x}; mov.b32 %r2, {B:#x};\n"
    for place, operation in enumerate(OPERATIONS):
        body += f"mov.b32 %r9, 0;\n{operation};\nst.global.b32 [%d2+{128 * place}], %r9;\n"
    out = torch.zeros(len(OPERATIONS), 32, dtype=torch.int32)
    Program(entry(body)).launch((1,), 32, arguments=[out])
    assert (out == out[:, :1]).all()
    for (operation, wanted), value in zip(OPERATIONS.items(), out[:, 0].tolist(), strict=True):
        assert value & 0xFFFFFFFF == wanted, f"{operation} gives {value & 0xFFFFFFFF:#x}, not {wanted:#x}"


# By instruction, what lane l gets of 10 · l.
SHUFFLES = {
    "shfl.sync.bfly.b32 %r9|%p1, %r8, 5, 31, -1": lambda lane: lane ^ 5,
    "shfl.sync.idx.b32 %r9|%p1, %r8, 3, 31, 0xffffffff": lambda lane: 3,
    "shfl.sync.up.b32 %r9|%p1, %r8, 2, 0, -1": lambda lane: lane - 2 if lane >= 2 else lane,
    "shfl.sync.down.b32 %r9|%p1, %r8, 2, 31, -1": lambda lane: lane + 2 if lane < 30 else lane,
    "shfl.sync.bfly.b32 %r9|%p1, %r8, 8, 0x1807, -1": lambda lane: (
        lane & ~8
    ),  # past the end of 0 to 7, and not of 8 to 15
}


def test_lanes():
    body = "mul.lo.s32 %r8, %r0, 10;\n"
    for place, operation in enumerate(SHUFFLES):
        body += f"{operation};\nst.global.b32 [%d2+{128 * place}], %r9;\n"
    body += "setp.lt.u32 %p2, %r0, 3;\nvote.sync.ballot.b32 %r9, %p2, -1;\nst.global.b32 [%d2+640], %r9;\n"
    out = torch.zeros(len(SHUFFLES) + 1, 32, dtype=torch.int32)
    Program(entry(body)).launch((1,), 32, arguments=[out], seed=3)
    for (operation, of), row in zip(SHUFFLES.items(), out.tolist(), strict=False):
        assert row == [10 * of(lane) for lane in range(32)], operation
    assert out[-1].tolist() == [7] * 32


def test_a_tf32_product():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    fragments = torch.stack([a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g]]).contiguous()
    out = torch.zeros(4, 32)
    loads = "ld.param.u64 %d3, [given]; mad.wide.u32 %d4, %r0, 4, %d3;\n"
    loads += "".join(f"ld.global.b32 %r{10 + i}, [%d4+{128 * i}];\n" for i in range(6))
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, "
    product += "{%r14, %r15}, {%r30, %r30, %r30, %r30};\n"
    stores = "".join(f"st.global.b32 [%d2+{128 * i}], %r{20 + i};\n" for i in range(4))
    text = entry(f"{loads}mov.b32 %r30, 0f3F800000;\n{product}{stores}", ".param .u64 out, .param .u64 given")
    Program(text).launch((1,), 32, arguments=[out, fragments])

    def rounded(x):  # what TF32 keeps
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    wanted = 1 + rounded(a) @ rounded(b)
    found = torch.stack([out[2 * (i // 2) + i % 2] for i in range(4)])
    for i in range(4):
        row, column = g + i // 2 * 8, 2 * t + i % 2
        torch.testing.assert_close(found[i].double(), wanted[row, column], rtol=0, atol=2**-20)


def test_what_a_loop_executes_is_counted():
    body = """
    mov.b32 %r1, 0;
LOOP:
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, 10;
    @%p1 bra LOOP;
    st.global.b32 [%d2], %r1;"""
    program = Program(entry(body))
    out = torch.zeros(64, dtype=torch.int32)[:32]
    for _ in range(2):
        program.launch((1,), 32, arguments=[out])
        counts = program.counts()
        assert counts["all"] == 4 + 3 * 10 + 2
        assert (counts["integer"], counts["st.global"], counts["ld.param"]) == (21, 1, 1)
    assert out.tolist() == [10] * 32


BOTH = ".param .u64 out, .param .u64 other"


@pytest.mark.parametrize(
    "at, says",
    [
        ("[%d2+4]", "a write of 4 global bytes at .*, by thread 31 .* is outside of every buffer"),
        ("[%d2-4]", "by thread 0 .* is outside of every buffer"),
        ("[%d2+128]", "is outside of every buffer"),  # in memory, the other tensor
        ("[%d2+2]", "is not aligned"),
    ],
)
def test_each_tensor_alone_may_be_touched(at, says):
    out, other = torch.zeros(2, 32, dtype=torch.int32).unbind()
    with pytest.raises(EmulationFault, match=says) as raised:
        Program(entry(f"st.global.b32 {at}, %r0;", BOTH)).launch((1,), 32, arguments=[out, other], seed=1)
    assert "st.global.b32" in str(raised.value) and "of written.py:7:3" in str(raised.value)
    assert (other == 0).all()


def test_lanes_of_one_instruction_may_write_one_word():
    """If their values are equal: else the hardware would choose. Another instruction may not."""
    out = torch.zeros(32, dtype=torch.int32)
    same, differ, two = "st.global.b32 [%d1], 7;", "st.global.b32 [%d1], %r0;", "st.global.b32 [%d1], 5;"
    program = Program(entry(same))
    program.launch((1,), 64, arguments=[out])
    assert out[0] == 7
    another = (
        r"thread \d+ \(kernel.ptx:16\) with another value than by thread \d+ \(kernel.ptx:16\), in one instruction"
    )
    unordered = "with no barrier after it was written by"
    for body, threads, says in (
        (differ, 32, another),
        (differ, 64, f"{another}|{unordered}"),
        (f"{same}\n{two}", 32, unordered),
    ):
        with pytest.raises(EmulationFault, match=says):
            Program(entry(body)).launch((1,), threads, arguments=[out])


def test_what_is_read():
    text = entry("@%p1 bra END;\nst.global.v2.b32 [ %d2 + 0 ], {%r1, %r2};\nEND:", ".param .u64 out, .param .f32 n")
    kernel = parse(text)["made"]
    assert [(p.name, p.type, p.offset) for p in kernel.parameters] == [("out", "u64", 0), ("n", "f32", 8)]
    branch, store = kernel.statements[3:5]
    assert (branch.opcode, branch.predicate, branch.operands) == ("bra", "%p1", ["END"])
    assert (store.operands, kind_of(store)) == (["%d2 + 0", ("%r1", "%r2")], "st.global")
    assert kernel.text[store.line - 1].startswith("st.global.v2")
    assert written(kernel) == {0}


@pytest.mark.parametrize(
    "statement, says",
    [
        ("tcgen05.alloc.b32 [%d1], 32", "tcgen05.alloc.b32 is not known"),
        ("bar.sync 1, 64", "only barrier 0"),
        ("add.sat.f32 %r1, %r2, %r3", "sat.* is not known"),
        ("mov.b32 %r1, elsewhere", "'elsewhere' is neither a register"),
    ],
)
def test_what_is_not_known_is_an_error(statement, says):
    with pytest.raises(ValueError, match=says):
        translate(parse(entry(f"{statement};"))["made"])
