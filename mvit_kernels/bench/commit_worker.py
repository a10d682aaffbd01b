# SPDX-License-Identifier: Apache-2.0
"""Measures cases of one commit when asked: the process that `mvit_kernels.bench.commits` starts in its checkout.

It is this file, but the commit's own package: the text is run by ``python -c`` in the commit's folder, and uses of it
only what every commit since the suites has. Requests come as JSON on standard input, one a line, and answers go to
standard output: first what there is, then the rows of each case.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(device: str, threads: int) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints does not get between the answers
    import torch

    from mvit_kernels._utils.freed_memory import keep_freed_memory
    from mvit_kernels.bench import suites

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    cases = {name: {case.name: case for case in suite.cases(device)} for name, suite in suites.SUITES.items()}
    contexts: dict[tuple[str, float], Any] = {}

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"file": suites.__file__, "cases": {name: list(found) for name, found in cases.items()}})
    for line in sys.stdin:
        suite, case, seconds = json.loads(line)
        answer(_rows(cases[suite][case], device, suite, seconds, contexts))


def _rows(case: Any, device: str, suite: str, seconds: float, contexts: dict) -> list[dict]:
    from mvit_kernels.bench.origin import environment
    from mvit_kernels.bench.results import row
    from mvit_kernels.bench.suites._case import Context

    context = contexts.setdefault((suite, seconds), Context(device, suite, seconds=seconds))
    context.end = context.clock() + 60  # too short for peak memory and for compiling, which are not compared
    try:
        return case.measure(context)
    except (RuntimeError, ValueError) as error:
        note = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        known = {"candidate": "eager", "clock": "wall", "samples": 0, "note": note}
        return [row(suite=suite, **case.subject, **known, **environment(device))]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
