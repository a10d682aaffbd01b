# SPDX-License-Identifier: Apache-2.0
"""Which addresses the Triton kernels' machine code for sm_90 accesses, held against the tensors and the shared memory
of each launch; without a GPU.

Example:
    $ python -m gates.addresses --only patch_attention._forward       # every launch that the gate has, minutes for all

Triton's interpreter and executed PTX (`support.ptx`) show what Triton meant; this, what the assembler made of it. That
is how the cause of the H200's illegal memory accesses was found: the same PTX, assembled by ptxas of CUDA 12.8, takes
operands of wgmma from below the block's shared memory (`mvit_kernels.backends.triton.assembler`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from gates import machine_code
from gates.sass import Instruction
from gates.triton_gate import compiled_for, different
from support.sass.block import Access, Block
from support.sass.operands import address, constant_bank

ARCH = 90
SHARED = 0x400  # where a block's dynamic shared memory begins; what is below is the system's


def parameters(launch) -> tuple[bytes, list[tuple[int, int]]]:
    """What a launch hands its kernel, and the first and last addresses of its tensors."""
    given, ranges = bytearray(), []
    for number, tensor in enumerate(each for each in launch.tensors if each is not None):
        first = address(number)
        ranges.append((first, first + tensor.numel() * tensor.element_size()))
        given += first.to_bytes(8, "little")
    for scalar in launch.scalars:
        bits = int(np.float32(scalar).view(np.uint32)) if isinstance(scalar, float) else scalar & 0xFFFFFFFF
        given += bits.to_bytes(4, "little")
    return bytes(given), ranges


def corners(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The first and the last block along each axis."""
    return itertools.product(*(sorted({0, count - 1}) for count in grid))


def is_outside(access: Access, ranges: Iterable[tuple[int, int]], shared: int) -> np.ndarray:
    """For each thread, whether it accesses something else than the tensors, or its block's shared memory."""
    places = ((SHARED, SHARED + shared),) if access.space == "shared" else ranges
    end = access.address + access.size.astype(np.uint64)
    inside = [(access.address >= np.uint64(low)) & (end <= np.uint64(high)) for low, high in places]
    return access.active & (access.size > 0) & ~np.any(inside, axis=0)


def outside(code: Sequence[Instruction], launch, shared: int) -> list[str]:
    """What a launch accesses outside of its tensors and its shared memory, an instruction a line."""
    given, ranges = parameters(launch)
    threads, grid = 32 * launch.plan.num_warps, (*launch.grid, 1, 1)[:3]
    bank = constant_bank(threads, grid, given)
    found: dict[str, int] = {}
    for place in corners(grid):
        block = Block(code, threads, bank, place)
        block.run()
        for access in block.accesses:
            wrong = is_outside(access, ranges, shared)
            if wrong.any():
                line = (
                    f"{access.space} memory at {access.code.address:#x}, {access.code}: {access.address[wrong][0]:#x}"
                )
                found[line] = found.get(line, 0) + int(wrong.sum())
    return [f"{line}, {count} threads" for line, count in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="gates.addresses", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels that have this in their name")
    given = parser.parse_args()
    wrong = 0
    for row, launch in different(ARCH):
        if given.only not in row["kernel"] or torch.float32 in {t.dtype for t in launch.tensors[:1] if t is not None}:
            continue
        compiled = compiled_for(launch, ARCH)
        code = machine_code.disassembled(compiled.asm["cubin"])
        lines = outside(code, launch, compiled.metadata.shared)
        wrong += bool(lines)
        print(row["case"], row["kernel"], row["tile"], *lines or ["inside"], sep="\n    " if lines else " ", flush=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
