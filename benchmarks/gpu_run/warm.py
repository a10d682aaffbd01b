# SPDX-License-Identifier: Apache-2.0
"""Fill Triton's cache: one of several processes, each with its share of the kernels.

    python warm.py 3 10            # the fourth of ten shares
    python warm.py 3 10 --skip 5   # of it what comes after the first five, where an earlier process ended
    python warm.py 0 1 --only-training-of s --dtypes bfloat16

Triton compiles one kernel after another, some 3 s each (measured with Triton 3.6 on an H200's host: 18 kernels in 23 s
in each of ten processes). A share is a number of units: an operator at a stage in a dtype, at the usual batches,
forward and backward. A unit is launched, since that is what selects its kernels; one that raises an error has a line
that says so, and one that loses the GPU ends this process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from fault import use_triton_s_ptxas

from mvit_kernels import backends, freeze
from mvit_kernels.bench.suites.operands import OPERATORS, Stage, operands, stages
from mvit_kernels.zoo import load

BATCHES = (64, 1)  # tiles depend on the number of rows
NETWORK_BATCHES = (256, 1, 2)
DTYPES = ("bfloat16", "float16", "float32")
LOST = 3  # exit code of a process whose GPU returns errors


class Unit(NamedTuple):
    """Kernels that one process compiles."""

    operator: str
    stage: Stage
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operator} {self.stage.variant}/{self.stage.index} {self.dtype}"


class Frozen(NamedTuple):
    """The convolutions of a frozen network, which the operators' units do not have."""

    variant: str
    dtype: str
    batch: int
    size: int

    @property
    def name(self) -> str:
        return f"frozen {self.variant} {self.dtype}, batch {self.batch}"


def units(
    variants: list[str], dtypes: list[str], backend: str, size: int = 256, networks: bool = True
) -> Iterator[Unit | Frozen]:
    """All units, the first dtype's first: of S and the operators that take longest. Networks are for a GPU."""
    served = [name for name in OPERATORS if name in backends.operators(backend)]
    for dtype in dtypes:
        if networks and dtype != "float32":
            yield from (Frozen(variant, dtype, batch, size) for variant in variants for batch in NETWORK_BATCHES)
        for stage in stages(variants, size, 1):
            yield from (Unit(operator, stage, dtype) for operator in served)


def compile_network(unit: Frozen, device: str) -> None:
    """Call a frozen network, which prepares its launches."""
    dtype = getattr(torch, unit.dtype)
    frozen = freeze(load(f"own/{unit.variant}").to(device).eval(), dtype=dtype)
    with torch.inference_mode():
        frozen(torch.rand(unit.batch, 3, unit.size, unit.size, device=device, dtype=dtype))
    if device == "cuda":
        torch.cuda.synchronize()


def compile_unit(unit: Unit, backend: str, device: str, batches: tuple[int, ...], training: tuple[bool, ...]) -> None:
    """Launch the unit's kernels once for each batch, without and with gradients."""
    for batch in batches:
        case = operands(unit.operator, unit.stage._replace(batch=batch)).to(device, getattr(torch, unit.dtype))
        for wanted in training:
            tensors = [t.requires_grad_(wanted) for t in case.tensors]
            with torch.set_grad_enabled(wanted), backends.use_backend(backend):
                try:
                    result = case.public(*tensors)
                except backends.BackendError:
                    continue  # not served: nothing to compile
                if wanted and result.requires_grad:
                    torch.autograd.grad(result.float().sum(), tensors, allow_unused=True)
            if device == "cuda":
                torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="warm.py", description=__doc__.splitlines()[0])
    parser.add_argument("share", type=int, help="which share, from 0")
    parser.add_argument("shares", type=int, help="how many there are")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N units of the share")
    parser.add_argument("--only-training-of", metavar="VARIANT", help="the training of this variant at batch 64 alone")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--size", type=int, default=256, help="of the images, px")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--triton-s-ptxas", action="store_true", help="the assembler that Triton itself uses")
    given = parser.parse_args(arguments)
    if given.triton_s_ptxas:
        use_triton_s_ptxas()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    variants = [given.only_training_of] if given.only_training_of else ["s", "xxs"]
    training, batches = ((True,), BATCHES[:1]) if given.only_training_of else ((False, True), BATCHES)
    networks = device == "cuda" and not given.only_training_of
    every = list(units(variants, given.dtypes.split(","), given.backend, given.size, networks))
    mine = every[given.share :: given.shares]
    for index, unit in enumerate(mine[given.skip :], given.skip):
        started = time.monotonic()
        line = {"what": "warm", "share": given.share, "index": index, "unit": unit.name}
        print(json.dumps(line | {"begun": True}), flush=True)  # the last of these is at fault if the process dies
        try:
            if isinstance(unit, Frozen):
                compile_network(unit, device)
            else:
                compile_unit(unit, given.backend, device, batches, training)
        except Exception as error:  # whatever it is, the other units are worth compiling
            line["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(line | {"seconds": round(time.monotonic() - started, 1)}), flush=True)
        if "error" in line and device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(LOST)  # ordinary ways to end would ask the GPU again
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
