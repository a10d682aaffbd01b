# SPDX-License-Identifier: Apache-2.0
"""Which assembler the kernels for compute capability 9.0 are given to, and what is looked for in its machine code."""

import contextlib
import os

import pytest
import torch

from gates import machine_code
from gates.triton_gate import TABLE, source, stage
from mvit_kernels.backends import triton as backend
from mvit_kernels.backends.triton import assembler
from support import TESTS

triton = pytest.importorskip("triton", reason="Triton is not installed")
if backend.target.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)

LISTING = (TESTS / "data" / "attention_by_ptxas_12_8.sass").read_text()


@pytest.fixture
def ptxas_of(tmp_path, monkeypatch):
    """Make Triton's assembler for 9.0 one that says it is of this CUDA; it assembles nothing."""

    def choose(version):
        tool = tmp_path / f"ptxas-{version}"
        tool.write_text(
            f"#!/bin/sh\n[ $# = 1 ] || exit 3\necho 'Cuda compilation tools, release {version}, V{version}.93'\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
        return str(tool)

    assembler.problem.cache_clear()
    yield choose
    assembler.problem.cache_clear()


# --------------------------------------------------------------------------------------------------- what is looked for


def test_a_register_that_nothing_writes_is_found():
    """The illegal memory accesses of an H200: the address of an operand of wgmma is computed from such a register."""
    code = list(machine_code.parsed(LISTING))
    assert len(code) > 600 and sum(one.name.startswith("HGMMA") for one in code) == 11
    assert machine_code.undefined_registers(code) == {"UR21": "UIADD3 UR4, UP0, UR21, 0x20, URZ"}
    assert machine_code.undefined_registers(list(machine_code.parsed(LISTING.replace("UR21", "UR4")))) == {}


@pytest.mark.parametrize(
    "line, found",
    [
        ("IADD3 R3, P0, R2, R4, RZ", {"R4"}),
        ("IADD3.X R3, R2, R2, RZ, P1, !PT", {"P1"}),
        ("@!P3 BRA `(.L_x_1)", {"P3"}),
        ("STG.E.128 desc[UR4][R2.64+0x40], R2", {"R3"}),
        ("HGMMA.64x8x16.F32.BF16 R2, gdesc[UR4], R2", {"UR6", "UR7"}),
        ("HGMMA.64x8x16.F32.BF16 R2, R8, gdesc[UR4].tnspB, R2", {"R8", "R9", "R10", "R11", "UR6", "UR7"}),
        ("LDSM.16.M88.4 R8, [R2+UR4]", set()),
        ("ISETP.GE.AND P1, PT, R2, 0x40, !P2", {"P2"}),
    ],
)
def test_results_and_sources_of_instructions(line, found):
    text = "\n".join(
        f" /*{16 * at:04x}*/ {each} ;" for at, each in enumerate(["MOV R2, RZ", "ULDC.64 UR4, c[0x0][0x208]", line])
    )
    assert set(machine_code.undefined_registers(list(machine_code.parsed(text)))) == found


def test_an_operand_that_changes_too_early_is_found():
    product, wait = "HGMMA.64x16x16.F32.BF16 R40, R60, gdesc[UR8].tnspB, R40", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    change = "F2FP.BF16.F32.PACK_AB R62, R11, R10"

    def of(*lines):
        text = "\n".join(f" /*{16 * at:04x}*/ {line} ;" for at, line in enumerate(lines))
        return machine_code.overwritten_operands(list(machine_code.parsed(text)))

    assert of(product, change, wait) == [(product, change)]
    assert of(product, wait, change) == [] == of(change, product, wait)
    assert of(product, "LDS.128 R60, [R3]", wait) == [(product, "LDS.128 R60, [R3]")] * 4


# ------------------------------------------------------------------------------------------------------ which assembler


def test_another_assembler_for_hopper_alone(ptxas_of):
    broken, knobs = ptxas_of("12.8"), triton.knobs.nvidia
    other = knobs.ptxas_blackwell.path
    with assembler.sound(90) as options:
        assert knobs.ptxas.path == other != broken
        assert "--warn-on-spills" in options["ptx_options"]
    assert knobs.ptxas.path == broken == os.environ["TRITON_PTXAS_PATH"]
    for architecture in (80, 89, 100, 120):
        with assembler.sound(architecture) as options:
            assert options == {} and knobs.ptxas.path == broken


def test_a_sound_assembler_is_left_alone(ptxas_of):
    chosen = ptxas_of("12.9")
    with assembler.sound(90) as options:
        assert options == {} and triton.knobs.nvidia.ptxas.path == chosen


def test_it_is_put_back_after_an_error(ptxas_of):
    broken = ptxas_of("12.8")
    with contextlib.suppress(KeyError), assembler.sound(90):
        raise KeyError
    assert triton.knobs.nvidia.ptxas.path == broken


def test_the_user_s_options_are_kept(ptxas_of, monkeypatch):
    ptxas_of("12.8")
    monkeypatch.setenv("PTXAS_OPTIONS", "--verbose")
    with assembler.sound(90) as options:
        assert options["ptx_options"].split() == ["--verbose", "--warn-on-spills"]


def test_triton_is_unavailable_where_no_assembler_is_sound(ptxas_of, monkeypatch):
    ptxas_of("12.8")
    monkeypatch.setattr(assembler, "_replacement", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: ((8, 0), (9, 0))[index])
    monkeypatch.setattr(backend.gpu, "no_gpu", lambda: "")
    (reason,) = backend.BACKEND.unavailable("cuda")
    assert "ptxas of CUDA 12.8" in reason and "set TRITON_PTXAS_PATH" in reason
    assembler.problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    assert backend.BACKEND.unavailable("cuda") == []


def test_a_kernel_is_assembled_by_the_other(ptxas_of, monkeypatch):
    """The attention kernel that the old one miscompiles, and the machine code of the other."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(TABLE.parents[2] / "build" / "triton"))
    ptxas_of("12.8")
    release = triton.knobs.nvidia.ptxas_blackwell.version
    (launch,) = [
        each
        for each in stage(192, 64, torch.bfloat16, "highest", 90)
        if each.plan.kernel.fn.__name__ == "_forward" and each.plan.kernel.fn.__module__.endswith(".patch_attention")
    ][:1]
    ast, options = source(launch)
    with assembler.sound(90) as more:
        compiled = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options | more)
    assert f"release {release}".encode() in compiled.asm["cubin"]
    code = machine_code.disassembled(compiled.asm["cubin"])
    assert sum(one.name.startswith("HGMMA") for one in code) == 11
    assert machine_code.undefined_registers(code) == {} and machine_code.overwritten_operands(code) == []
