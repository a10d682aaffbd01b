# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of every CUDA kernel, for GPUs that need not be there.

Example:
    $ python -m gates.cuda_gate          # compiles all, and writes tests/data/cuda_gate.csv (minutes)
    $ python -m gates.cuda_gate --arch 90 --only transformer --dry

A row has registers a thread, bytes of stack (where spills go), static shared memory, how many tensor-core instructions
the listing has, and how many integer divisions and accesses to the stack its loops have.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gates import sass, table
from support import ROOT
from support.cuda_sources import Source, cuda_sources

TABLE = ROOT / "tests" / "data" / "cuda_gate.csv"
BUILT = ROOT / "build" / "cuda_gate"
ARCHITECTURES = (80, 90, 100, 120)
COLUMNS = ("kernel", "arch", "registers", "stack", "shared", "mma", "divisions", "spilled", "nvcc")
FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr"


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings some of them."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def nvcc_version() -> str:
    printed = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV([\d.]+)", printed)[1]


def readable(symbols: list[str]) -> list[str]:
    """`transformer_kernel<BFloat16, 144, 36, 2>` for each mangled name."""
    printed = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |mvit::|\(.*$", "", name) for name in printed.splitlines()]


def usage(file: Path, arch: int) -> dict[str, dict[str, int]]:
    """Of each kernel in a library or cubin, by its mangled name: registers, stack and static shared memory."""
    command = [tool("cuobjdump"), "-res-usage", "-arch", f"sm_{arch}", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", printed):
        found[name] = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
    return found


def listed(file: Path, arch: int, symbol: str | None = None) -> dict[str, dict[str, int]]:
    """Of each kernel's listing, or of one's: tensor-core instructions, and what its loops should not have."""
    command = [tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", *(["-fun", symbol] if symbol else []), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        return {
            name: {
                "mma": sum("HMMA" in each.name for each in code),
                "divisions": sass.in_loops(code, lambda each: each.divides),
                "spilled": sass.in_loops(code, lambda each: each.spills),
            }
            for name, code in sass.functions(process.stdout)
        }


def rows(file: Path, arch: int, nvcc: str) -> list[dict[str, object]]:
    """The table's rows of a library or cubin."""
    used, counted = usage(file, arch), listed(file, arch)
    return [
        {"kernel": name, "arch": arch, **used[symbol], **counted[symbol], "nvcc": nvcc}
        for symbol, name in zip(used, readable(list(used)), strict=True)
    ]


def command(source: Source, arch: int) -> list[str]:
    """What compiles a source to a cubin; ``-o`` and the cubin's name are to follow."""
    return [tool("nvcc"), *FLAGS.split(), source.define, f"-arch=sm_{arch}", "-cubin", str(source.path)]


def compiled(source: Source, arch: int) -> Path:
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / f"{source.name}.sm_{arch}.cubin"
    subprocess.run([*command(source, arch), "-o", str(target)], check=True)
    return target


def main() -> None:
    parser = table.parser(__doc__, ARCHITECTURES)
    parser.add_argument("--only", default="", help="of sources that have this in their name")
    arguments = parser.parse_args()
    nvcc = nvcc_version()
    sources = [source for source in cuda_sources() if arguments.only in source.name]
    work = [(source, arch) for arch in arguments.arch for source in sources]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda job: rows(compiled(*job), job[1], nvcc), work))
    found = {(row["kernel"], row["arch"]): row for some in done for row in some}
    if arguments.only and not arguments.dry:  # the other kernels' rows stay
        found = {(row["kernel"], row["arch"]): row for row in table.committed(TABLE)} | found
    table.publish((found[key] for key in sorted(found)), TABLE, COLUMNS, dry=arguments.dry)


if __name__ == "__main__":
    main()
