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
FOR_COMPILING = 0.4  # of a budget


class Case(NamedTuple):
    """One table: candidates that take turns."""

    name: str  # for people
    subject: dict[str, object]  # the columns of `results.SUBJECT` that tell it from all others
    cost: float  # gigaflop of one call, for guessing from earlier cases how long this one takes
    measure: Callable[[Context], list[Row]]
    compiles: float = 0.0  # seconds that it usually takes to compile a candidate; 0: it compiles none


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
        self._longest = 0.0  # seconds that a candidate took to be compiled
        self.compiled = 0.0  # seconds that were spent on compiling so far
        self._start = clock()
        self._ceilings: dict[torch.dtype, tuple[float, Ceilings]] = {}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - self.clock()

    def build_seconds(self, usual: float) -> float | None:
        """How long a candidate may take to be compiled, None where it is better not begun.

        It is expected to take what the longest one before took, or at first what is `usual`. The first may take half of
        what is left; all together no more than `FOR_COMPILING` of the budget.
        """
        expected = self._longest or usual
        room = FOR_COMPILING * (self.end - self._start) - self.compiled if self._longest else self.left / 2
        return min(2 * expected, self.left) if expected <= min(room, self.left / 2) else None

    def built(self, seconds: float) -> None:
        """Remember how long one took to be compiled."""
        self._longest = max(seconds, self._longest)
        self.compiled += seconds

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
