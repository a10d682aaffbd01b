# SPDX-License-Identifier: Apache-2.0
"""Rows for the tables of `mvit_kernels.backends.preference`, from measurements.

Example:
    $ mvit-kernels bench --suite operators --device cuda --budget 10
    $ python -m mvit_kernels.bench.choice benchmarks/results/nvidia-h200/operators.csv

It reads what ``bench`` wrote (inference in bfloat16, times of graph replays), or lines of JSON with the keys section
("operator" or "stack"), op, stage ("s/3"), batch, candidate and us. It prints an `Operator` for each operator, stage
and batch that eager, CUDA C++ and Triton were all timed at, a `Stack` for each stage and batch that has one launch and
all four operators, and where that orders backends otherwise than the table. What is printed has no effect until it is
in a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..backends import preference
from ..backends.preference import Operator, Stack
from . import results
from .suites.operands import VARIANTS, Stage, stages

PARTS = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")  # of a layer, each once
ONE_LAUNCH = ("cuda", "cuda one launch")  # the candidate's name in results, and in lines of JSON
SIZE = 256  # px of the images


class Timing(NamedTuple):
    """One median, and where it stands."""

    subject: str  # the operator; "transformer" for a stack
    stage: str
    batch: int
    candidate: str
    us: float
    file: str
    line: int  # counted from 1


def timings(path: Path) -> Iterator[Timing]:
    """What a file of `bench`, or of lines of JSON, has of inference in bfloat16.

    Raises:
        OSError: it cannot be read.
        ValueError: a line of JSON is none.
    """
    if path.suffix == ".csv":
        for number, row in enumerate(results.read(path), 2):  # behind the header
            kind = (row["suite"], row["mode"], row["dtype"], row["clock"], row["size"])
            if kind == ("operators", "inference", "bfloat16", "graph", str(SIZE)) and row["stage"] and row["median_ms"]:
                us = 1e3 * float(row["median_ms"])
                yield Timing(row["subject"], row["stage"], int(row["batch"]), row["candidate"], us, path.name, number)
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = json.loads(line)
        if found.get("section") in ("operator", "stack") and "us" in found:
            subject = found["op"] if found["section"] == "operator" else "transformer"
            batch, candidate = int(found["batch"]), found["candidate"]
            yield Timing(subject, found["stage"], batch, candidate, float(found["us"]), path.name, number)


def rows(found: Iterable[Timing]) -> tuple[list[Operator], list[Stack]]:
    """The tables' rows; of several timings of one thing the last counts."""
    by_place: dict[tuple[str, str, int], dict[str, Timing]] = {}
    for each in found:
        by_place.setdefault((each.subject, each.stage, each.batch), {})[each.candidate] = each
    operators: dict[tuple[str, str, int], Operator] = {}
    for place, timed in by_place.items():
        subject, name, batch = place
        if subject in PARTS and timed.keys() >= {"eager", "cuda", "triton"}:
            three = [timed[candidate] for candidate in ("eager", "cuda", "triton")]
            stage = stage_of(name, batch)
            us = (round(each.us, 2) for each in three)
            operators[place] = Operator(subject, stage.width, stage.tokens, *us, source=source(three))
    stacks = []
    for (subject, name, batch), timed in by_place.items():
        whole = next((timed[candidate] for candidate in ONE_LAUNCH if candidate in timed), None)
        parts = [operators.get((part, name, batch)) for part in PARTS]
        if subject != "transformer" or whole is None or None in parts:
            continue
        stage = stage_of(name, batch)
        sequences = stage.tokens // stage.sequence
        fastest = stage.layers * sum(min(part.eager, part.cuda, part.triton) for part in parts if part)
        alone = stage.layers * sum(part.cuda for part in parts if part)
        where = f"{source([whole])}; sums"
        stacks.append(
            Stack(stage.sequence, stage.layers, sequences, round(whole.us, 1), round(fastest), round(alone), where)
        )
    return list(operators.values()), stacks


def stage_of(name: str, batch: int) -> Stage:
    """The stage of "s/3".

    Raises:
        ValueError: there is none of that name.
    """
    variant, _, index = name.partition("/")
    if variant not in VARIANTS or index not in ("3", "4", "5"):
        raise ValueError(f"choice: no stage is named {name!r}; s/3, xs/4 and the like are wanted")
    return stages([variant], SIZE, batch)[int(index) - 3]


def source(lines: Sequence[Timing]) -> str:
    """`bench_core.jsonl:37-39`, or every line where they are not adjacent."""
    numbers = [each.line for each in lines]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        text = f"{numbers[0]}-{numbers[-1]}"
    else:
        text = ",".join(map(str, numbers))
    return f"{lines[0].file}:{text}"


def changes(operators: Iterable[Operator]) -> Iterator[str]:
    """Where measured rows would order the backends otherwise than the table does."""
    standing = {(row.operator, row.width, row.rows): row for row in preference.OPERATORS}
    for row in operators:
        before = standing.get((row.operator, row.width, row.rows))
        new, old = (" > ".join(preference.fastest_first(each)) if each else "nothing" for each in (row, before))
        if new != old:
            yield f"{row.operator}, {row.rows} rows of {row.width}: {new}, and in the table {old}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mvit_kernels.bench.choice", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results of `bench --suite operators`, or lines of JSON")
    arguments = parser.parse_args(argv)
    try:
        operators, stacks = rows(each for file in arguments.files for each in timings(file))
    except (OSError, ValueError) as error:
        print(f"choice: {error}", file=sys.stderr)
        return 2
    if not operators and not stacks:
        print("choice: nothing there was timed in eager, cuda and triton, in bfloat16, on a GPU", file=sys.stderr)
        return 1
    for kind, found in (("OPERATORS", operators), ("STACKS", stacks)):
        print(f"# {kind}")
        for row in found:
            print(f"{type(row).__name__}({', '.join(map(_literal, row))}),")
    for line in changes(operators):
        print(f"# {line}")
    return 0


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.exit(main())
