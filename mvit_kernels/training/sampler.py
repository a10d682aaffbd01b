# SPDX-License-Identifier: Apache-2.0
"""The multi-scale batch sampler of MobileViT (Mehta & Rastegari, ICLR 2022, section 3.3 and algorithm 1)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from .._utils.text import some
from ..nn.layers import make_divisible

__all__ = ["MultiScaleSampler", "SizedBatch", "resolutions"]

Pair = tuple[int, int]


class SizedBatch(NamedTuple):
    """One resolution, and the images in a batch of it."""

    height: int
    width: int
    batch: int


def resolutions(
    batch_size: int = 128,
    size: int | Pair = 256,
    smallest: int | Pair = 160,
    largest: int | Pair = 320,
    count: int = 5,
    divisor: int = 32,
) -> tuple[SizedBatch, ...]:
    """The resolutions that a step can have, from the smallest to the largest, with the batch that each allows.

    Example:
        >>> [(height, batch) for height, width, batch in resolutions(128)]
        [(160, 327), (192, 227), (256, 128), (288, 101), (320, 81)]

    For each axis: `count` values in equal steps from `smallest` to `largest`, and `size`, each made divisible by
    `divisor`, in order. The k-th height goes with the k-th width. The batch keeps the pixels of a batch about the same:
    ``max(1, int(round(size[0] * size[1] * batch_size / (height * width), 2)))``, a floor in effect.

    This is cvnets' rule to the letter, in rectangles too: if `size` is one of the equal steps on one axis and not on
    the other, that axis has a value less, and the largest value of the other goes with none.

    Args: as those of `MultiScaleSampler`. An int stands for both axes, a pair is (height, width).
    """
    (base_height, base_width), axes = _pair(size), []
    for base, low, high in zip((base_height, base_width), _pair(smallest), _pair(largest), strict=True):
        values = {*np.linspace(low, high, count).tolist(), float(base)}
        axes.append(sorted(make_divisible(value, divisor) for value in values))
    pixels = base_height * base_width * batch_size
    found = {SizedBatch(h, w, max(1, int(round(pixels / (h * w), 2)))) for h, w in zip(*axes, strict=False)}
    return tuple(sorted(found))


class MultiScaleSampler(Sampler[list[tuple[int, Pair]]]):
    """A batch sampler that draws one resolution per batch, the same on all ranks, with a batch that fits it.

    Example:
        >>> sampler = MultiScaleSampler(folder, 128)                     # 160 to 320 px; 128 images a batch at 256 px
        >>> loader = DataLoader(SizedDataset(folder, transforms), batch_sampler=sampler, num_workers=8)
        >>> for epoch in range(300):
        ...     sampler.set_epoch(epoch)
        ...     for images, targets in loader:                           # (327, 3, 160, 160), (101, 3, 288, 288), …
        ...         step(images, targets)
        >>> sampler.set_epoch(7, start=120)                              # resume behind the 120th batch of epoch 7

    It yields lists of ``(index, (height, width))``; `mvit_kernels.training.sized` has datasets that take such pairs.
    Everything is drawn from `seed` and the epoch alone, before the epoch begins: no other generator is read or moved,
    each rank knows the same plan, and so every rank takes the same number of steps.

    An epoch, as in cvnets: the indices are padded from their front to a multiple of `world_size`, shuffled, and dealt
    out as ``[rank::world_size]``. Then batches are cut off a rank's share, each of a resolution drawn from
    `resolutions`; the last one is filled up from the front of the share (by at most the whole share, so that a share
    smaller than half a batch gives a batch of twice the share).

    Three modes:

    - multi-scale training, the default;
    - `multi_scale=False`: training at `size`, exactly as given, and `batch_size`, with the same shuffling, shares and
      padding;
    - `training=False`, evaluation: at `size`, in order, and **each sample exactly once over all ranks**. cvnets pads in
      evaluation too, which counts some samples twice. Without padding, ranks may differ by a batch, so evaluate without
      communication inside the loop (``ddp_model.module``, not ``ddp_model``), and gather afterwards.

    Resuming is exact, and says nothing about what workers have fetched ahead: the caller says how many batches of the
    epoch were consumed, in `set_epoch` or `state_dict`. ``len(sampler)`` is what iterating yields now: the epoch's
    `steps`, less `start`.

    Args:
        data: the data set, or its length.
        batch_size: images a batch on each rank, at `size`.
        size: base resolution. This and the next two are a side, or (height, width).
        smallest, largest: bounds of the other resolutions.
        count: how many resolutions from `smallest` to `largest`; `size` is one more.
        divisor: resolutions are made divisible by it, by the rule of the networks' channels (`make_divisible`).
        multi_scale: draw resolutions; False: `size` alone.
        training: False: evaluation, which implies `multi_scale=False` and no shuffling.
        shuffle: whether an epoch's order is random; by default in training alone.
        seed: of the order and the resolutions; the same on all ranks.
        rank, world_size: by default those of `torch.distributed`, if it is initialised, else 0 and 1.
        scale_inc: let the resolutions grow in training: at the beginning of each epoch in `scale_epochs`, `smallest`
            grows by `smallest_inc` times itself and `largest` by `largest_inc` times itself, both rounded down; `size`
            stays. Off by default, as in cvnets, whose other defaults are here, too: both double at epoch 40.
        scale_epochs: an epoch or several.
        smallest_inc, largest_inc: 0 or more.

    Attributes:
        epoch: as set.
        start: as set.
        sizes: the resolutions of this epoch, a tuple of `SizedBatch`.
        steps: number of batches in the whole epoch.

    In others' loops: Lightning and Hugging Face's Accelerate call `set_epoch` by themselves. The shares are dealt out
    here, so they must not be dealt out again: ``Trainer(use_distributed_sampler=False)`` in Lightning; no
    ``accelerator.prepare`` of this loader under more than one process.

    Raises:
        ValueError: an argument out of range, and no image at all.
        TypeError: an argument of another type.
        RuntimeError: torchrun started several processes, but `torch.distributed` is not initialised: each would go
            through all images.
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int = 128,
        *,
        size: int | Pair = 256,
        smallest: int | Pair = 160,
        largest: int | Pair = 320,
        count: int = 5,
        divisor: int = 32,
        multi_scale: bool = True,
        training: bool = True,
        shuffle: bool | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        scale_inc: bool = False,
        scale_epochs: int | Sequence[int] = 40,
        smallest_inc: float = 1.0,
        largest_inc: float = 1.0,
    ) -> None:
        if isinstance(data, bool) or not isinstance(data, int | Sized):
            raise TypeError(
                f"MultiScaleSampler: data is {_said(data)}; give a data set with a length, or the number of samples"
            )
        self.samples = _count("data (the number of samples)", data if isinstance(data, int) else len(data))
        self.batch_size = _count("batch_size", batch_size)
        self.size = _sides("size", size)
        self.smallest, self.largest = _sides("smallest", smallest), _sides("largest", largest)
        if any(low > high for low, high in zip(self.smallest, self.largest, strict=True)):
            raise ValueError(
                f"MultiScaleSampler: smallest={smallest} is above largest={largest}; give smallest <= largest"
            )
        self.count, self.divisor = _count("count", count), _count("divisor", divisor)
        self.training = bool(training)
        self.multi_scale = bool(multi_scale) and self.training
        self.shuffle = self.training if shuffle is None else bool(shuffle)
        self.seed = _count("seed", seed, least=0)
        self.rank, self.world_size = _place(rank, world_size)
        self.scale_inc = bool(scale_inc)
        epochs = [scale_epochs] if isinstance(scale_epochs, int) else scale_epochs
        self.scale_epochs = tuple(sorted({_count("scale_epochs", epoch, least=0) for epoch in epochs}))
        self.smallest_inc = _factor("smallest_inc", smallest_inc)
        self.largest_inc = _factor("largest_inc", largest_inc)
        self.drop_last = False  # Accelerate and Lightning ask a batch sampler
        self.set_epoch(0)

    # ------------------------------------------------------------------------------------------------ an epoch's plan

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to `epoch`, behind its first `start` batches: those that were consumed when training is resumed.

        An iteration that has begun goes on as it was.

        Raises:
            ValueError: a negative epoch, or more batches than the epoch has.
        """
        epoch, start = _count("epoch", epoch, least=0), _count("start", start, least=0)
        sizes = self._sizes(epoch)
        plan = self._plan(epoch, sizes)
        if start > len(plan):
            raise ValueError(
                f"MultiScaleSampler: start={start} is beyond epoch {epoch}, which has {len(plan)} batches; give the "
                "number of batches of this epoch that were consumed"
            )
        self.epoch, self.start, self.sizes, self._steps = epoch, start, sizes, plan

    @property
    def steps(self) -> int:
        return len(self._steps)

    @property
    def sampler(self) -> MultiScaleSampler:
        """Itself, since Lightning and Accelerate call `set_epoch` of a batch sampler's `sampler`."""
        return self

    def __len__(self) -> int:
        return len(self._steps) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, Pair]]]:
        # Not a generator itself, whose first line would run at the first `next`, perhaps after another `set_epoch`.
        return self._batches(self._share(), self._steps, self.start)

    def _batches(self, share: torch.Tensor, steps: list[SizedBatch], start: int) -> Iterator[list[tuple[int, Pair]]]:
        first = sum(step.batch for step in steps[:start])
        for height, width, batch in steps[start:]:
            indices = share[first : first + batch]
            if self.training and len(indices) < batch:
                indices = torch.cat([indices, share[: batch - len(indices)]])
            first += batch
            yield [(index, (height, width)) for index in indices.tolist()]

    def _sizes(self, epoch: int) -> tuple[SizedBatch, ...]:
        if not self.multi_scale:
            return (SizedBatch(*self.size, self.batch_size),)
        smallest, largest = self.smallest, self.largest
        for _ in [when for when in self.scale_epochs if self.scale_inc and when <= epoch]:
            smallest = _grown(smallest, self.smallest_inc)
            largest = _grown(largest, self.largest_inc)
        return resolutions(self.batch_size, self.size, smallest, largest, self.count, self.divisor)

    def _plan(self, epoch: int, sizes: tuple[SizedBatch, ...]) -> list[SizedBatch]:
        """The resolution of every step of the epoch on this rank, which in training is that of all ranks."""
        share = self._share_length()
        most = -(-share // min(size.batch for size in sizes))  # steps, if all were of the smallest batch
        drawn = torch.randint(len(sizes), (most,), generator=self._generator(epoch, 0), device="cpu").tolist()
        plan, covered = [], 0
        for choice in drawn:
            if covered >= share:
                break
            plan.append(sizes[choice])
            covered += sizes[choice].batch
        return plan

    def _share_length(self) -> int:
        if self.training:
            return -(-self.samples // self.world_size)
        return len(range(self.rank, self.samples, self.world_size))

    def _share(self) -> torch.Tensor:
        """The indices of this rank's samples in the epoch's order."""
        indices = torch.arange(self.samples, device="cpu")
        if self.training:
            total = self._share_length() * self.world_size
            indices = indices.repeat(-(-total // self.samples))[:total]
        if self.shuffle:
            indices = indices[torch.randperm(len(indices), generator=self._generator(self.epoch, 1), device="cpu")]
        return indices[self.rank :: self.world_size]

    def _generator(self, epoch: int, purpose: int) -> torch.Generator:
        """Independent of any other; one for the resolutions (0) and one for the order (1) of each epoch."""
        mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(2)[purpose]
        return torch.Generator().manual_seed(int(mixed))

    # --------------------------------------------------------------------------------------------------------- resuming

    def state_dict(self, done: int) -> dict[str, Any]:
        """What `load_state_dict` needs to go on behind the first `done` batches of this epoch; the same on all ranks.

        Example:
            >>> for done, batch in enumerate(loader, start=sampler.start + 1):
            ...     step(batch)
            ...     torch.save({"sampler": sampler.state_dict(done), …}, path)

        Args:
            done: batches consumed since the epoch's beginning. Only the caller knows: workers fetch ahead.

        Raises:
            ValueError: more batches than the epoch has.
        """
        if _count("done", done, least=0) > self.steps:
            raise ValueError(
                f"MultiScaleSampler.state_dict: done={done}, but epoch {self.epoch} has {self.steps} batches; count "
                "from the epoch's beginning"
            )
        return {"epoch": self.epoch, "start": done, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of a sampler with other settings or another number of ranks: nothing exact could follow.
        """
        if not isinstance(state, Mapping) or not {"epoch", "start", "settings"} <= state.keys():
            raise ValueError(
                "MultiScaleSampler.load_state_dict: this is no state of a MultiScaleSampler's state_dict()"
            )
        own, theirs = self._settings(), dict(state["settings"])
        odd = [name for name in own if own[name] != theirs.get(name)]
        if odd:
            differences = some(f"{name} was {theirs.get(name)!r} and is {own[name]!r}" for name in odd)
            raise ValueError(
                f"MultiScaleSampler.load_state_dict: the state does not fit: {differences}; to resume exactly, build "
                "the sampler as it was, or begin an epoch anew with set_epoch"
            )
        self.set_epoch(state["epoch"], state["start"])

    def _settings(self) -> dict[str, Any]:
        """All that the batches of an epoch depend on, except for the rank."""
        names = "samples batch_size size smallest largest count divisor multi_scale training shuffle seed world_size"
        names += " scale_inc scale_epochs smallest_inc largest_inc"
        values = {name: getattr(self, name) for name in names.split()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{height}×{width}: {batch}" for height, width, batch in self.sizes)
        mode = "multi-scale" if self.multi_scale else "training" if self.training else "evaluation"
        return (
            f"MultiScaleSampler({self.samples} samples, {mode}, {sizes}; epoch {self.epoch}, {self.start} of "
            f"{self.steps} batches done, rank {self.rank} of {self.world_size}, seed {self.seed})"
        )


# ---------------------------------------------------------------------------------------------------------- arguments


def _grown(size: Pair, share: float) -> Pair:
    return size[0] + int(size[0] * share), size[1] + int(size[1] * share)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _said(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _count(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"MultiScaleSampler: {name} is {_said(value)}; give an int")
    if value < least:
        raise ValueError(f"MultiScaleSampler: {name} is {value}; give {least} or more")
    return int(value)


def _sides(name: str, value: object) -> Pair:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise TypeError(f"MultiScaleSampler: {name} is {_said(value)}; give a side in pixels, or (height, width)")
    return (_count(name, sides[0]), _count(name, sides[1]))


def _factor(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"MultiScaleSampler: {name} is {_said(value)}; give a number")
    if not 0 <= value < float("inf"):
        raise ValueError(f"MultiScaleSampler: {name} is {value}; give 0 or more: 1.0 doubles a size, 0.0 leaves it")
    return float(value)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if (rank is None) != (world_size is None):
        given, missing = ("rank", "world_size") if world_size is None else ("world_size", "rank")
        raise ValueError(f"MultiScaleSampler: {given} is given without {missing}; give both or neither")
    if rank is not None:
        rank, world_size = _count("rank", rank, least=0), _count("world_size", world_size)
        if rank >= world_size:
            raise ValueError(
                f"MultiScaleSampler: rank is {rank} of world_size {world_size}; ranks are 0 to world_size - 1"
            )
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise RuntimeError(
            f"MultiScaleSampler: torchrun started {os.environ['WORLD_SIZE']} processes, and torch.distributed is not "
            "initialised, so each would go through all images; call torch.distributed.init_process_group() before, or "
            "give rank and world_size"
        )
    return 0, 1
