# SPDX-License-Identifier: Apache-2.0
"""Whether the loader keeps up with training: images a second of the loader alone, beside those that a step consumes.

    python benchmarks/loader.py DIR [--model own/xxs] [--batch 8,32] [--workers 0,1,2] [--seconds 5]

DIR is an image folder, one subfolder a class. First the milliseconds of one image on one thread, as in a worker:
reading and decoding, the transforms at 256 px, and the image's share of collating a batch. Then images a second of
whole loaders (sampler, data set, transforms, collation, processes) at 256 px, at the resolutions of the multi-scale
sampler, and at those with timm's way of leaving bytes for the device to normalise, for each number of workers; and of a
whole training step of the paper's recipe (`mvit_kernels.bench.recipe`) of the accelerated model, without a loader.
Loaders and steps take turns, so that a slow minute of the machine slows all of them.

The last column is the loader's rate divided by that of the fastest step: above 1 the loader is not the bottleneck, once
workers have cores of their own. Without workers loading and training take turns, and the loader's part of the time is
1 / (1 + that). `cpu` is the processor's time of one image in milliseconds, in all processes: what another process on
the machine does not change much.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, default_collate

import mvit_kernels
from mvit_kernels.bench.recipe import recipe_step
from mvit_kernels.bench.timing import interleave
from mvit_kernels.training.sampler import MultiScaleSampler
from mvit_kernels.training.sized import DraftLoader, SizedDataset, timm_transforms
from mvit_kernels.zoo import load

SIZE = 256
PAPER = dict(is_training=True, color_jitter=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Rate(NamedTuple):
    """Images a second by the wall clock; milliseconds of processor time an image, in this process and its workers."""

    images_per_s: float
    cpu_ms: float


def photos(folder: Path, **options: object) -> SizedDataset:
    """The folder with the paper's augmentation: random resized crops and horizontal flips."""
    mvit_kernels.prepare_torchvision()
    from torchvision.datasets import ImageFolder

    return SizedDataset(ImageFolder(folder, loader=DraftLoader(320)), timm_transforms(**PAPER, **options))


def parts(data: SizedDataset, batch: int = 8) -> dict[str, float]:
    """Milliseconds of one image at 256 px: decoding, transforms, and its share of collating a batch."""
    indices = itertools.cycle(range(len(data)))
    opened = [data.data[index][0] for index in range(min(batch, len(data)))]
    transform = data.transforms((SIZE, SIZE))
    ready = [(transform(image), 0) for image in opened]
    images = itertools.cycle(opened)
    calls: dict[str, Callable[[], object]] = {
        "read and decode": lambda: data.data[next(indices)],
        "transforms": lambda: transform(next(images)),
        "collate": lambda: default_collate(ready),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(calls, seconds=1.0, warmup_seconds=0.05)
    torch.set_num_threads(threads)
    return {name: timing.median / (len(ready) if name == "collate" else 1) for name, timing in times.items()}


def loaded(data: SizedDataset, sampler: MultiScaleSampler, workers: int, seconds: float) -> Rate:
    """The rate of a whole loader over `seconds`, epoch after epoch, from its first batch on."""

    def epochs(loader: DataLoader) -> Iterator[int]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for images, _ in loader:
                yield len(images)

    from timm.data.loader import fast_collate

    collate = fast_collate if "use_prefetcher" in dict(data.transforms.options) else default_collate
    loader = DataLoader(
        data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate
    )
    batches = epochs(loader)
    ahead = sum(next(batches) for _ in range(1 + 2 * workers))  # workers have started, and fetched ahead
    cpu, start, count = _cpu(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += next(batches)
    took = time.perf_counter() - start
    batches.close()
    del batches, loader  # ends the workers, whose processor time counts from then on
    # Theirs is known as a whole: it has the start and what was fetched ahead, which counts as images, too.
    return Rate(count / took, 1e3 * (_cpu() - cpu) / (count + (ahead if workers else 0)))


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def steps(model: str, batches: list[int], seconds: float) -> dict[int, Rate]:
    """The rate of recipe steps of the accelerated model, by batch."""
    found = {}
    for batch in batches:
        images = torch.rand(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
        net = mvit_kernels.accelerate(load(model)).to(memory_format=torch.channels_last)
        step = recipe_step(net, images)
        step()
        cpu, start, count = _cpu(), time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            count += batch
        found[batch] = Rate(count / (time.perf_counter() - start), 1e3 * (_cpu() - cpu) / count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="an image folder, one subfolder a class")
    parser.add_argument("--model", default="own/xxs", help="the model of the steps (default: own/xxs)")
    parser.add_argument("--batch", type=_counts, default=[8, 32], help="batches at 256 px (default: 8,32)")
    parser.add_argument("--workers", type=_counts, default=[0, 1, 2], help="numbers of workers (default: 0,1,2)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each line in each round (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turns; the median counts (default: 3)")
    args = parser.parse_args()

    data = photos(args.folder)
    side = data.data[0][0].size
    print(f"{len(data)} photos, the first {side[0]} × {side[1]}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, milliseconds in parts(data).items():
        print(f"  {name:<20} {milliseconds:7.2f} ms an image")

    bytes_ = photos(args.folder, use_prefetcher=True)
    modes = {"256 px": data, "multi-scale": data, "multi-scale, bytes": bytes_}
    settings = list(itertools.product(modes, args.batch, args.workers))
    rates: dict[tuple, list[Rate]] = {setting: [] for setting in settings}
    trained: dict[int, list[Rate]] = {batch: [] for batch in args.batch}
    for _ in range(args.rounds):
        for batch, rate in steps(args.model, args.batch, args.seconds).items():
            trained[batch].append(rate)
        for mode, batch, workers in settings:
            sampler = MultiScaleSampler(data, batch, size=SIZE, multi_scale=mode != "256 px")
            rates[mode, batch, workers].append(loaded(modes[mode], sampler, workers, args.seconds))

    print(f"\n{'':<28}{'batch':>6}{'workers':>9}{'images/s':>10}{'cpu ms':>8}{'loader / step':>15}")
    for batch, found in trained.items():
        rate = _median(found)
        print(f"{'step of ' + args.model:<28}{batch:>6}{'':>9}{rate.images_per_s:>10.1f}{rate.cpu_ms:>8.2f}")
    fastest = max(_median(found).images_per_s for found in trained.values())
    for (mode, batch, workers), found in rates.items():
        rate = _median(found)
        line = f"{'loader, ' + mode:<28}{batch:>6}{workers:>9}{rate.images_per_s:>10.1f}{rate.cpu_ms:>8.2f}"
        print(f"{line}{rate.images_per_s / fastest:>15.2f}")


def _median(rates: list[Rate]) -> Rate:
    return Rate(*(sorted(values)[len(values) // 2] for values in zip(*rates, strict=True)))


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
