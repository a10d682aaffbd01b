# SPDX-License-Identifier: Apache-2.0
"""Provoke the illegal memory access that training by Triton ended in on an H200, once, in this process.

    python fault.py train              # accelerated training of S, batch 64, bfloat16 autocast: its first steps
    python fault.py stack              # S stage 4 at batch 256, operator by operator, after stage 3
    python fault.py train --triton-s-ptxas    # assembled as on that H200

It was seen with kernels that were read from Triton's disk cache and launched in quick succession, each for the first
time, and never with a synchronisation after each launch (docs/kernels/measured.md). So nothing here waits for the
device before the end. One line of JSON says whether the process faulted; the exit code is then `FAULTED`.

faults.py has the conditions under which the script for GPUs repeats this, each the answer to a question.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.bench.suites.operands import operands, stages
from mvit_kernels.zoo import load

FAULTED, FAILED = 3, 1  # exit codes
# What CUDA and Triton call an error of a kernel that was launched before.
FAULTS = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure")
WORKLOADS = ("train", "stack")


def use_triton_s_ptxas() -> None:
    """From now on, assemble kernels with the ptxas that Triton itself uses, right or not."""
    from mvit_kernels.backends.triton import _launch

    _launch.assembler.sound = lambda architecture: contextlib.nullcontext({})


def train(given: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A training step of an accelerated network: forward under autocast, backward and AdamW."""
    model = mvit_kernels.accelerate(load(given.model).to(given.device).train(), backend=given.backend)
    images = torch.rand(given.batch or 64, 3, given.size, given.size, device=given.device)
    labels = torch.zeros(len(images), dtype=torch.long, device=given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=given.device == "cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(given.device, torch.bfloat16):
            out = model(images)
            loss = torch.nn.functional.cross_entropy(getattr(out, "logits", out).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def stack(given: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """The layers of stage 3, then those of stage 4, in bfloat16 without gradients, operator by operator."""
    variant = given.model.rpartition("/")[2].rpartition("_")[2]
    made = [
        operands("transformer", stage).to(given.device, torch.bfloat16)
        for stage in stages([variant], given.size, given.batch or 256)[:2]
    ]

    def step() -> torch.Tensor:
        with torch.no_grad(), backends.use_backend(given.backend):
            return torch.stack([by_operator(case.tensors).float().sum() for case in made])

    return step


def by_operator(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A stack's layers by the single operators, whatever the plan for a stack would be."""
    x, *weights = tensors
    for index in range((len(tensors) - 3) // 12):
        layer = mvit_kernels.TransformerLayerWeights(*weights[12 * index : 12 * index + 12])
        qkv = mvit_kernels.layer_norm_linear(x, layer.norm1_weight, layer.norm1_bias, layer.qkv_weight, layer.qkv_bias)
        mixed = mvit_kernels.patch_attention(qkv, num_heads=4, patch_size=(2, 2))
        x = mvit_kernels.linear_residual(mixed, layer.proj_weight, layer.proj_bias, x)
        mlp = (layer.norm2_weight, layer.norm2_bias, layer.fc1_weight, layer.fc1_bias, layer.fc2_weight, layer.fc2_bias)
        x = mvit_kernels.layer_norm_mlp(x, *mlp)
    return x


def is_fault(error: BaseException) -> bool:
    return any(text in str(error) for text in FAULTS)


def kernels_in(folder: str | None) -> int:
    """How many kernels a cache of Triton's holds."""
    return len(list(Path(folder).glob("*/*.cubin"))) if folder and Path(folder).is_dir() else 0


def provoke(given: argparse.Namespace) -> dict[str, Any]:
    """Run the workload, and say what came of it."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    line: dict[str, Any] = {"what": "provoked", "workload": given.workload, "faulted": False, "value": None}
    before, started = kernels_in(cache), time.monotonic()
    try:
        step = {"train": train, "stack": stack}[given.workload](given)
        values = [step() for _ in range(given.steps)]  # nothing waits in between
        if given.device == "cuda":
            torch.cuda.synchronize()
        line["value"] = [round(float(value.sum()), 4) for value in values]
    except Exception as error:
        line |= {"faulted": is_fault(error), "error": f"{type(error).__name__}: {error}"[:300]}
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        line["where"] = [f"{one.name} ({Path(one.filename).name}:{one.lineno})" for one in frames]
    return line | {"compiled": kernels_in(cache) - before, "seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fault.py", description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--triton-s-ptxas", action="store_true", help="the assembler that Triton itself would use")
    parser.add_argument("--model", default="own/s")
    parser.add_argument("--batch", type=int, help="default: 64 for train, 256 for stack")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    if given.triton_s_ptxas:
        use_triton_s_ptxas()
    line = provoke(given)
    print(json.dumps(line), flush=True)
    if line["faulted"]:
        os._exit(FAULTED)  # ordinary ways to end would ask the GPU again
    return FAILED if "error" in line else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
