# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation as files: JSON, and the confusion matrix as CSV and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.files import write_csv, write_json, write_whole

__all__ = ["write_confusion", "write_figures"]

_MOST_NAMED = 60  # classes whose names fit at the sides of the picture


def write_figures(folder: Path, figures: Mapping[str, Any], classes: Sequence[str]) -> list[Path]:
    """Write ``best.json``, and ``confusion.csv`` and ``.png`` if there is a confusion matrix; what was written."""
    rest = {key: value for key, value in figures.items() if key != "confusion"}
    write_json(folder / "best.json", {**rest, "classes": list(classes)})
    written = [folder / "best.json"]
    if "confusion" in figures:
        written += write_confusion(folder / "confusion", figures["confusion"], classes)
    return written


def write_confusion(stem: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> list[Path]:
    """Write ``<stem>.csv``, a row a true class, and ``<stem>.png`` where matplotlib is installed; what was written."""
    # Segmentation and detection may count a class that has no name, such as the background.
    names = [*classes, *map(str, range(len(classes), len(matrix)))]
    rows = [{"true": name, **dict(zip(names, row, strict=True))} for name, row in zip(names, matrix, strict=True)]
    csv = stem.with_suffix(".csv")
    write_csv(csv, rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [csv]
    side = min(4 + 0.25 * len(names), 24)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= _MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=7)
    picture = stem.with_suffix(".png")
    with write_whole(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    return [csv, picture]
