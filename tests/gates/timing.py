# SPDX-License-Identifier: Apache-2.0
"""What a kernel takes on an H200, predicted from its machine code, and where its warps wait; without a GPU.

Example:
    $ cd tests && python -m gates.timing transformer --batch 256 --side 32 --width 144
    $ python -m gates.timing linear_residual --batch 64 --side 16 --width 192 --set l2_latency=300 --hot 20
    $ PYTHONPATH=~/other:. python -m gates.timing transformer … --root ~/other    # the kernels of another checkout

The source is compiled for sm_90. `support.sass` executes the integers of a block, and schedules its instructions by the
assembler's control codes on a model of a multiprocessor. Reported are microseconds of the launch, how busy the units
are, and the cycles of warps by reason and by place: to be looked at is the reason that has most and is not `issued`.
What the model knows and what not, and how it compares with what was measured: docs/kernels/timing.md. A prediction is
no measurement; differences between two variants of a kernel are worth more than the microseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from gates import cuda_gate
from support import ROOT, cuda_sources, emulation
from support.sass import launches, lines
from support.sass.control import scheduled
from support.sass.launches import Launch, cuda_launches, operators
from support.sass.multiprocessor import BUILT, REASONS, Result, simulate
from support.sass.pipes import Machine
from support.sass.trace import Trace, trace

STRETCH = 8  # times as many blocks are simulated as are resident; more follow in the same step


@dataclasses.dataclass
class Prediction:
    launch: Launch
    microseconds: float
    resident: int  # blocks at a time on a multiprocessor
    registers: int
    result: Result  # of the stretch that was simulated
    traced: Trace
    code: list

    @property
    def issue(self) -> float:
        """The part of the issue slots that is used."""
        return self.result.issued / 4 / self.result.cycles

    def busy(self, pipe: str) -> float:
        return self.result.busy[pipe] / (1 if pipe == "shared memory" else 4) / self.result.cycles


def cubin(kernel: str) -> Path:
    """What nvcc makes, for sm_90, of the source of csrc/cuda that has a kernel, by its mangled name; compiled again
    when it, a header or nvcc is another.

    Raises:
        LookupError: no source has it.
    """
    for source in cuda_sources.cuda_sources():
        value = f"Li{source.value}E" if source.value.isdigit() else f"{len(source.value)}{source.value}E"
        if f"{len(source.path.stem)}{source.path.stem}I" in kernel and value in kernel:
            return _compiled(source)
    raise LookupError(f"no source of csrc/cuda has the kernel {kernel}")


def _compiled(source: cuda_sources.Source) -> Path:
    command = [*cuda_gate.command(source, 90), "-lineinfo"]
    read = [path.read_text() for path in (*sorted(source.path.parent.glob("*.h")), source.path)]
    digest = hashlib.sha256("\0".join([cuda_gate.nvcc_version(), *command, *read]).encode()).hexdigest()[:16]
    file = BUILT / f"{source.name}-{digest}.cubin"
    if not file.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(own)], check=True)
        os.replace(own, file)
    return file


@functools.cache
def listing(file: Path, kernel: str):
    """(instructions, their schedules) of one kernel of a cubin."""
    command = [cuda_gate.tool("cuobjdump"), "-sass", "-fun", kernel, str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(scheduled(printed.splitlines()))[kernel]


def resident_blocks(launch: Launch, registers: int, static: int, machine: Machine) -> int:
    """How many blocks a multiprocessor holds at once: by registers (256 at a time), shared memory and threads. nvcc
    counts the kilobyte that the system has of each block's shared memory as `static`, Triton does not."""
    warps = launch.threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        machine.registers // (of_warp * warps),
        machine.shared // (launch.shared + max(static, 1024)),
        machine.warps // warps,
        machine.blocks,
    )


def traced(launch: Launch, code: list) -> Trace:
    """The launch's first block; one from the middle of the grid tells which tensors blocks share."""
    middle = launch.grid[0] // 2
    return trace(code, launch.threads, launch.bank(), [(0, 0, 0)] + [(middle, 0, 0)] * (middle > 0))


