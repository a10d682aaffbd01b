# SPDX-License-Identifier: Apache-2.0
"""The automatic choice: in which order backends are asked for a call, by what was measured, in literal tables.

Example:
    >>> order(call)          # of an MLP of 240 on 4096 rows, bfloat16, inference
    ('reference', 'triton', 'cuda')
    >>> one_launch_pays(tokens=64, sequences=256, processors=132, alone=False)
    True

It depends on shapes, dtypes and the device, and on whether ``torch.compile`` is tracing, which folds it. Whoever is
unavailable or cannot serve the call is passed over. Nothing is measured at call time: ``python -m
mvit_kernels.bench.choice`` prints rows of the tables from measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .._utils.compiling import assume_constant_result
from . import gpu
from .contract import Call

# What applies where nothing was measured, by device; plain PyTorch comes last. On a GPU Triton comes before CUDA C++,
# as for eleven of the twelve calls in `OPERATORS`. A whole stack is asked of CUDA C++ first: it alone has one launch.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# What comes first by prediction alone. An inverted residual is one launch in CUDA C++, which moves an eighth of the
# bytes of Triton's three: for the seven of S at batch 256 some 8 µs an image instead of 18 (docs/kernels).
PREDICTED = {"inverted_residual": ("cuda", "triton", "reference")}

# A map of fewer elements leaves batch norm to PyTorch in eager training: by arithmetic, not by measurement. The kernel
# spares 3.75 bytes an element forward and 5.5 backward (docs/kernels/triton.md), 3.4 ps at the 2.7 TB/s at which an
# H200 copies, and costs the host 28 to 32 µs more than PyTorch's operators (with launches that do nothing, on a Xeon),
# which it buys back from 2²³ elements on. Compiled, the host is out of it.
LEAST_MAP = {"batch_norm_activation": 2**23}

# Up to so many rows a frozen stack's MLP is divided, and its halves are in launches with the products around it. Whole
# it has a program for 64 rows: one image's are on 16, 4 and 1 of an H200's 132 multiprocessors, and took 22 µs there in
# CUDA C++ (profiled.jsonl:6), beside 10 and 14 of those products. Predicted for each of two: 4 to 6 µs. Not measured.
FEW_ROWS = 1024
MOST_OF_FEW = 256  # columns: of more, the first half's weights leave no room in shared memory


def divides_mlp(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the MLP of `rows` rows of `width` columns is divided, in a frozen network on a GPU."""
    return rows <= FEW_ROWS and width <= MOST_OF_FEW and dtype in (torch.bfloat16, torch.float16)


# Of two that are within this factor, the one with fewer launches is taken: a kernel before PyTorch's own operators, one
# launch before a dozen. The host's time for a launch is not in the numbers, which are of CUDA-graph replays.
MARGIN = 1.1


class Operator(NamedTuple):
    """One call in inference, in bfloat16: µs of PyTorch's own operators, of CUDA C++ and of Triton."""

    operator: str
    width: int  # of a row of the residual stream
    rows: int
    eager: float
    cuda: float
    triton: float
    source: str  # the file and its lines, counted from 1, in the order of the columns


# An H200, PyTorch 2.11, Triton 3.6, commit 5c7d698, S at 256 px, batch 64: docs/kernels/measured.md, "Operators". The
# files are that run's raw lines.
# CUDA C++'s row products and MLP are new kernels since, and Triton's have other tiles. What is predicted of them
# (benchmarks/gpu_run/predictions.py) would put CUDA C++ before Triton for row products of width 144, and either before
# PyTorch for the MLP of 240; a prediction changes no order that was measured.
OPERATORS = (
    Operator("patch_attention", 144, 65536, 355.67, 95.64, 82.43, "bench_core.jsonl:37-39"),
    Operator("layer_norm_linear", 144, 65536, 125.10, 101.49, 72.74, "bench_core.jsonl:40-42"),
    Operator("layer_norm_mlp", 144, 65536, 207.15, 97.72, 126.67, "bench_core.jsonl:43-45"),
    Operator("linear_residual", 144, 65536, 49.98, 74.50, 38.26, "bench_core.jsonl:46-48"),
    Operator("patch_attention", 192, 16384, 69.18, 17.89, 11.33, "bench_core.jsonl:49-51"),
    Operator("layer_norm_linear", 192, 16384, 35.85, 54.98, 19.03, "bench_core.jsonl:52-54"),
    Operator("layer_norm_mlp", 192, 16384, 52.95, 35.57, 32.66, "bench_core.jsonl:55-57"),
    Operator("linear_residual", 192, 16384, 12.70, 33.84, 12.15, "bench_core.jsonl:58-60"),
    Operator("patch_attention", 240, 4096, 65.15, 7.60, 4.99, "bench_core.jsonl:61-63"),
    Operator("layer_norm_linear", 240, 4096, 14.07, 25.61, 11.06, "bench_core.jsonl:64-66"),
    Operator("layer_norm_mlp", 240, 4096, 25.64, 36.90, 34.99, "bench_core.jsonl:67-69"),
    Operator("linear_residual", 240, 4096, 8.46, 17.32, 8.81, "bench_core.jsonl:70-72"),
)


