# SPDX-License-Identifier: Apache-2.0
"""From the start of a process to its first logits: a file of a frozen network with NumPy alone, and with PyTorch.

    python benchmarks/startup.py [--model s] [--dtype float32] [--runs 9]

Each run is a new process; both kinds take turns. Printed are medians in milliseconds: of importing NumPy or torch, of
opening the file (which imports the reader), of the first call, and of the second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mvit_kernels

SCRIPT = """
import json, sys, time
times = [time.perf_counter()]
{imports}
times.append(time.perf_counter())
{opens}
times.append(time.perf_counter())
for _ in range(2):
    {calls}
    times.append(time.perf_counter())
print(json.dumps([1e3 * (b - a) for a, b in zip(times, times[1:])]))
"""
KINDS = {
    "NumPy alone": dict(
        imports="import numpy",
        opens="from mvit_kernels import runtime; network = runtime.Network(sys.argv[1])",
        calls="network(numpy.zeros((1, 3, 256, 256), numpy.float32))",
    ),
    "PyTorch": dict(
        imports="import torch; torch.inference_mode().__enter__()",
        opens="import mvit_kernels; network = mvit_kernels.load(sys.argv[1])",
        calls="network(torch.zeros(1, 3, 256, 256))",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("xxs", "xs", "s"), default="s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    model = mvit_kernels.MobileViT(arguments.model, num_classes=1000).eval()
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.mvit")
        mvit_kernels.freeze(model, dtype=getattr(torch, arguments.dtype)).save(path)
        print(f"MobileViT-{arguments.model.upper()} in {arguments.dtype}, {path.stat().st_size / 1e6:.1f} MB")
        for _ in range(arguments.runs):
            for kind, parts in KINDS.items():
                command = [sys.executable, "-c", SCRIPT.format(**parts), str(path)]
                found[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{'ms':14}{'import':>10}{'open':>10}{'first':>10}{'second':>10}{'to first':>10}")
    for kind, runs in found.items():
        parts = [statistics.median(column) for column in zip(*runs, strict=True)]
        to_first = statistics.median(sum(run[:3]) for run in runs)
        print(f"{kind:14}" + "".join(f"{part:10.1f}" for part in (*parts, to_first)))


if __name__ == "__main__":
    main()
