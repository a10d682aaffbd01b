# SPDX-License-Identifier: Apache-2.0
"""What a suite is made of: cases, the most valuable first, and what a case knows of the time that it has.

Example:
    >>> for case in operators.cases("cpu"):
    ...     rows = case.measure(context)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import ceilings
from ..ceilings import Ceilings
from ..results import Row

CEILINGS_LAST = 120.0  # seconds: on a machine that others use too, its best changes


class Case(NamedTuple):
    """One table: candidates that take turns."""

    name: str  # for people
    subject: dict[str, object]  # the columns of `results.SUBJECT` that tell it from all others
    cost: float  # gigaflop of one call, for guessing from earlier cases how long this one takes
    measure: Callable[[Context], list[Row]]


class Context:
    """The machine, and the time that is left, for the cases of one run.

    Args:
        device: "cpu" or "cuda".
        suite: for the column.
        seconds: of measuring a case, of all of its candidates together.
        clock: seconds, monotonic; for tests.
    """

    def __init__(
        self,
        device: str,
        suite: str,
        *,
        seconds: float,
        progress: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.suite, self.seconds, self.progress, self.clock = device, suite, seconds, progress, clock
        self.end = float("inf")
        self._builds: dict[str, float] = {}  # kind -> the longest that one took to be built
        self._build_time = 0.0
        self._ceilings: dict[torch.dtype, tuple[float, Ceilings]] = {}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - self.clock()

    def build_seconds(self, kind: str, usual: float) -> float | None:
        """How long a compiled candidate may take to be built, None where it is better not begun: it should take a
        quarter of what is left at most, going by the longest one before, or at first by what is `usual`."""
        expected = self._builds.get(kind, usual)
        return max(self.left / 2, expected) if expected <= self.left / 4 else None

    def built(self, kind: str, seconds: float) -> None:
        """Remember how long one took."""
        self._builds[kind] = max(seconds, self._builds.get(kind, 0.0))
        self._build_time += seconds

    def take_build_time(self) -> float:
        """Seconds that were spent on compiling since this was asked for last."""
        spent, self._build_time = self._build_time, 0.0
        return spent

    def known_ceilings(self) -> list[tuple[torch.dtype, Ceilings]]:
        """The rates that are in use now."""
        return [(dtype, known) for dtype, (_, known) in self._ceilings.items()]

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """The machine's best in `dtype`, not older than two minutes."""
        when, known = self._ceilings.get(dtype, (-float("inf"), None))
        if known is None or self.clock() - when > CEILINGS_LAST:
            self.progress(f"the machine's own rates, {str(dtype).removeprefix('torch.')}")
            known = ceilings.measure(dtype, self.device)
            self._ceilings[dtype] = self.clock(), known
        return known
