# SPDX-License-Identifier: Apache-2.0
"""How many instructions the compiled kernels execute, by class: counted without a GPU, as support/ptx runs them.

Example:
    $ python -m gates.executed           # runs all, and writes tests/data/executed.csv (minutes)
    $ python -m gates.executed --dry --case small --only _product

A row is one launch, of Triton's or of nvcc's for sm_80: instructions that warps execute in all its programs, so that a
change which makes the compiler emit more of them, or run a loop more often, shows before it is timed. Every launch is
checked on the way: an access outside of its tensors, a race, lanes that disagree or a deadlock end the run. What was
compiled and translated before is kept in build/.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from gates import table
from gates.triton_gate import compiled_for, describe, map_of, stage
from gates.triton_networks import launch_of, layers
from support import TESTS
from support.ptx.program import Program

TABLE = TESTS / "data" / "executed.csv"
ARCH = 80
CLASSES = (
    *("all", "mma", "ldmatrix", "cp.async", "ld.global", "st.global", "ld.shared", "st.shared", "barrier", "shuffle"),
    *("div", "special", "float", "convert", "integer"),
)
COLUMNS = ("case", "kernel", "tile", "programs", *CLASSES, "compiler")
CUDA = ("cuda small", "cuda s stage 3", "cuda s stage 4", "cuda s stage 5")  # gates.executed_cuda.CALLS
NETWORK_SIDE = 64  # pixels of the image: every convolution of S, at a sixteenth of the work


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


def attentions() -> list:
    """Attention, forward and backward: of 6 tokens, of 64, and of 65, more than backward takes whole in two parts."""
    from mvit_kernels.backends.triton import patch_attention
    from mvit_kernels.backends.triton._launch import watching

    with watching(ARCH) as launches:
        for shape, heads, head_dim in (((2, 4, 6), 4, 60), ((1, 16, 16), 2, 36), ((1, 10, 26), 1, 36)):
            qkv = torch.empty((*shape, 3 * heads * head_dim), device="meta", dtype=torch.bfloat16)
            out, logsumexp = patch_attention.forward(qkv, heads, (2, 2), head_dim**-0.5)
            patch_attention.backward(out, qkv, out, logsumexp, heads, (2, 2), head_dim**-0.5)
    return launches


def batch_norms() -> list:
    """Batch norm with SiLU, forward and backward: of maps that are one launch each way, and of one in parts."""
    maps = ((144, 1, 8), (17, 1, 8), (24, 2, 24))  # channels, images, side
    return [each for c, n, side in maps for each in map_of(c, n, torch.bfloat16, ARCH, side=side)]


def network() -> list:
    """Every convolution of a frozen MobileViT-S for one image, and what else such a network launches."""
    from mvit_kernels.backends.triton import mean, resize
    from mvit_kernels.backends.triton._launch import watching

    def t(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    with watching(ARCH):
        convolutions = [launch_of(layer, 1, torch.bfloat16) for layer in layers("s", NETWORK_SIDE)]
        more = [mean.launch(t(2, 9, 9, 72), t(2, 1, 1, 72)), resize.launch(t(1, 7, 7, 144), t(1, 8, 8, 144))]
    return convolutions + more


def rows_of_their_own() -> list:
    """What frozen networks launch for few rows of one image, and 9.0's tiles for many rows."""
    import pytest

    from mvit_kernels.backends.triton import layer_norm_linear, layer_norm_mlp, linear_residual, projection_norm_linear
    from mvit_kernels.backends.triton._launch import watching
    from support.row_tiles import as_for_many_rows

    def t(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    with watching(ARCH) as many, pytest.MonkeyPatch.context() as patched:
        few = [
            projection_norm_linear.launch(
                *(t(rows, inner), t(d, inner), t(d), t(rows, d), t(d), t(d), t(n, d), t(n), t(rows, d), t(rows, n)),
                1e-5,
            )
            for rows, inner, d, n in ((64, 240, 240, 480), (520, 144, 144, 288))
        ]
        as_for_many_rows(patched)
        linear_residual.forward(t(130, 80), t(80, 80), t(80), t(130, 80))
        layer_norm_linear.forward(t(130, 80), t(80), t(80), t(150, 80), t(150), 1e-5, "")
        layer_norm_mlp.forward(t(70, 80), t(80), t(80), t(80, 80), t(80), t(80, 80), t(80), 1e-5)
    return [*few, *many]


def _stage(width: int) -> Callable[[], list]:
    """One image in bfloat16, forward and backward, with dropout."""
    return functools.partial(stage, width, 1, torch.bfloat16, "highest", ARCH, 0.1)


TRITON: dict[str, Callable[[], list]] = {
    "small": small,
    "attention": attentions,
    "batch norm": batch_norms,
    "s network": network,
    "few and many rows": rows_of_their_own,
    "s stage 4": _stage(192),
    "s stage 3": _stage(144),
}
SHARES = 6  # of a case, for processes: its launches cost unlike


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


def rows(case: str, only: str = "", share: int = 0, shares: int = 1) -> Iterator[dict[str, object]]:
    """A row for each launch of a case that is unlike those before it; of these, every `shares`-th from `share` on."""
    yield from (_cuda_rows if case in CUDA else _triton_rows)(case, only, share, shares)


def _triton_rows(case: str, only: str, share: int, shares: int) -> Iterator[dict[str, object]]:
    import triton

    version = re.match(r"[\d.]+", triton.__version__)[0]
    different = {}
    for launch in TRITON[case]():
        described = describe(case, launch, ARCH)
        programs = torch.Size(launch.grid).numel()
        shapes = tuple(None if t is None else t.shape for t in launch.tensors)
        if only in described["kernel"]:
            different.setdefault((described["kernel"], described["tile"], programs, shapes), launch)
    for (kernel, tile, programs, _), launch in list(different.items())[share::shares]:
        _, counts = executed(launch)
        yield _row(case, kernel, tile, programs, counts, f"Triton {version}")


def _cuda_rows(case: str, only: str, share: int, shares: int) -> Iterator[dict[str, object]]:
    from gates import executed_cuda

    for index in range(len(executed_cuda.CALLS[case]))[share::shares]:
        for launch in executed_cuda.launched(case, index):
            kernel, tile = executed_cuda.kernel_of(launch), f"threads={launch.threads} shared={launch.shared}"
            if only in kernel:
                yield _row(case, kernel, tile, launch.blocks, launch.counts, executed_cuda.compiler())


def _row(case, kernel, tile, programs, counts, compiler) -> dict[str, object]:
    row = {"case": case, "kernel": kernel, "tile": tile, "programs": programs}
    return row | {name: counts[name] for name in CLASSES} | {"compiler": compiler}


def _share(case: str, only: str, share: int) -> list[dict[str, object]]:
    """In a process of its own: what it does, as it does it."""
    torch.set_num_threads(1)
    found, began = [], time.monotonic()
    for row in rows(case, only, share, SHARES):
        print(*row.values(), f"{time.monotonic() - began:.0f} s", sep=" | ", file=sys.stderr, flush=True)
        found.append(row)
        began = time.monotonic()
    return found


def main() -> None:
    from gates.cuda_gate import tool

    order = [*TRITON, *CUDA]
    every = [*TRITON, *(CUDA if tool("nvcc") else ())]
    parser = table.parser(__doc__, (ARCH,))
    parser.add_argument("--case", nargs="*", default=every)
    parser.add_argument("--only", default="", help="of kernels that have this in their name")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = {pool.submit(_share, c, arguments.only, i): (c, i) for c in arguments.case for i in range(SHARES)}
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()  # a fault ends the run
            print(f"--- {done} of {len(jobs)} parts", file=sys.stderr, flush=True)
    found = [row for job in jobs for row in job.result()]
    if not arguments.dry:  # those of other cases, and of other kernels, stay
        made = set(arguments.case)
        kept = [r for r in table.committed(TABLE) if r["case"] not in made or arguments.only not in r["kernel"]]
        found += kept
    found.sort(key=lambda row: (order.index(row["case"]), row["kernel"], row["tile"], row["programs"], row["all"]))
    table.publish(found, TABLE, COLUMNS, dry=arguments.dry)


if __name__ == "__main__":
    main()
