# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of every kernel and tile, for GPUs that need not be there.

Example:
    $ python -m gates.triton_gate    # compile everything, and write tests/data/triton_gate.csv
    $ python -m gates.triton_gate --arch 90 --only _mlp,_hidden --dry

The operators plan their launches for meta tensors of every shape that a model of the zoo has; each distinct plan is
compiled for each architecture, as its launch would compile it. A row has registers per thread, bytes of stack (where
spills go), shared memory, and which tensor-core instructions were emitted. PTX is searched for sums that differ from
lane to lane, and the machine code for 9.0, whose products are asynchronous, for mistakes of the assembler
(`gates.machine_code`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gates import machine_code, table
from support import TESTS

TABLE = TESTS / "data" / "triton_gate.csv"
ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may have
COLUMNS = ("case", "kernel", "dtype", "tile", "arch", "registers", "stack", "shared", "mma", "async_copies", "triton")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}

# -------------------------------------------------------------------------------------------------------- what to build

WIDTHS = (64, 80, 96, 120, 144, 192, 240)  # of xxs, xs and s
ROWS = {64: 1024, 80: 256, 96: 1024, 120: 256, 144: 1024, 192: 256, 240: 64}  # an image's, at 256 px
SIDES = {1024: 32, 256: 16, 64: 8}


