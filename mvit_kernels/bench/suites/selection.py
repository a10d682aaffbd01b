# SPDX-License-Identifier: Apache-2.0
"""Which cases of a suite, or rows of results, are meant: by operator, model, stage, dtype, batch, size, training.

Example:
    >>> chosen = select(operators.cases("cpu"), Selection(operator=("patch_attention",), stage=("3",)))
    >>> rows = select(rows, Selection(dtype=("bfloat16",)))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from ...backends.library import SCHEMAS
from ._case import Case

One = TypeVar("One", Case, dict)


class Selection(NamedTuple):
    """Values of which one must hold, by what they are values of; an empty tuple takes all."""

    operator: tuple[str, ...] = ()
    model: tuple[str, ...] = ()  # as `mvit_kernels.zoo.load` knows it; its blocks belong to it
    stage: tuple[str, ...] = ()  # "s/3", or "3" for that of each variant, or "s" for all of S
    dtype: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    size: tuple[str, ...] = ()  # of the image in pixels: "256"
    training: bool = False  # take what has a backward pass alone

    def __str__(self) -> str:
        lists = [f"--{name} {','.join(wanted)}" for name, wanted in self._lists()]
        return " ".join([*lists, *["--train"] * self.training])

    def takes(self, one: Case | Mapping[str, Any]) -> bool:
        """Whether this case, or this row of results, is meant."""
        if self.training and _line(one)["mode"] in ("", "inference"):
            return False
        values = values_of(one)
        return all(values[name].intersection(wanted) for name, wanted in self._lists())

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(name, wanted) for name, wanted in self._asdict().items() if wanted and name != "training"]


def values_of(one: Case | Mapping[str, Any]) -> dict[str, set[str]]:
    """The values of a case, or of a row of results, that fields of `Selection` are compared with."""
    line = {"stage": "", "dtype": "", "batch": "", "size": ""} | _line(one)
    subject, stage = str(line["subject"]), str(line["stage"])
    models = {one.model} if isinstance(one, Case) else {subject} - {"block", "machine", *SCHEMAS}
    return {
        "operator": {subject} & set(SCHEMAS),
        "model": models - {""},
        "stage": {stage, *stage.split("/")} - {""},
        **{name: {str(line[name])} - {""} for name in ("dtype", "batch", "size")},
    }


def select(found: Iterable[One], selection: Selection, what: str) -> list[One]:
    """Those of `found` that `selection` takes, in their order.

    Raises:
        ValueError: there are none, or a value of the selection that none of them has; the error lists what there is.
    """
    found = list(found)
    values = [values_of(one) for one in found]
    for name, wanted in selection._lists():
        known = set().union(*(one[name] for one in values))
        if unknown := [value for value in wanted if value not in known]:
            there = _listed(known, name) or "none"
            raise ValueError(f"{what} has no {name} {', '.join(unknown)}; there are: {there}")
    chosen = [one for one in found if selection.takes(one)]
    if not chosen:
        raise ValueError(f"{what} has nothing with {selection} together; {'; '.join(_nearest(found, selection))}")
    return chosen


def _nearest(found: list[One], selection: Selection) -> list[str]:
    """For each filter what it would find with all others as they are."""
    lines = []
    for name, _ in selection._lists():
        rest = selection._replace(**{name: ()})
        if values := set().union(*(values_of(one)[name] for one in found if rest.takes(one))):
            lines.append(f"with {rest} there are {name} {_listed(values, name)}")
    if selection.training and any(map(selection._replace(training=False).takes, found)):
        lines.append("without --train there are some")
    return lines or ["leave out more than one of them"]


def _line(one: Case | Mapping[str, Any]) -> dict[str, Any]:
    return dict(one.subject if isinstance(one, Case) else one)


def _listed(values: set[str], name: str) -> str:
    """The values, sorted; of stages the whole names."""
    whole = {value for value in values if "/" in value} if name == "stage" else values
    return ", ".join(sorted(whole, key=lambda value: (len(value), value) if value.isdigit() else (0, value)))