class Stack(NamedTuple):
    """A stack in one launch of CUDA C++, and operator by operator; µs, in bfloat16."""

    tokens: int  # of a sequence
    layers: int
    sequences: int
    one_launch: float
    operators: float  # the fastest of each
    cuda_operators: float  # those of CUDA C++, for a process without Triton
    source: str  # of one_launch; then where the other two come from


MEASURED_ON = 132  # multiprocessors of the H200: what counts is how many sequences each has to work on

# The same H200 and models (widths 144, 192 and 240), one launch as it is since its divisions are constants:
# docs/kernels/measured.md, "Stacks". A sum is that of OPERATORS (fastest, or CUDA C++) times the layers.
STACKS = (
    Stack(256, 2, 4, 129.8, 111, 111, "bench_fixed.jsonl:7; CUDA C++ in the network at batch 1, profiled.jsonl:6"),
    Stack(256, 2, 64, 131.8, 146, 185, "bench_fixed.jsonl:13; a quarter of the sums at batch 64"),
    Stack(256, 2, 256, 264.6, 582, 739, "bench_fixed.jsonl:10; sums"),
    Stack(256, 2, 1024, 1047.2, 2357, 3053, "bench_fixed.jsonl:4; bench_core.jsonl:7 (Triton), 6 (CUDA C++)"),
    Stack(64, 4, 4, 219.7, 199, 199, "bench_fixed.jsonl:8; CUDA C++ in the network at batch 1, profiled.jsonl:6"),
    Stack(64, 4, 64, 225.7, 200, 350, "bench_fixed.jsonl:14; the sums of as many rows of 240"),
    Stack(64, 4, 256, 210.4, 301, 569, "bench_fixed.jsonl:11; sums"),
    Stack(64, 4, 1024, 605.0, 1757, 1757, "bench_fixed.jsonl:5; bench_core.jsonl:10 (CUDA C++, which Triton beats)"),
    Stack(16, 3, 4, 216.9, 149, 149, "bench_fixed.jsonl:9; as rows of 192 in the network at batch 1, profiled.jsonl:6"),
    Stack(16, 3, 64, 217.7, 149, 149, "bench_fixed.jsonl:15; not more than the line above, of as few rows"),
    Stack(16, 3, 256, 157.5, 150, 262, "bench_fixed.jsonl:12; sums"),
    Stack(16, 3, 1024, 212.4, 226, 427, "bench_fixed.jsonl:6; the sums of as many rows of 192"),
)


class Exclusion(NamedTuple):
    """Calls that the automatic choice does not give to a backend although it could serve them, and why."""

    backend: str
    reason: str  # for a user: what is wrong, and what to do
    applies: Callable[[Call], bool]


# What is excluded now. To keep the automatic choice from training on Triton on Hopper, for example:
#
#     Exclusion("triton", "its launches have faulted on …; ask for it by name to use it nevertheless",
#               lambda call: call.needs_grad and on_gpu(capability=(9, 0), triton=("3.6",)))
EXCLUDED: tuple[Exclusion, ...] = ()


def on_gpu(capability: tuple[int, int] | None = None, triton: tuple[str, ...] = ()) -> bool:
    """Whether a GPU here has `capability`, and Triton a version that starts with one of `triton`; for `EXCLUDED`."""
    found = _environment()
    return (capability is None or capability in found[0]) and (not triton or found[1].startswith(triton))


@assume_constant_result
def _environment() -> tuple[tuple[tuple[int, int], ...], str]:
    from importlib import metadata

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return gpu.capabilities(), triton


def excluded(backend: str, call: Call) -> list[str]:
    """Why the automatic choice does not give `call` to `backend`; empty if it may."""
    return [each.reason for each in EXCLUDED if each.backend == backend and each.applies(call)]


