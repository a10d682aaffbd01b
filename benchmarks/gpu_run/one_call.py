# SPDX-License-Identifier: Apache-2.0
"""One call of each kernel of S at a batch, between the marks at which a profiler starts and stops.

    ncu --profile-from-start off … python one_call.py --batch 256

Everything is warmed up before the first mark, so that the profiler sees a call as it is in use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator

import torch

from mvit_kernels import backends
from mvit_kernels.bench.suites.operands import OPERATORS, operands, stages


def calls(batch: int, size: int, device: str, names: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each operator, stage and backend that serves it, in bfloat16."""
    for backend in names:
        for stage in stages(["s"], size, batch):
            for operator in OPERATORS:
                if operator not in backends.operators(backend):
                    continue
                case = operands(operator, stage).to(device, torch.bfloat16)

                def call(case=case, backend=backend) -> object:
                    with torch.no_grad(), backends.use_backend(backend):
                        return case.public(*case.tensors)

                try:
                    call()
                except backends.BackendError:
                    continue
                yield f"{backend} {operator} s/{stage.index}", call


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="one_call.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=256, help="of the images, px")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [b for b in backends.PREFERENCE[device] if b != "reference" and not backends.unavailable(b, device)]
    ready = list(calls(given.batch, given.size, device, names))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for name, call in ready:
        print(json.dumps({"what": "one call", "name": name}), flush=True)
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        torch.cuda.cudart().cudaProfilerStop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
