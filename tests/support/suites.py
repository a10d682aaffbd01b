# SPDX-License-Identifier: Apache-2.0
"""What the tests of the suites' parts measure: a small stage, in no time."""

from mvit_kernels.bench.suites._case import Context
from mvit_kernels.bench.suites.operands import Stage

TINY = Stage("xxs", 3, 2, 16, 4, 2)


def context() -> Context:
    return Context("cpu", "operators", seconds=0.02, progress=lambda line: None)