def fastest_first(row: Operator) -> tuple[str, ...]:
    """The backends in the order of their times; PyTorch's own operators only before what they beat clearly."""
    times = {"triton": row.triton, "cuda": row.cuda, "reference": MARGIN * row.eager}
    return tuple(sorted(times, key=times.__getitem__))


# By operator, in the order of widths: (width, rows, order, the row).
_ORDERS: dict[str, tuple[tuple[int, int, tuple[str, ...], Operator], ...]] = {
    name: tuple(
        (row.width, row.rows, fastest_first(row), row)
        for row in sorted(OPERATORS, key=lambda row: (row.width, row.rows))
        if row.operator == name
    )
    for name in dict.fromkeys(row.operator for row in OPERATORS)
}


def order(call: Call) -> tuple[str, ...]:
    """The backends to ask for `call`, the first first; those of `PREFERENCE` where nothing was measured.

    Rows of a width that was not measured go by the next wider one that was. PyTorch's own operators come first only for
    up to as many rows as were measured: what they write between two operators grows with the rows.
    """
    default = PREFERENCE.get(call.device_type, ("reference",))
    if call.device_type == "cuda" and _is_bound_by_host(call):
        return ("reference", *default[:-1])
    if call.device_type != "cuda" or call.needs_grad or call.dtype not in (torch.bfloat16, torch.float16):
        return default
    if call.operator not in _ORDERS:
        return PREDICTED.get(call.operator, default)
    found, beyond, _ = _place(call)
    return (*found[1:], "reference") if found[0] == "reference" and beyond else found


def _is_bound_by_host(call: Call) -> bool:
    """Whether a training step is predicted to lose more of the host's time to the kernel than the GPU's it gains."""
    least = LEAST_MAP.get(call.operator)
    if least is None or not call.needs_grad or torch.compiler.is_compiling():
        return False
    return math.prod(call.shape) < least


def _place(call: Call) -> tuple[tuple[str, ...], bool, Operator]:
    """The order that was measured for the call, whether the call has more rows than that, and the numbers."""
    known, width = _ORDERS[call.operator], _width(call)
    at = next((place[0] for place in known if width <= place[0]), known[-1][0])
    candidates = [place for place in known if place[0] == at]
    rows = math.prod(call.shape[:-1]) if len(candidates) > 1 or candidates[0][2][0] == "reference" else 0
    _, most, found, row = next((place for place in candidates if rows <= place[1]), candidates[-1])
    return found, rows > most, row


def measured(call: Call) -> str:
    """For whom `order` puts PyTorch first: the numbers behind it; else ""."""
    found = order(call)
    if call.device_type != "cuda" or found[0] != "reference":
        return ""
    row = _place(call)[2]
    times = f"{row.eager:.0f} µs; triton {row.triton:.0f}, cuda {row.cuda:.0f}"
    return f"PyTorch's own operators are faster for rows of {row.width} (on an H200, up to {row.rows} rows: {times})"


def _width(call: Call) -> int:
    """Elements of a row of the residual stream; for attention, of all its heads."""
    if call.operator == "patch_attention":
        return call.fact("num_heads") * call.fact("head_dim")
    return call.shape[-1]


def _one_launch_from(tokens: int, alone: bool) -> float:
    """Sequences a multiprocessor from which one launch was measured to win, at every larger number too."""
    least = math.inf
    for row in sorted((row for row in STACKS if row.tokens == tokens), key=lambda row: -row.sequences):
        if row.one_launch > MARGIN * (row.cuda_operators if alone else row.operators):
            break
        least = row.sequences / MEASURED_ON
    return least


# (most tokens of a sequence, sequences a multiprocessor from which one launch wins), for `alone` false and true.
ONE_LAUNCH_FROM = tuple(
    tuple((tokens, _one_launch_from(tokens, alone)) for tokens in sorted({row.tokens for row in STACKS}))
    for alone in (False, True)
)


def one_launch_pays(tokens: int, sequences: int, processors: int, *, alone: bool) -> bool:
    """Whether a stack is faster in one launch than operator by operator.

    Args:
        tokens: of a sequence; those of a number that was not measured go by the next longer ones.
        sequences: of the call.
        processors: multiprocessors of the GPU.
        alone: whether only CUDA C++ is there for the single operators.
    """
    least = next((least for most, least in ONE_LAUNCH_FROM[alone] if tokens <= most), math.inf)
    return sequences >= least * processors
