# SPDX-License-Identifier: Apache-2.0
"""Which line of the source each instruction is of, in a cubin that was compiled with ``-lineinfo``.

Example:
    >>> of(printed_by_nvdisasm.splitlines(), "_Z6kernelPf")[0x40]
    Line(file='/…/csrc/cuda/rows.h', number=82)

``nvdisasm -gi`` writes before an instruction where it was written, and from where that was inlined. Of these the first
is taken that is not a wrapper of a single instruction (`WRAPPERS`) or a header of CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gates.sass import instruction

WRAPPERS = ("simt.h", "fragments.h")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_SECTION = re.compile(r"^//-+ \.text\.(\S+)")


class Line(NamedTuple):
    file: str
    number: int

    def text(self) -> str:
        """What stands there, if the file is there."""
        path = Path(self.file)
        lines = path.read_text().splitlines() if path.is_file() else []
        return lines[self.number - 1].strip() if 0 < self.number <= len(lines) else ""


def of(printed: Iterable[str], kernel: str) -> dict[int, Line]:
    """The line of each instruction of a kernel, by the instruction's address; empty if the cubin has none."""
    found: dict[int, Line] = {}
    inside, chain, fresh = False, [], True
    for text in printed:
        if section := _SECTION.match(text):
            inside, chain = section[1] == kernel, []
        elif not inside:
            continue
        elif place := _PLACE.search(text):
            chain = [] if fresh else chain
            chain.append(Line(place[1], int(place[2])))
            fresh = False
        elif each := instruction(text):
            fresh = True
            if chain:
                ours = [line for line in chain if "/include/" not in line.file]
                outside = [line for line in ours if Path(line.file).name not in WRAPPERS]
                found[each.address] = (outside or ours or chain)[0]
    return found
