# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the assembler that show in machine code alone: registers that are read and never written, and operands of
an asynchronous product that change before it has read them.

Example:
    >>> undefined_registers(disassembled(compiled.asm["cubin"]))
    {'UR21': 'UIADD3 UR4, UP0, UR21, 0x20, URZ'}

The first is what ptxas of CUDA 12.8 makes of an attention kernel (`mvit_kernels.backends.triton.assembler`): an H200
answered with illegal memory accesses, sometimes. The second is what NVIDIA's release notes of CUDA 13.3 say of older
versions. Neither shows in PTX, in Triton's interpreter or in emulation, and memcheck only sees what happens to fault.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gates.sass import Instruction, instruction

_REGISTER = re.compile(r"(?<![\w.])(U?[RP])(\d+)(\.64)?")
_COMMA = re.compile(r",\s*(?![^\[]*\])")
_DESCRIPTORS = re.compile(r"gdesc\[UR(\d+)\]")
# Operations without a result; R2P has all predicates.
_NO_RESULT = set(
    "ST STG STS STSM STL LDGSTS RED BAR BRA EXIT CALL RET JMP BREAK BSSY BSYNC WARPGROUP WARPSYNC MEMBAR FENCE DEPBAR "
    "LDGDEPBAR CCTL ERRBAR NANOSLEEP YIELD NOP R2P".split()
)
_TWO_PREDICATES = {"ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3"}


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin, by the nvdisasm that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return list(parsed(subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout))


def parsed(text: str) -> Iterator[Instruction]:
    """The instructions of a disassembly of one kernel."""
    return filter(None, map(instruction, text.splitlines()))


def undefined_registers(code: Sequence[Instruction]) -> dict[str, str]:
    """The registers and predicates that some instruction reads and none writes, with the first such instruction. (R1 is
    the stack pointer.)"""
    written = {name for one in code for name in _results(one)}
    found: dict[str, str] = {}
    for one in code:
        for name in _sources(one):
            if name not in written and name != "R1":
                found.setdefault(name, str(one))
    return found


def overwritten_operands(code: Sequence[Instruction]) -> list[tuple[str, str]]:
    """(product, instruction) where a register that a ``wgmma`` reads asynchronously is written before the next wait, in
    the order of the code. Between the products of a group the accumulators are the tensor cores' own."""
    found = []
    pending: dict[str, Instruction] = {}  # registers that products before still read
    for one in code:
        if one.name.startswith("WARPGROUP.DEPBAR") or (one.name == "EXIT" and not one.guard):
            pending.clear()
        if pending:
            found += [(str(pending[name]), str(one)) for name in sorted(pending.keys() & _results(one))]
        if one.name.startswith("HGMMA") and re.fullmatch(r"R\d+", _operands(one)[1]):
            first = int(_operands(one)[1][1:])
            pending |= {f"R{first + k}": one for k in range(4)}
    return found


def _operands(one: Instruction) -> list[str]:
    return _COMMA.split(one.operands) if one.operands else []


def _split(one: Instruction) -> tuple[list[str], list[str]]:
    """The operands that are results, and the others."""
    base, operands = one.name.split(".")[0], _operands(one)
    if base in _NO_RESULT or not operands:
        return [], operands
    results = 2 if base in _TWO_PREDICATES or base == "SHFL" else 1
    if base in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "LOP3", "ULOP3"):
        # carries and "is not zero" are predicates before (LOP3) or behind the result
        results += base.endswith("LOP3") and operands[0].lstrip("U").startswith("P")
        while results < min(3, len(operands)) and re.fullmatch(r"U?P(\d+|T)", operands[results]):
            results += 1
    return operands[:results], operands[results:]


def _width(one: Instruction) -> int:
    """How many registers the result of an instruction has."""
    base, *parts = one.name.split(".")
    if base == "HGMMA":
        return int(re.search(r"64x(\d+)x", one.name)[1]) // 2
    if base == "LDSM":
        return int(parts[-1]) if parts[-1] in "24" else 1
    if base == "HMMA" or "128" in parts:
        return 4
    double = base in ("DADD", "DMUL", "DFMA", "F2F") or (base == "CS2R" and "32" not in parts)
    return 2 if double or "WIDE" in parts or "64" in parts else 1


def _results(one: Instruction) -> set[str]:
    if one.name.startswith("R2P"):
        return {f"P{k}" for k in range(7)}
    names = set()
    for operand in _split(one)[0]:
        found = re.match(r"(U?[RP])(\d+)", operand)
        if found:
            width = _width(one) if found[1] in ("R", "UR") else 1
            names |= {f"{found[1]}{int(found[2]) + k}" for k in range(width)}
    return names


def _sources(one: Instruction) -> Iterator[str]:
    guard = one.guard.lstrip("!")
    if guard not in ("", "PT", "UPT"):
        yield guard
    for operand in _split(one)[1]:
        descriptors = _DESCRIPTORS.search(operand)
        if descriptors:
            # Four uniform registers: the first operand's descriptor, unless that is in registers, and the second's.
            of = range(4) if _operands(one)[1].startswith("gdesc") else range(2, 4)
            yield from (f"UR{int(descriptors[1]) + k}" for k in of)
            continue
        for kind, number, double in _REGISTER.findall(operand):
            several = 4 if one.name.startswith("HGMMA") and operand == _operands(one)[1] else 2 if double else 1
            yield from (f"{kind}{int(number) + k}" for k in range(several))
