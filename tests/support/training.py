# SPDX-License-Identifier: Apache-2.0
"""Small trainings: folders of generated photos, recipes that take a second, and processes that can be killed."""

import csv
import functools
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mvit_kernels import MultiScaleSampler
from mvit_kernels.training import loop
from mvit_kernels.training.assembly import Settings
from mvit_kernels.training.recipe import Recipe, read_recipe

QUICK = Settings(device="cpu", workers=0, tensorboard=False, progress=False)


def photo_folder(folder: Path, classes="abc", photos=4, validation=2, side=40) -> Path:
    """``folder/train/<class>`` and ``folder/val/<class>``; of ``folder/<class>`` without `validation`. A class is a
    brightness, with noise."""
    noise = np.random.default_rng(0)
    for split, count in (("train", photos), ("val", validation)) if validation else ((".", photos),):
        for index, name in enumerate(classes):
            where = folder / split / name
            where.mkdir(parents=True)
            for number in range(count):
                level = 255 * (index + 0.5) / len(classes)
                pixels = np.clip(level + noise.normal(0, 20, (side, side + number, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(where / f"{number}.png")
    return folder


def tiny_recipe(**changes) -> Recipe:
    """XXS at 32 px, two epochs of few steps, with everything random that a recipe can have."""
    usual = {"model": "own/xxs", "size": 32, "epochs": 2, "batch": 4, "warmup_steps": 2, "dropout": 0.1}
    return read_recipe("finetune", {**usual, **changes})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def losses(output: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(output / "log.csv")]


def state(path: Path, place: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)[place]


def equal_states(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Processes. A server imports everything once and forks at each start: a fresh interpreter takes seconds to import.


@functools.cache
def forkserver():
    """The context of processes that are forked from a server, in which nothing was compiled."""
    context = multiprocessing.get_context("forkserver")
    # Of installed packages alone: before Python 3.13 the server ignores sys.path, and what it does not find.
    ours = ["mvit_kernels.training.loop", "mvit_kernels.training.tasks.classification", "mvit_kernels.zoo"]
    context.set_forkserver_preload([*ours, "timm.optim", "torchmetrics", "torchvision.transforms.v2"])
    return context


def torchrun(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each of `ranks` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in one.items()} for one in each]


def start(folder: Path, recipe: Recipe | None, output: Path, ranks: int = 1, **options) -> list:
    """Begin a training in processes of its own, one a rank; each leaves its weights in ``rank<r>.pth`` at the end."""
    jobs = []
    for names in torchrun(ranks):
        job = forkserver().Process(target=_train, args=(names, folder, recipe, output, options))
        job.start()
        jobs.append(job)
    return jobs


def _train(names, folder, recipe, output, options) -> None:
    os.environ.update(names)
    # Otherwise its loaders would start a fork server each, which imports everything anew, and whose processes outlive a
    # training that is killed: they watch the server in place of the training.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    close = loop._Run.close

    def dump_and_close(run):
        torch.save(run.parts.model.state_dict(), output / f"rank{run.group.rank}.pth")
        close(run)

    loop._Run.close = dump_and_close
    loop.train(folder, recipe, output, **options)


def finish(jobs: list, seconds: float = 120) -> None:
    """Wait for a training that must succeed."""
    for job in jobs:
        job.join(seconds)
        assert job.exitcode == 0


def kill_after(jobs: list, output: Path, steps: int, delay: float, seconds: float = 120) -> None:
    """SIGKILL, `delay` seconds after ``log.csv`` has `steps` rows."""
    deadline = time.monotonic() + seconds
    log = output / "log.csv"
    while not log.exists() or log.read_bytes().count(b"\n") <= steps:
        assert time.monotonic() < deadline and all(job.is_alive() for job in jobs), "the training ended before"
        time.sleep(0.002)
    time.sleep(delay)
    for job in jobs:
        job.kill()
    for job in jobs:
        job.join()


class Maps(Dataset):
    """Small maps that tell their index."""

    def __len__(self):
        return 203

    def __getitem__(self, pair):
        index, (height, width) = pair
        return torch.full((1, height // 32, width // 32), float(index)), index


def sample_two_epochs(rank: int, folder: Path) -> None:
    """What one of two ranks gets from the sampler in two epochs of steps, as JSON in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = torch.nn.Conv2d(1, 1, 1)
    sampler = MultiScaleSampler(Maps(), 8)  # rank and world_size from torch.distributed
    assert (sampler.rank, sampler.world_size) == (rank, 2)
    # By default its processes would start as this one did, and import torch as well.
    loader = DataLoader(Maps(), batch_sampler=sampler, num_workers=1, multiprocessing_context="fork")
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        steps = []
        for maps, index in loader:
            net(maps).mean().backward()
            # DistributedDataParallel without its import of torch._dynamo: it hangs if the other rank has fewer steps.
            torch.distributed.all_reduce(net.weight.grad)
            steps.append([list(maps.shape), index.tolist()])
        assert len(steps) == len(loader)
        epochs.append(steps)
    (folder / f"{rank}.json").write_text(json.dumps(epochs))
    torch.distributed.destroy_process_group()
