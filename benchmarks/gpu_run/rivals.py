# SPDX-License-Identifier: Apache-2.0
"""Other networks of timm's under torch.compile, images a second: what a user would run instead.

    python rivals.py --batch 256

bfloat16, channels-last, inference, calls behind one another between two events; a line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

RIVALS = {"resnet50": 224, "edgenext_small": 256}  # and the side of their images, px


def images_a_second(model: torch.nn.Module, images: torch.Tensor, calls: int, rounds: int = 5) -> float:
    """The median of `rounds`, each of so many calls."""
    found = []
    with torch.inference_mode():
        for _ in range(3):
            model(images)
        for _ in range(rounds):
            _wait(images)
            started = time.perf_counter()
            for _ in range(calls):
                model(images)
            _wait(images)
            found.append(calls * len(images) / (time.perf_counter() - started))
    return statistics.median(found)


def _wait(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rivals.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--models", default=",".join(RIVALS))
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args(arguments)
    try:
        import timm
    except ImportError as error:
        print(f"{error}: nothing to compare with", flush=True)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in given.models.split(","):
        side = RIVALS.get(name, 64)
        model = timm.create_model(name).eval().to(device, torch.bfloat16, memory_format=torch.channels_last)
        images = torch.rand(given.batch, 3, side, side, device=device, dtype=torch.bfloat16)
        images = images.contiguous(memory_format=torch.channels_last)
        run = model if given.no_compile else torch.compile(model)
        rate = images_a_second(run, images, given.calls)
        line = {"what": "rival", "model": name, "size": side, "batch": given.batch, "images_per_s": round(rate)}
        print(json.dumps(line | {"compiled": not given.no_compile}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
