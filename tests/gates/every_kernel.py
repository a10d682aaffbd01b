# SPDX-License-Identifier: Apache-2.0
"""Every kernel once on tiny shapes, forward and backward.

    python -m gates.every_kernel                                     # each result held to the tolerance rule
    python -m gates.every_kernel --run triton --only linear_residual # run alone, for a sanitizer to watch

`benchmarks/gpu.sh` runs both, and under_compute_sanitizer.py the second. Where there is a GPU its backends run, else
the CPU's. A line tells how each call went; the exit code is 1 if one was wrong, or if every one was refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from mvit_kernels import backends
from support.cases import DIFFERENTIABLE, Sizes, call, convert, device_of, evaluate, make, takes
from support.checks import check

LIVE = dict(projection=0.2, mlp=0.2, path1=0.2, path2=0.2)
STAGES = ((3, 4, 80), (1, 6, 240), (1, 8, 144))  # batch, side of the map, width: as in MobileViT
SIZES = {  # the network's widths; then rows that fill no tile, widths that are no power of two, every kernel of each
    "layer_norm": [
        *(dict(shape=(b, side, side, d)) for b, side, d in STAGES),
        dict(shape=(70, 24)),
        dict(shape=(3, 300)),
    ],
    "batch_norm_activation": [
        *(dict(shape=(b, d, side, side)) for b, side, d in STAGES),
        dict(shape=(70, 24, 1, 1), activation=None),
        dict(shape=(3, 300, 3, 5)),
    ],
    "layer_norm_linear": [
        *(dict(shape=(b, side, side, d), n=3 * d) for b, side, d in STAGES),
        dict(shape=(70, 24), n=40, activation="silu"),
        dict(shape=(3, 300), n=17, bias=False),
    ],
    "patch_attention": [
        *(dict(shape=(b, side, side), heads=4, head_dim=d // 4, patch=(2, 2)) for b, side, d in STAGES),
        dict(shape=(2, 6, 8), heads=3, head_dim=12, patch=(2, 2)),  # short sequences
        dict(shape=(1, 16, 16), heads=2, head_dim=36, patch=(2, 2)),  # backward whole
        dict(shape=(1, 10, 26), heads=1, head_dim=20, patch=(2, 2)),  # backward by blocks
        dict(shape=(1, 16, 16), heads=1, head_dim=17, patch=(1, 1)),
    ],
    "linear_residual": [
        *(dict(shape=(b, side, side, d), n=d) for b, side, d in STAGES),
        dict(shape=(70, 24), n=40),
        dict(shape=(5, 33), n=100, bias=False),
    ],
    "layer_norm_mlp": [
        *(dict(shape=(b, side, side, d), hidden=2 * d) for b, side, d in STAGES),
        dict(shape=(70, 24), hidden=40),
        dict(shape=(5, 33), hidden=50),
    ],
    "transformer_layer": [
        *(dict(shape=(b, side, side, d), heads=4, patch=(2, 2)) for b, side, d in STAGES),
        dict(shape=(2, 6, 8, 24), heads=2, patch=(2, 2), dropout=LIVE),
        dict(shape=(1, 5, 6, 33), heads=3, head_dim=20, hidden=17, patch=(1, 2), qkv_bias=False),
    ],
    "inverted_residual": [
        dict(shape=(3, 8, 8, 48), hidden=96, out=64, stride=2),  # as it opens stage 4 of xxs, stages 5 and 3 of s
        dict(shape=(1, 12, 12, 128), hidden=512, out=160, stride=2),
        dict(shape=(1, 16, 16, 64), hidden=256, out=96, stride=2),
        dict(shape=(2, 7, 9, 24), hidden=40, out=24, residual=True),
        dict(shape=(1, 8, 6, 17), hidden=33, out=20, stride=2),
    ],
    "transformer": [
        *(dict(shape=(b, side, side, d), heads=4, patch=(2, 2), layers=1 + (d == 80)) for b, side, d in STAGES),
        dict(shape=(2, 6, 8, 24), heads=2, patch=(2, 2)),
        dict(shape=(1, 16, 16, 64), heads=4, patch=(2, 2), qkv_bias=False, final_norm=False),
    ],
}


def calls(backend: str, only: str | None = None) -> Iterator[tuple[str, Sizes, str]]:
    """Operator, sizes and dtype of every call: the first of each operator before the second of any."""
    operators = [name for name in backends.operators(backend) if only in (None, name)]
    for index in range(max(map(len, SIZES.values()))):
        for dtype in ("bfloat16", "float32", "float16"):
            for operator in operators:
                if index < len(SIZES[operator]) and takes(backend, dtype):
                    yield operator, SIZES[operator][index], dtype


def outcome(backend: str, operator: str, sizes: Sizes, dtype: str, judge: bool) -> str:
    """How the call went: "ran" or "ok", "refused: …" or "WRONG: …"."""
    tensors, settings = make(operator, sizes)
    inputs = convert(tensors, getattr(torch, dtype), device=device_of(backend))
    try:
        evaluate(lambda t: call(operator, t, settings, backend), inputs, operator in DIFFERENTIABLE)
        if device_of(backend) == "cuda":
            torch.cuda.synchronize()
        if judge:
            check(operator, sizes, dtype=dtype, path=backend, gradients=operator in DIFFERENTIABLE)
    except backends.BackendError as refusal:
        return f"refused: {refusal}"
    except AssertionError as wrong:
        return f"WRONG: {wrong}"
    return "ok" if judge else "ran"


def main(arguments: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    possible = [b for b in backends.PREFERENCE[device] if b != "reference" and not backends.unavailable(b, device)]
    parser = argparse.ArgumentParser(prog="gates.every_kernel", description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="*", default=possible, metavar="BACKEND", help=f"else {' '.join(possible)}")
    parser.add_argument("--only", choices=SIZES, metavar="OPERATOR", help="this operator alone")
    parser.add_argument("--run", action="store_true", help="run the kernels, and compare nothing")
    given = parser.parse_args(arguments)
    outcomes = []
    for backend in given.backends:
        for operator, sizes, dtype in calls(backend, given.only):
            outcomes.append(outcome(backend, operator, sizes, dtype, judge=not given.run))
            size = " ".join(f"{name}={value}" for name, value in sizes.items())
            print(f"{backend} {operator} {size} {dtype}: {outcomes[-1]}", flush=True)
    made = sum(not one.startswith("refused") for one in outcomes)
    print(f"{made} calls", flush=True)
    return 0 if made and not any(one.startswith("WRONG") for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
