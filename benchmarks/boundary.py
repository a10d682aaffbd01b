# SPDX-License-Identifier: Apache-2.0
"""What a call costs before and after the arithmetic: microseconds on tensors so small that nothing else is left.

    python benchmarks/boundary.py [--csv FILE] [--rounds N]

Every operator is called on 4 tokens of 16 channels, along these paths:

- ``plain``: the reference's function, no boundary at all;
- ``raw``: the raw operator ``mvit_kernels::<operator>.<backend>``, through PyTorch's dispatcher;
- ``function``: the same with the autograd function around it, as where a gradient is needed;
- ``public``: ``mvit_kernels.<operator>`` under no_grad: checks of the arguments, choice of the backend, the call;
- ``public, grad``: the same on an input that requires a gradient.

Beside them ``torch.add`` of two such tensors, in the same run. The raw reference operators are written in Python and
compute what a backward needs: their own time is no measure of a kernel's. What counts is ``function`` − ``raw``,
``public`` − ``plain`` (reference) and ``public`` − ``raw`` (compiled).

At the end, what an accelerated block spends at each call to see that it may still be accelerated.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels import _library, reference
from mvit_kernels.adapters import _swap
from mvit_kernels.cli import write_csv
from mvit_kernels.timing import Timing, environment, interleave

CALLS = 20  # a sample: long beside the clock's resolution, short beside the scheduler's time slice
D, HIDDEN, SIDE, PATCH, HEADS, EPS = 16, 32, 2, (2, 2), 4, 1e-5


class Case(NamedTuple):
    """One operator: its arguments as tensors by position, and what the raw operator takes behind them."""

    tensors: tuple[Tensor, ...]
    constants: tuple
    public: Callable[..., Tensor]  # (*tensors, backend=)
    plain: Callable[..., Tensor]  # (*tensors)


def cases() -> dict[str, Case]:
    """Every operator on (1, 2, 2, 16)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, norm, bias = random(1, SIDE, SIDE, D), (random(D), random(D)), random(D)
    qkv = random(1, SIDE, SIDE, 3 * D)
    mlp = (*norm, random(HIDDEN, D), random(HIDDEN), random(D, HIDDEN), bias)
    layer = (*norm, random(3 * D, D), random(3 * D), random(D, D), bias, *mlp)
    residual = (random(HIDDEN, D), random(HIDDEN), random(HIDDEN, 1, 3, 3), random(HIDDEN), random(D, HIDDEN), bias)
    heads = {"num_heads": HEADS, "patch_size": PATCH}
    scale = (D // HEADS) ** -0.5
    ops = mvit_kernels
    return {
        "layer_norm_linear": Case(
            (x, *norm, random(3 * D, D), random(3 * D)),
            (EPS, ""),
            ops.layer_norm_linear,
            lambda *t: reference.layer_norm_linear(*t, EPS),
        ),
        "patch_attention": Case(
            (qkv,),
            (HEADS, PATCH, scale),
            lambda qkv, backend: ops.patch_attention(qkv, **heads, backend=backend),
            lambda qkv: reference.patch_attention(qkv, HEADS, PATCH, scale),
        ),
        "linear_residual": Case((x, random(D, D), bias, x), (), ops.linear_residual, reference.linear_residual),
        "layer_norm_mlp": Case((x, *mlp), (EPS,), ops.layer_norm_mlp, lambda *t: reference.layer_norm_mlp(*t, EPS)),
        "inverted_residual": Case(
            (x, *residual),
            (1, 1, True),
            lambda *t, backend: ops.inverted_residual(*t, residual=True, backend=backend),
            lambda *t: reference.inverted_residual(*t, 1, 1, True),
        ),
        "transformer": Case(
            (x, *layer),
            (HEADS, PATCH, EPS),
            lambda x, *t, backend: ops.transformer(
                x, [ops.TransformerLayerWeights(*t)], norm, **heads, backend=backend
            ),
            lambda x, *t: reference.transformer(x, [t], norm, HEADS, PATCH, EPS),
        ),
    }


def paths(name: str, case: Case, backend: str) -> dict[str, Callable[[], object]]:
    """The paths that there are for this operator on this backend."""
    tensors, constants = case.tensors, case.constants
    needing = (tensors[0].clone().requires_grad_(), *tensors[1:])
    raw_operator, raw_tensors = _library.raw(name, backend), tensors
    if name == "transformer":
        raw_tensors = (tensors[0], list(tensors[1:]), *tensors[1:3])
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
    """For each block of an accelerated model, the check of the plan that it runs by."""
    model = mvit_kernels.accelerate(mvit_kernels.MobileViT("xxs").eval())
    model(torch.rand(1, 3, 64, 64))
    found = {}
    for name, block in model.named_modules():
        if _swap.is_accelerated(block):
            plan = block.__dict__[_swap._PLAN]
            found[f"{name} ({len(plan.parts.layers)} layers)"] = lambda plan=plan, block=block: plan.holds(block)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", type=Path, help="write the table there")
    parser.add_argument("--rounds", type=int, default=200, help="samples a path, of 20 calls each (default: 200)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # nothing here is worth a second one
    table = cases()
    candidates: dict[tuple[str, str, str], Callable[[], object]] = {}
    a, b = table["linear_residual"].tensors[0], torch.randn(1, SIDE, SIDE, D)
    candidates["torch.add", "", ""] = lambda: torch.add(a, b)
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
    base = times[" ".join(("torch.add", "", ""))].median
    rows = [_row(*keys[text], timing, base) for text, timing in times.items()]
    for row in rows:
        spread = f"{row['p20_us']:8.2f} - {row['p80_us']:.2f}"
        print(
            f"{row['operator']:<20}{row['backend']:<11}{row['path']:<26}{row['median_us']:9.2f} µs  {spread:<20}"
            f"{row['times_add']:6.1f} × torch.add"
        )
    if args.csv:
        origin = environment()
        write_csv(args.csv, [row | origin for row in rows])


def _serves(case: Case, backend: str) -> bool:
    try:
        with torch.no_grad():
            case.public(*case.tensors, backend=backend)
        return True
    except mvit_kernels.BackendError:
        return False


def _row(operator: str, backend: str, path: str, timing: Timing, base: float) -> dict[str, object]:
    return {
        "operator": operator,
        "backend": backend,
        "path": path,
        "median_us": round(timing.median * 1e3, 3),
        "p20_us": round(timing.p20 * 1e3, 3),
        "p80_us": round(timing.p80 * 1e3, 3),
        "samples": timing.count,
        "times_add": round(timing.median / base, 2),
    }


if __name__ == "__main__":
    main()