def predicted(launch: Launch, machine: Machine, file: Path | None = None, known: Trace | None = None) -> Prediction:
    """Time a launch.

    Args:
        file: the cubin that has its kernel; compiled if it is None.
        known: its trace, if it was made before.
    """
    file = file or cubin(launch.kernel)
    code, controls = listing(file, launch.kernel)
    used = cuda_gate.usage(file, 90)[launch.kernel]
    resident = resident_blocks(launch, used["registers"], used["shared"], machine)
    if resident == 0:
        raise ValueError(f"a block of {launch.threads} threads and {launch.shared} bytes fits no multiprocessor")
    known = known or traced(launch, code)
    count = int(np.prod(launch.grid))
    each = -(-count // machine.multiprocessors)  # blocks of the multiprocessor that has most
    blocks = min(each, max(STRETCH * resident, STRETCH))
    result = simulate(
        code, controls, known, min(resident, blocks), blocks, machine, min(count, machine.multiprocessors)
    )
    cycles = result.cycles
    if each > blocks:  # the rest at the pace of the second half
        ends = np.sort(result.ends)
        cycles += (each - blocks) * (ends[-1] - ends[blocks // 2 - 1]) / (blocks - blocks // 2)
    microseconds = cycles / machine.clock / 1e3 + machine.launch
    return Prediction(launch, microseconds, resident, used["registers"], result, known, code)


def report(found: Prediction, file: Path, hot: int) -> str:
    """What `main` prints."""
    launch, result = found.launch, found.result
    pipes = ("tensor", "shared memory", "special", "integer", "multiply", "float")
    printed = [
        f"{cuda_gate.readable([launch.kernel])[0]}: {found.microseconds:.1f} µs",
        f"  {int(np.prod(launch.grid))} blocks of {launch.threads} threads, {found.registers} registers, "
        f"{launch.shared} bytes of shared memory; {found.resident} at a time",
        f"  {found.traced.instructions} warp instructions a block; issue slots {found.issue:.0%}, "
        + ", ".join(f"{pipe} {found.busy(pipe):.0%}" for pipe in pipes),
        "",
        "cycles of warps by reason:",
    ]
    total, by_reason = result.waits.sum(), result.waits.sum(0)
    printed += [f"  {by_reason[k] / total:6.1%}  {REASONS[k]}" for k in _largest(by_reason, 0.002)]
    printed += ["", f"by place, the {hot} stretches of code without a jump that take most:"]
    for first, last, waits in stretches(found)[:hot]:
        place = f"{found.code[first].address:#7x} to {found.code[last].address:#7x}"
        printed.append(f"  {waits.sum() / total:6.1%}  {place}: {_reasons(waits)}")
    if of_lines := by_line(found, file)[:hot]:
        printed += ["", f"by line, the {hot} that take most:"]
    for line, waits in of_lines:
        place = f"{Path(line.file).name}:{line.number}"
        printed.append(f"  {waits.sum() / total:6.1%}  {place}: {_reasons(waits)}\n          | {line.text()[:100]}")
    return "\n".join(printed)


def _reasons(waits: np.ndarray) -> str:
    return ", ".join(f"{REASONS[k]} {waits[k] / waits.sum():.0%}" for k in _largest(waits, 0.04)[:5])


def by_line(found: Prediction, file: Path) -> list[tuple[lines.Line, np.ndarray]]:
    """(line of the source, cycles by reason), the costliest first."""
    command = [cuda_gate.tool("nvdisasm"), "-c", "-gi", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    places = lines.of(printed.splitlines(), found.launch.kernel)
    sums: dict[lines.Line, np.ndarray] = {}
    for one, waits in zip(found.code, found.result.waits, strict=True):
        if (line := places.get(one.address)) is not None and waits.any():
            sums[line] = sums.get(line, 0) + waits
    return sorted(sums.items(), key=lambda each: -each[1].sum())


def _largest(values: np.ndarray, part: float) -> np.ndarray:
    """Where the values are that are more than this part of all, the largest first."""
    order = np.argsort(-values)
    return order[values[order] > part * values.sum()]


def stretches(found: Prediction) -> list[tuple[int, int, np.ndarray]]:
    """(first, last instruction, cycles by reason) of the code between jumps and jumps' targets, the costliest first."""
    count = np.bincount(np.concatenate(found.traced.paths), minlength=len(found.code))
    result, first = [], 0
    for number in range(1, len(found.code) + 1):
        if number == len(found.code) or count[number] != count[number - 1]:
            if count[first]:
                result.append((first, number - 1, found.result.waits[first:number].sum(0)))
            first = number
    return sorted(result, key=lambda each: -each[2].sum())


def use(root: Path) -> None:
    """Take kernels and host code from another checkout."""
    cuda_sources.FOLDER = emulation.KERNELS = root / "csrc" / "cuda"
    emulation.TESTS = root / "tests"
    launches.FOLDERS.insert(0, emulation.TESTS / "support" / "emulated_cuda")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gates.timing", description=__doc__.splitlines()[0])
    parser.add_argument("operator", choices=operators())
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=32, help="of the map: 32, 16, 8 for stages 3 to 5 at 256 pixels")
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--hot", type=int, default=12, help="how many places to list")
    parser.add_argument("--triton", action="store_true", help="the Triton kernel, as Triton compiles it here")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose kernels are timed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of support.sass.pipes.Machine")
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=VALUE", help="more sizes: layers=2, tiles=1")
    return parser


def main() -> None:
    given = arguments().parse_args()
    use(given.root)
    machine = Machine(**{name: float(value) for name, value in (each.split("=") for each in given.set)})
    more = {name: int(value) for name, value in (each.split("=") for each in given.size)}
    if given.triton:
        from support.sass.triton_launches import triton_launches

        found = triton_launches(given.operator, given.batch, given.side, given.width)
    else:
        found = [
            (launch, cubin(launch.kernel))
            for launch in cuda_launches(given.operator, given.batch, given.side, given.width, **more)
        ]
    for launch, file in found:
        print(report(predicted(launch, machine, file), file, given.hot), end="\n\n")


if __name__ == "__main__":
    main()
