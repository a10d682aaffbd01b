# SPDX-License-Identifier: Apache-2.0
"""Tiles of the row-wise kernels, and how rows are cut into chunks for them.

Example:
    >>> _TILES = {"half": Tile(rows=64, columns=64, chunk=64, warps=4, stages=2)}
    >>> chunk, chunks, tail = tailed(144, _TILES["half"].chunk)
"""

import functools
from typing import Any, NamedTuple

from ._launch import Plan, ceil_div, next_power_of_2

FEW_ROWS = 8192  # at most one tile of 64 rows for each of 128 SMs: what is chosen then is chosen for latency


class Tile(NamedTuple):
    """What a program computes, and with what."""

    rows: int
    columns: int  # of the result, or of the hidden layer, in one turn of the loop
    chunk: int  # the widest chunk of a row
    warps: int
    stages: int
    registers: int | None = None  # the most a thread may have; more would leave room for fewer programs at a time

    def plan(self, kernel: Any, constants: tuple[Any, ...]) -> Plan:
        """The plan of a kernel with this tile, which `constants` have been made of."""
        return Plan(kernel, constants, num_warps=self.warps, num_stages=self.stages, registers=self.registers)


class Resident(NamedTuple):
    """How a product is computed whose weight stays in shared memory."""

    tile: Tile  # its columns are those of one product
    programs: int  # all of them together: as many as 132 SMs hold at a time


@functools.cache
def tailed(width: int, widest: int) -> tuple[int, int, int]:
    """(chunk, chunks, tail) that cover `width` with few chunks: `chunks` of the widest power of two, and one of `tail`
    columns for what is left (0 where nothing is); all from 16 up.

    Example:
        >>> tailed(144, 64), tailed(192, 64), tailed(240, 64), tailed(120, 64), tailed(80, 64), tailed(20, 64)
        ((64, 2, 16), (64, 3, 0), (64, 4, 0), (64, 2, 0), (64, 1, 16), (32, 1, 0))
    """
    chunk = min(widest, next_power_of_2(max(width, 16)))
    tail = next_power_of_2(max(width % chunk, 16)) if width % chunk else 0
    return (chunk, ceil_div(width, chunk), 0) if tail in (0, chunk) else (chunk, width // chunk, tail)
