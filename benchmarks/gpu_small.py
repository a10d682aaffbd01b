# SPDX-License-Identifier: Apache-2.0
"""Every kernel of ours on tiny maps, forward and backward: `benchmarks/gpu.sh` runs it alone and in compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu_small.py [BACKEND ...]

Widths that are not powers of two, maps with few tokens, and batches of one and three exercise the masks. Each result is
checked against the tolerance rule, and the exit code is 1 if one is wrong. The maps are tiny because a launch takes a
hundred times as long in the sanitizer.
"""

from __future__ import annotations

import functools
import sys

import torch

from mvit_kernels import backends
from mvit_kernels.bench.suites import operators
from mvit_kernels.bench.suites.operands import OPERATORS, Operands, Stage, operands

STAGES = (Stage("xxs", 4, 2, 80, 4, 3), Stage("s", 5, 1, 240, 6, 1), Stage("s", 3, 1, 144, 8, 1))
DTYPES = (torch.bfloat16, torch.float32)


def check(backend: str, operator: str, stage: Stage, dtype: torch.dtype, device: str) -> bool:
    """Run one operator on `backend` and print the outcome; return False if a result is wrong."""

    def draw(seed: int) -> Operands:
        return operands(operator, stage, seed=seed).to(device, dtype)

    case = draw(0)
    training = operator not in ("transformer", "inverted_residual")
    what = f"{backend} {operator} d={stage.width} {str(dtype).removeprefix('torch.')}"
    with torch.set_grad_enabled(training):
        try:
            function = functools.partial(case.public, backend=backend)
            worst = operators.check(case, training, *operators.truth_of(case, training), function, draw)
        except backends.BackendError as refusal:
            print(f"{what}: refused: {refusal}", flush=True)
            return True
    print(f"{what}: {'ok' if worst.ok else f'WRONG: {worst}'}", flush=True)
    return worst.ok


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    possible = [b for b in backends.PREFERENCE[device] if b != "reference" and not backends.unavailable(b, device)]
    right = True
    for backend in sys.argv[1:] or possible:
        for stage in STAGES:
            for dtype in DTYPES:
                for operator in OPERATORS:
                    if operator in backends.operators(backend):
                        right &= check(backend, operator, stage, dtype, device)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
