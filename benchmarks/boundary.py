# SPDX-License-Identifier: Apache-2.0
"""What a call costs before and after the arithmetic: microseconds on tensors so small that nothing else is left.

    python benchmarks/boundary.py [--results FOLDER] [--rounds N]

Every operator is called on 4 tokens of 16 channels (``inverted_residual`` on 16 tokens of 24 channels), along these
paths:

- ``plain``: the reference's function, without any boundary;
- ``raw``: the raw operator ``mvit_kernels::<operator>.<backend>``, through PyTorch's dispatcher;
- ``function``: the raw operator inside its autograd function, as when a gradient is needed;
- ``public``: ``mvit_kernels.<operator>`` under no_grad: argument checks, choice of the backend, the call;
- ``public, grad``: the same with an input that requires a gradient.

``torch.add`` of two such tensors is timed in the same run for comparison. The raw reference operators are written in
Python and compute what backward needs, so their own time says nothing about a kernel's. The overheads are
``function`` − ``raw``, ``public`` − ``plain`` (reference) and ``public`` − ``raw`` (compiled backends).

The last rows are the time that an accelerated block spends at each call to check that it may still be accelerated.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import mvit_kernels
from mvit_kernels.adapters import _swap
from mvit_kernels.backends import library as _library
from mvit_kernels.bench import results
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.suites.operands import OPERATORS, Operands, Stage, operands
from mvit_kernels.bench.timing import Timing, interleave

CALLS = 20  # per sample: long compared with the clock's resolution, short compared with the scheduler's time slice
TINY = Stage("xxs", 3, 1, 16, 2, 1)


def paths(name: str, case: Operands, backend: str) -> dict[str, Callable[[], object]]:
    """The paths that exist for this operator on this backend, as functions to time."""
    tensors, constants = case.tensors, case.constants
    needing = (tensors[0].clone().requires_grad_(), *tensors[1:])
    raw_operator, raw_tensors = _library.raw(name, backend), tensors
    if name == "transformer":
        raw_tensors = (tensors[0], list(tensors[1:-2]), *tensors[-2:])
    result: dict[str, Callable[[], object]] = {
        "raw": lambda: raw_operator(*raw_tensors, *constants),
        "public": lambda: case.public(*tensors, backend=backend),
    }
    if backend == "reference":
        result = {"plain": lambda: case.plain(*tensors)} | result
    apply = getattr(importlib.import_module(f"mvit_kernels.ops.{name}"), "apply", None)
    if apply is not None:  # the differentiable ones
        result["function"] = _with_grad(lambda: apply(backend, True, *needing, *constants))
        result["public, grad"] = _with_grad(lambda: case.public(*needing, backend=backend))
    return result


def _with_grad(function: Callable[[], object]) -> Callable[[], object]:
    return torch.enable_grad()(function)


def validation() -> dict[str, Callable[[], object]]:
    """For each block of an accelerated model, the check that its plan still holds."""
    model = mvit_kernels.accelerate(mvit_kernels.MobileViT("xxs").eval())
    model(torch.rand(1, 3, 64, 64))
    found = {}
    for name, block in model.named_modules():
        if _swap.is_accelerated(block) and _swap._PLAN in block.__dict__:  # blocks; convolution layers only in training
            plan = block.__dict__[_swap._PLAN]
            found[f"{name} ({len(plan.parts.layers)} layers)"] = lambda plan=plan, block=block: plan.holds(block)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="append the rows to FOLDER/boundary.csv")
    parser.add_argument("--rounds", type=int, default=200, help="samples a path, of 20 calls each (default: 200)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the work is too small for a second thread
    table = {name: operands(name, TINY) for name in OPERATORS}
    candidates: dict[tuple[str, str, str], Callable[[], object]] = {}
    a, b = table["linear_residual"].tensors[0], table["linear_residual"].tensors[3]
    candidates["torch.add", "", "forward"] = lambda: torch.add(a, b)
    needing = b.clone().requires_grad_()
    candidates["torch.add", "", "grad"] = _with_grad(lambda: torch.add(a, needing))
    for name, case in table.items():
        for backend in _library.BACKENDS:
            if _serves(case, backend):
                candidates |= {(name, backend, path): f for path, f in paths(name, case, backend).items()}
    for block, function in validation().items():
        candidates["accelerated block", "", block] = function

    keys = {" ".join(key): key for key in candidates}
    with torch.no_grad():
        times = interleave(
            {text: candidates[key] for text, key in keys.items()},
            rounds=args.rounds,
            calls=CALLS,
            warmup_seconds=0.02,
            progress=lambda done, seconds: print(
                f"\r{done} of {args.rounds} rounds, {seconds:.0f} s", end="", file=sys.stderr, flush=True
            ),
        )
    print(file=sys.stderr)
    base = times[" ".join(("torch.add", "", "forward"))].median
    for text, timing in times.items():
        operator, backend, path = keys[text]
        median, low, high = (1e3 * value for value in timing[:3])
        spread, times_add = f"{low:8.2f} - {high:.2f}", timing.median / base
        print(f"{operator:<20}{backend:<11}{path:<26}{median:9.2f} µs  {spread:<20}{times_add:6.1f} × torch.add")
    if args.results:
        origin = environment()
        rows = [_row(*keys[text], timing, origin) for text, timing in times.items()]
        results.append(args.results / "boundary.csv", rows)


def _serves(case: Operands, backend: str) -> bool:
    try:
        with torch.no_grad():
            case.public(*case.tensors, backend=backend)
        return True
    except mvit_kernels.BackendError:
        return False


def _row(operator: str, backend: str, path: str, timing: Timing, origin: dict[str, str]) -> results.Row:
    return results.row(
        suite="boundary",
        subject=operator,
        backend=backend,
        candidate=path,
        clock="wall",
        dtype="float32",
        median_ms=timing.median,
        p20_ms=timing.p20,
        p80_ms=timing.p80,
        samples=timing.count,
        **origin,
    )


if __name__ == "__main__":
    main()
