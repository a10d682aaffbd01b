# SPDX-License-Identifier: Apache-2.0
"""Randomness without a state: whatever is random in a step is a function of the seed and of where the training is.

A generator's state after a million draws would have to be saved, on every process and in every worker, and those of
workers that run ahead cannot be known. Instead all generators are seeded anew before each step and each sample, from a
hash of the place: so a training that was killed at any moment goes on with the same draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["SeededSamples", "hash_of", "held_back", "seed_sample", "seed_step"]


def hash_of(*parts: int | str) -> int:
    """63 bits that depend on every part, and are the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and PyTorch (its GPUs too) for step `step` of the whole training on process `rank`."""
    value = hash_of("step", seed, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed Python, NumPy and PyTorch's CPU generator for the augmentation of one sample."""
    value = hash_of("sample", seed, epoch, index)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would touch CUDA, in a forked worker


class SeededSamples(Dataset):
    """A dataset that is asked for ``(epoch, (index, (height, width)))``, and seeds each sample by epoch and index.

    The epoch comes with the index, since workers that live on from epoch to epoch would not learn of it otherwise.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, tuple[int, tuple[int, int]]]) -> Any:
        epoch, (index, size) = key
        seed_sample(self.seed, epoch, index)
        return self.dataset[index, size]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type] # Task.open gives data sets that have one


def held_back(names: Sequence[str], share: float) -> frozenset[int]:
    """Indices of the samples kept for validation: `share` of them, at least one and not all, chosen by their names.

    Example:
        >>> len(held_back([f"photo{i}.jpg" for i in range(24)], 0.25))
        6

    The same names give the same choice on every machine, and photos that are added later move few others.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share held back for validation is {share}; a number from 0 to 1 is wanted")
    if share in (0, 1):
        return frozenset(range(len(names)) if share else ())
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return frozenset(sorted(range(len(names)), key=lambda i: (hash_of("held back", names[i]), names[i]))[:count])
