# SPDX-License-Identifier: Apache-2.0
"""Two processes: gradients of accelerated models under DistributedDataParallel, against those of the plain model; and
the example of a plain loop.

``python -m support.two_ranks FOLDER IMAGES``: a process of its own, because it forks. A process in which something was
compiled has autograd's threads, and a fork of it cannot run backward. One for all, because its imports take 4 seconds.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import models
from .examples import EXAMPLES
from .processes import in_two_processes
from .training import torchrun

X, LABELS = models.images(8, 64, 64).double(), torch.arange(8) % 2
HALVES = slice(0, 4), slice(4, 8)


def gradients(model: nn.Module, half: slice) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    nn.functional.cross_entropy(models.output(model(X[half])), LABELS[half]).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def one_rank(rank: int, folder: Path, model: nn.Module) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with models.fast_calls() as calls:
        found = gradients(DistributedDataParallel(model), HALVES[rank])
    assert len(calls) == 3
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def compare(library: str, folder: Path) -> None:
    """Ranks agree bit for bit, and each gradient is the mean of what the plain model gives for the halves."""
    folder.mkdir()
    options = {"num_labels": 2} if library == "huggingface" else {"num_classes": 2}
    plain = models.build(library, **options).double()
    fast = models.accelerated(plain)
    in_two_processes("fork", one_rank, [(rank, folder, fast) for rank in range(2)])
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    halves = [{name: value.clone() for name, value in gradients(plain, half).items()} for half in HALVES]
    mean = {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()}
    models.assert_gradients_as_pytorch(first, mean, mean, unit=1e-9)
    print(library)


def plain_loop(names: dict[str, str], folder: Path, images: Path) -> None:
    """As torchrun starts it (which has a test in tests/cli/test_train.py); what it prints goes to ``printed<rank>``."""
    os.environ.update(names)
    os.chdir(folder)
    options = "--size 64 --batch 2 --epochs 2 --workers 0 --output model.pt"
    sys.argv = ["plain_loop.py", str(images), *options.split()]
    with open(f"printed{names['RANK']}", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, images = map(Path, sys.argv[1:])
    for name in ("timm", "huggingface", "own"):
        compare(name, folder / name)
    in_two_processes("fork", plain_loop, [(names, folder, images) for names in torchrun(2)])
