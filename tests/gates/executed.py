# SPDX-License-Identifier: Apache-2.0
"""How many instructions the compiled kernels execute, by class: counted without a GPU, as support/ptx runs them.

Example:
    $ python -m gates.executed           # runs all, and writes tests/data/executed.csv (minutes)
    $ python -m gates.executed --dry --case small --only _product

A row is one launch of Triton's for sm_80: instructions that warps execute in all its programs, so that a change which
makes the compiler emit more of them, or run a loop more often, shows before it is timed. Every launch is checked on the
way: an access outside of its tensors, a race or a deadlock ends the run.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator

import torch

from gates import table
from gates.triton_gate import compiled_for, describe, stage
from support import TESTS
from support.ptx.program import Program

TABLE = TESTS / "data" / "executed.csv"
ARCH = 80
CLASSES = (
    *("all", "mma", "ldmatrix", "cp.async", "ld.global", "st.global", "ld.shared", "st.shared", "barrier", "shuffle"),
    *("div", "special", "float", "convert", "integer"),
)
COLUMNS = ("case", "kernel", "tile", "programs", *CLASSES, "triton")
CASES = {"s stage 3": 144, "s stage 4": 192}  # one image, bfloat16, forward and backward


def small() -> list:
    """Launches of a second or two, which a test repeats: 70 rows of 24."""
    from mvit_kernels.backends.triton import layer_norm, linear_residual, patch_attention
    from mvit_kernels.backends.triton._launch import watching

    def t(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    with watching(ARCH) as launches:
        linear_residual.forward(t(70, 24), t(40, 24), t(40), t(70, 40))
        layer_norm.forward(t(70, 24), t(24), t(24), 1e-5)
        patch_attention.forward(t(1, 10, 26, 60), 1, (2, 2), 0.2)
    return launches


def launches(case: str) -> list:
    return small() if case == "small" else stage(CASES[case], 1, torch.bfloat16, "highest", ARCH, 0.1)


def filled(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Values for a tensor that was planned with; which they are does not matter here."""
    if tensor is None:
        return None
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)


def executed(launch, change=lambda ptx: ptx, seed: int = 0) -> tuple[Program, Counter[str]]:
    """Run a launch that was planned for meta tensors, and count. `change` is applied to its PTX before.

    Raises:
        EmulationFault: the kernel does what it must not.
    """
    compiled = compiled_for(launch, ARCH)
    program = Program(change(compiled.asm["ptx"]))
    arguments = [*(filled(t) for t in launch.tensors if t is not None), *launch.scalars]
    threads = 32 * launch.plan.num_warps
    program.launch(launch.grid, threads, shared=compiled.metadata.shared, arguments=arguments, seed=seed)
    return program, program.counts()


def rows(case: str, only: str = "") -> Iterator[dict[str, object]]:
    """A row for each launch of a case that is unlike those before it."""
    import triton

    seen = set()
    for launch in launches(case):
        described = describe(case, launch, ARCH)
        if only not in described["kernel"]:
            continue
        programs = torch.Size(launch.grid).numel()
        shapes = tuple(None if t is None else t.shape for t in launch.tensors)
        key = (described["kernel"], described["tile"], programs, shapes)
        if key in seen:
            continue
        seen.add(key)
        _, counts = executed(launch)
        row = {"case": case, "kernel": described["kernel"], "tile": described["tile"], "programs": programs}
        yield row | {name: counts[name] for name in CLASSES} | {"triton": re.match(r"[\d.]+", triton.__version__)[0]}


def main() -> None:
    parser = table.parser(__doc__, (ARCH,))
    parser.add_argument("--case", nargs="*", default=["small", *CASES])
    parser.add_argument("--only", default="", help="of kernels that have this in their name")
    arguments = parser.parse_args()
    found = [] if arguments.dry else [row for row in table.committed(TABLE) if row["case"] not in arguments.case]
    for case in arguments.case:
        for row in rows(case, arguments.only):
            print(*row.values(), sep=" | ", file=sys.stderr, flush=True)
            found.append(row)
    table.publish(found, TABLE, COLUMNS, dry=arguments.dry)


if __name__ == "__main__":
    main()