def stage(d: int, batch: int, dtype: torch.dtype, precision: str, target: int, probability: float = 0.0) -> list:
    """The launches of one transformer layer of width d, forward and backward: operator by operator, and as one operator
    with this probability for every dropout."""
    from mvit_kernels.backends.triton import (
        layer_norm,
        layer_norm_linear,
        layer_norm_mlp,
        linear_residual,
        patch_attention,
        transformer_layer,
    )
    from mvit_kernels.backends.triton._launch import watching

    def t(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    side = SIDES[ROWS[d]]
    x, norm = t(batch, side, side, d), (t(d, of=torch.float32), t(d, of=torch.float32))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with watching(target) as launches:
            qkv, mean, rstd = layer_norm_linear.forward(x, *norm, t(3 * d, d), t(3 * d), 1e-5, "")
            layer_norm_linear.backward(qkv, x, mean, rstd, *norm, t(3 * d, d), t(3 * d), "")
            h, _, _ = layer_norm_linear.forward(x, *norm, t(2 * d, d), t(2 * d), 1e-5, "silu")
            layer_norm_linear.backward(h, x, mean, rstd, *norm, t(2 * d, d), t(2 * d), "silu")
            out, logsumexp = patch_attention.forward(qkv, 4, (2, 2), 0.1)
            patch_attention.backward(out, qkv, out, logsumexp, 4, (2, 2), 0.1)
            linear_residual.forward(out, t(d, d), t(d), x)
            linear_residual.backward(x, out, t(d, d))
            mlp = (*norm, t(2 * d, d), t(2 * d), t(d, 2 * d))
            layer_norm_mlp.forward(x, *mlp, t(d), 1e-5)
            layer_norm_mlp.backward(x, x, mean, rstd, *mlp)
            weights = (*norm, t(3 * d, d), t(3 * d), t(d, d), t(d), *mlp, t(d))
            kept = [weights[i] for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
            settings = (t(2, of=torch.int64), 4, (2, 2), 1e-5, (probability,) * 4, True)
            out, *saved = transformer_layer.forward(x, *weights, *settings)
            transformer_layer.backward(out, x, *saved, *kept, *settings)
            _, mean, rstd = layer_norm.forward(x, *norm, 1e-5)
            layer_norm.backward(x, x, mean, rstd, norm[0])
    finally:
        torch.set_float32_matmul_precision(before)
    return launches


def map_of(
    channels: int, batch: int, dtype: torch.dtype, target: int, activation: str = "silu", side: int | None = None
) -> list:
    """The launches of batch norm over a channels-last map of 32², or side², forward and backward; one of 8² for one
    image, which is one launch each."""
    from mvit_kernels.backends.triton import batch_norm_activation
    from mvit_kernels.backends.triton._launch import watching

    side = side or (32 if batch > 1 else 8)
    x = torch.empty((batch, side, side, channels), device="meta", dtype=dtype).permute(0, 3, 1, 2)
    vector = torch.empty(channels, device="meta")
    with watching(target) as launches:
        out, mean, rstd, _ = batch_norm_activation.forward(x, vector, vector, 1e-5, activation)
        batch_norm_activation.backward(out, x, mean, rstd, vector, vector, activation)
    return launches


def cases(target: int) -> Iterator[tuple[str, object]]:
    """(name, launch): every width in bfloat16 for one image, and for 64 with live dropout; some widths in the other
    dtypes, without dropout."""
    for d in WIDTHS:
        for batch, probability in ((64, 0.1), (1, 0.0)):
            for launch in stage(d, batch, torch.bfloat16, "highest", target, probability):
                yield f"d={d}", launch
    for d in (64, 144, 192, 240):
        for launch in stage(d, 64, torch.float32, "high", target):
            yield f"d={d}", launch
        for launch in stage(d, 64, torch.float32, "highest", target):
            yield f"d={d}", launch
    for launch in stage(144, 64, torch.float16, "highest", target):
        yield "d=144", launch
    for channels in (16, 17, 24, 144, 640):  # the widths of tiles; 17 is read an element at a time
        for launch in map_of(channels, 64, torch.bfloat16, target):
            yield f"d={channels}", launch
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels, batch, activation in ((144, 64, ""), (144, 64, "silu"), (144, 1, "silu"), (17, 1, "silu")):
            for launch in map_of(channels, batch, dtype, target, activation):
                yield f"d={channels}", launch


# ------------------------------------------------------------------------------------------------------------- building


def source(launch) -> tuple[object, dict]:
    """What Triton compiles for a launch whose pointers are all on 16 bytes, and its options."""
    from triton.compiler import ASTSource

    kernel, plan = launch.plan.kernel, launch.plan
    signature, constants, attributes = {}, {}, {}
    arguments = (*launch.tensors, *launch.scalars, *plan.constants)
    assert len(arguments) == len(kernel.params), f"{kernel.fn.__name__} takes {len(kernel.params)} arguments"
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")
    return ASTSource(kernel, signature, constants, attributes), dict(plan.options)


def tile(launch) -> str:
    """The constants by name, without those that are 0 or False."""
    names = [p.name for p in launch.plan.kernel.params][-len(launch.plan.constants) :]
    pairs = zip(names, launch.plan.constants, strict=True)
    shown = [f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in pairs if v]
    plan = launch.plan
    limit = [f"maxnreg={plan.registers}"] if plan.registers else []
    return " ".join([*shown, f"warps={plan.num_warps}", f"stages={plan.num_stages}", *limit])


def compiled_for(launch, arch: int):
    """What Triton compiles for the launch, with its ``asm`` of all stages."""
    import triton
    from triton.backends.compiler import GPUTarget

    ast, options = source(launch)
    return triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)


def float32_operations(ptx: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each float32 operation and its operands, by the register that it defines."""
    found = re.findall(r"^\s*(?:@\S+ )?([a-z]+)\S*\.f32\s+(%\w+), (.*);", ptx, re.MULTILINE)
    return {register: (name, tuple(operands.split(", "))) for name, register, operands in found}


def contracted_sums(ptx: str) -> list[str]:
    """Steps of sums over lanes that are `mul p, a, b; shfl.bfly q, p; fma d, a, b, q`: each lane adds its own product,
    unrounded, to the other's, rounded, and their sums differ (docs/kernels/triton.md, "Lanes that disagree")."""
    moved = dict(re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx))
    brought = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    fused = re.findall(r"(fma\S*\.f32\s+%\w+, %\w+, %\w+, (%\w+);)", ptx)
    return [text for text, addend in fused if moved.get(addend, addend) in brought]


def build(launch, arch: int) -> dict[str, object]:
    """Compile, and describe the result."""
    import triton

    compiled = compiled_for(launch, arch)
    ptx = compiled.asm["ptx"]
    wrong = contracted_sums(ptx)
    assert not wrong, f"{launch.plan.kernel.fn.__name__} on sm_{arch}, {tile(launch)}: lanes disagree, {wrong}"
    kinds = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
    if arch == 90:
        code = machine_code.disassembled(compiled.asm["cubin"])
        wrong = machine_code.undefined_registers(code) or machine_code.overwritten_operands(code)
        assert not wrong, f"{launch.plan.kernel.fn.__name__} on sm_{arch}, {tile(launch)}: {wrong}"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "mma": "+".join(kind for kind, word in kinds.items() if word in ptx) or "none",
        "async_copies": int("cp.async.c" in ptx),
        "triton": triton.__version__,
    }


