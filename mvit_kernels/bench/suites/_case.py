# SPDX-License-Identifier: Apache-2.0
"""The cases of a suite, and the context in which a case runs: the machine and the remaining time.

Example:
    >>> for case in operators.cases("cpu"):
    ...     rows = case.measure(context)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from .. import ceilings
from ..ceilings import Ceilings
from ..results import Row

CEILINGS_LAST = 120.0  # seconds: on a shared machine the peak rates change
FOR_COMPILING = 0.4  # share of a budget


class Case(NamedTuple):
    """One table: candidates that take turns."""

    name: str  # for display
    subject: dict[str, object]  # the columns of `results.SUBJECT` that identify it
    cost: float  # GFLOP of one call, to estimate from earlier cases how long this one takes
    measure: Callable[[Context], list[Row]]
    compiles: float = 0.0  # seconds that compiling a candidate usually takes; 0 if it compiles none
    model: str = ""  # the network, or that of which it is a block


class Context:
    """The machine and the remaining time, for the cases of one run.

    Args:
        device: "cpu" or "cuda".
        suite: name of the suite, for its column.
        seconds: measuring time of a case, of all its candidates together.
        backend: that which the candidates of ours use; None for the choice by shape, and each one's own row.
        memory: whether networks' peak memory is measured on the CPU.
        peers: the candidates to measure beside eager; None for all. Operators alone.
        build_seconds: how long a candidate may be compiled where there is no budget.
        progress: called with each line of text.
        clock: a monotonic clock in seconds; for tests.
    """

    def __init__(
        self,
        device: str,
        suite: str,
        *,
        seconds: float,
        backend: str | None = None,
        memory: bool = True,
        peers: Collection[str] | None = None,
        build_seconds: float | None = None,
        progress: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.suite, self.seconds, self.progress, self.clock = device, suite, seconds, progress, clock
        self.backend, self.memory, self.peers, self._most = backend, memory, peers, build_seconds
        self.end = float("inf")
        self._longest = 0.0  # longest compile time of a candidate, seconds
        self.compiled = 0.0  # total compile time so far, seconds
        self._start = clock()
        self._ceilings: dict[torch.dtype, tuple[float, Ceilings]] = {}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - self.clock()

    def build_seconds(self, usual: float) -> float | None:
        """How many seconds compiling a candidate may take; None if it should not be begun.

        It is expected to take as long as the longest one before, or at first `usual` seconds. The first one may take
        half of the remaining time, and all together no more than `FOR_COMPILING` of the budget. Without a budget it is
        what was asked for, or None: then there is no limit.
        """
        if self.end == float("inf"):
            return self._most
        expected = self._longest or usual
        room = FOR_COMPILING * (self.end - self._start) - self.compiled if self._longest else self.left / 2
        return min(2 * expected, self.left) if expected <= min(room, self.left / 2) else None

    def built(self, seconds: float) -> None:
        """Record the compile time of a candidate."""
        self._longest = max(seconds, self._longest)
        self.compiled += seconds

    def known_ceilings(self) -> list[tuple[torch.dtype, Ceilings]]:
        """The peak rates that are in use now, by dtype."""
        return [(dtype, known) for dtype, (_, known) in self._ceilings.items()]

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """The machine's peak rates in `dtype`, measured again if they are older than two minutes."""
        when, known = self._ceilings.get(dtype, (-float("inf"), None))
        if known is None or self.clock() - when > CEILINGS_LAST:
            self.progress(f"the machine's own rates, {str(dtype).removeprefix('torch.')}")
            known = ceilings.measure(dtype, self.device)
            self._ceilings[dtype] = self.clock(), known
        return known
