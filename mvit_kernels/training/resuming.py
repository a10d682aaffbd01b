# SPDX-License-Identifier: Apache-2.0
"""Whether a training can be continued exactly with the recipe, samples and processes at hand, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .recipe import Recipe, as_dict, from_dict
from .saving import LAST

__all__ = ["check_identity", "differences", "recipe_of"]


def recipe_of(state: Mapping[str, Any] | None, recipe: Recipe | None) -> Recipe:
    """The recipe of a new training, or that of a resumed one, which must not be another than is asked for."""
    if state is None:
        if recipe is None:
            raise ValueError("train: recipe is None; give one, as by read_recipe, or resume=True")
        return recipe
    saved = from_dict(state["recipe"], LAST)
    changed = differences(as_dict(saved), as_dict(recipe)) if recipe is not None else ()
    if changed:
        raise ValueError(
            f"--resume continues a training exactly, and its recipe differs: {'; '.join(changed)}; leave out "
            "--recipe and --set, or start another training from its weights with --checkpoint and another --output"
        )
    return saved


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to resume on other samples, or by other means, than the training had."""
    told = {
        "classes": "the classes {} to {}",
        "samples": "the number of training samples from {} to {}",
        "names": "the files of the training samples",
        "world_size": "the number of processes from {} to {}: give torchrun the first",
        "accelerate": "accelerated blocks from {} to {}: give or leave out --no-accelerate",
    }
    changed = [
        text.format(state.get(key), identity[key]) for key, text in told.items() if state.get(key) != identity[key]
    ]
    if changed:
        raise ValueError(
            f"--resume continues a training exactly, and what differs is {'; '.join(changed)}; restore it, or start "
            "another training from its weights with --checkpoint and another --output"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested recipes: ``lr was 0.1 and is 0.2``."""
    found: list[str] = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old} and is {new}")
    return found