def describe(case: str, launch, arch: int) -> dict[str, object]:
    """The columns of a row that are known before compiling."""
    kernel = launch.plan.kernel
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    dtypes = [t.dtype for t in launch.tensors if t is not None and t.dtype in (torch.bfloat16, torch.float16)]
    kind = str((dtypes or [torch.float32])[0]).removeprefix("torch.")
    if "ieee" in launch.plan.constants:
        kind += " (ieee)"
    return {"case": case, "kernel": name, "dtype": kind, "tile": tile(launch), "arch": arch}


def different(arch: int) -> list[tuple[dict[str, object], object]]:
    """What to compile for an architecture: one launch for each variant of each kernel. Variants differ in constants and
    types, and in which tensors are there."""
    found = {}
    for case, launch in cases(arch):
        row = describe(case, launch, arch)
        variant = tuple(None if t is None else t.dtype for t in launch.tensors)
        tile = "" if row["kernel"].endswith("_sum_parts") else row["tile"]  # sums have no tile but BLOCK
        found.setdefault((row["kernel"], tile, variant), (row, launch))
    return list(found.values())


def rows(arch: int, only: set[str] | None = None, share: tuple[int, int] = (0, 1)) -> list[dict[str, object]]:
    """The table's rows of an architecture: of kernels that have one of `only` in their name, every n-th from the
    i-th."""
    wanted = [pair for pair in different(arch) if not only or any(part in pair[0]["kernel"] for part in only)]
    return [row | build(launch, arch) for row, launch in wanted[share[0] :: share[1]]]


def judge_limits(row: dict[str, Any]) -> str:
    """What every compiled kernel keeps: no spills, and no more shared memory than a block may have.

    Returns:
        The kernel's name for messages.
    """
    name = f"{row['kernel']} {row['dtype']} on sm_{row['arch']}: {row['tile']}"
    assert row["stack"] == 0, f"{name} spills: {row['stack']} bytes of stack"
    assert row["shared"] <= SHARED_LIMIT[row["arch"]], f"{name} does not launch: {row['shared']} bytes of shared memory"
    return name


def judge_plans(planned: Iterable[dict[str, Any]], committed: Iterable[dict[str, Any]]) -> None:
    """That a table's rows of an architecture are of the launches that are planned today, each once."""
    columns = ("case", "kernel", "dtype", "tile", "arch")

    def count(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
        return sorted(tuple(str(row[name]) for name in columns) for row in rows)

    assert count(planned) == count(committed), "run `make gate` and look at the table's diff"


def sort_key(row: dict[str, object]) -> tuple:
    return (
        row["kernel"],
        row["dtype"],
        int(row["case"].removeprefix("d=")),
        row["tile"],
        int(row["arch"]),
        row["registers"],
    )


def main() -> None:
    parser = table.parser(__doc__, ARCHITECTURES)
    parser.add_argument("--only", type=lambda text: set(text.split(",")))
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(rows, arch, arguments.only, (i, 8)) for arch in arguments.arch for i in range(8)]
        found = sorted((row for job in jobs for row in job.result()), key=sort_key)
    table.publish(found, TABLE, COLUMNS, dry=arguments.dry)


if __name__ == "__main__":
    main()
