# SPDX-License-Identifier: Apache-2.0
"""The report's headline plot: how many times as fast as eager PyTorch each candidate is, machine beside machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotting
from plotting import BLUE, GREEN, GREY, GRID, INK, ORANGE, PALE, PURPLE
from tables import OURS, Setting, Table, label


class Mark(NamedTuple):
    """How a kind of candidate is drawn; of several candidates of a kind the fastest is."""

    label: str
    candidates: tuple[str, ...]
    marker: str
    colour: str
    size: float = 7.0


MARKS = (
    Mark("frozen (ours)", ("frozen",), "o", BLUE, 10.5),
    Mark("accelerated, compiled (ours)", ("compile_accelerated",), "P", BLUE, 9.0),
    Mark("accelerated (ours)", ("accelerated",), "D", BLUE, 8.0),
    Mark("OpenVINO", ("openvino", "openvino_by_image"), "s", ORANGE),
    Mark("ONNX Runtime", ("onnxruntime",), "^", GREEN),
    Mark(
        "torch.compile",
        tuple(f"compile{kind}" for kind in ("", "_channels_last", "_freezing", "_reduce_overhead", "_max_autotune")),
        "v",
        PURPLE,
    ),
    Mark("channels-last", ("channels_last",), "o", GREY, 6.0),
)


TICKS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NEAR = 1.06  # a factor between two ratios, below which their marks would hide each other


def headline(machines: Sequence[dict[Setting, Table]], path: Path) -> None:
    """Speed relative to eager: a panel a machine, a line a setting, a mark a candidate. What is absent has no mark."""
    found = [each for each in machines if each]
    heads, lines = _lines(sorted({setting for each in found for setting in each}))
    bottom = max([*lines.values(), 0]) + 0.6
    below = "Higher is better. Eager in the same dtype and batch; medians; logarithmic scale; of variants the fastest."
    figure = plotting.figure(1.55 + 0.255 * bottom, "MobileViT: speed relative to eager PyTorch, 256 px", below)
    panels = figure.subplots(1, max(len(found), 1), sharex=True, sharey=True, squeeze=False)[0]
    ratios = [r for each in found for t in each.values() for r in map(t.ratio, t.lines) if r] or [1.0]
    low, high = min(0.93, 0.9 * min(ratios)), 1.28 * max(ratios)  # with room for the last number
    narrow = len(found) > 2
    for panel, tables in zip(panels, found, strict=False):
        line = next(iter(tables.values())).any
        where = label(line).replace(", ", "\n" if narrow else ", ")
        panel.set_title(where, loc="left", fontsize=10.5, color=INK, pad=8)
        for setting, y in lines.items():
            if setting in tables:
                _candidates(panel, tables[setting], y)
            else:
                panel.text(1.15, y, "not measured", va="center", fontsize=8, color=GREY, style="italic")
        panel.set(xscale="log", xlim=(low, high))
        panel.axvline(1, color=INK, linewidth=1.2, zorder=1)
        ticks = [t for t in TICKS if low < t < high and (not narrow or math.log2(t).is_integer())]
        panel.set_xticks([], minor=True)
        panel.set_xticks(ticks, ["eager" if tick == 1 else f"{tick:g}×" for tick in ticks])
        panel.set_yticks(list(lines.values()), [setting.label for setting in lines])
        panel.grid(axis="x", color=GRID, linewidth=0.8)
        plotting.bare(panel)
    panels[0].set_ylim(bottom, -1.1)
    for text, y in heads.items():
        panels[0].annotate(text, (0, y), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                           ha="right", va="center", fontsize=9, fontweight="bold", color=INK)  # fmt: skip
    drawn = [m for m in MARKS if any(table.best(m.candidates) for tables in found for table in tables.values())]
    for mark in drawn:
        panels[0].plot([], [], linestyle="", label=mark.label, **_style(mark))
    if drawn:
        figure.legend(
            loc="outside lower center",
            ncols=len(drawn) if len(drawn) <= 6 else 4,
            fontsize=9,
            frameon=False,
            handletextpad=0.2,
        )
    plotting.save(figure, path)


def _lines(settings: Sequence[Setting]) -> tuple[dict[str, float], dict[Setting, float]]:
    """The heights of the groups' headings, and those of the settings below them."""
    heads: dict[str, float] = {}
    lines: dict[Setting, float] = {}
    y = 0.0
    for setting in settings:
        if setting.heading not in heads:
            y += 0.5 if heads else 0
            heads[setting.heading] = y
            y += 1
        lines[setting] = y
        y += 1
    return heads, lines


def _style(mark: Mark) -> dict[str, Any]:
    hollow = mark.label == "channels-last"
    face = "white" if hollow else mark.colour
    edge = mark.colour if hollow else "white"
    return dict(marker=mark.marker, markersize=mark.size, markerfacecolor=face, markeredgecolor=edge,
                markeredgewidth=1.2 if hollow else 0.8)  # fmt: skip


def _candidates(panel: Any, table: Table, y: float) -> None:
    """The marks of a line: ours on it, and others that are `NEAR` a neighbour above or below it; and which failed."""
    fastest = {mark: table.best(mark.candidates) for mark in MARKS}
    ratios = sorted((table.ratio(name), mark) for mark, name in fastest.items() if name)
    if not ratios:
        return
    panel.plot([1, ratios[-1][0]], [y, y], color=PALE, linewidth=1.2, zorder=2)
    above, ours = -0.3, None
    for index, (ratio, mark) in enumerate(ratios):
        neighbours = [ratios[i][0] for i in (index - 1, index + 1) if 0 <= i < len(ratios)]
        if fastest[mark] in OURS:
            panel.plot(ratio, y, zorder=3, **_style(mark))
            ours = ratio
        elif any(1 / NEAR < ratio / neighbour < NEAR for neighbour in neighbours):
            panel.plot(ratio, y + above, zorder=4, **_style(mark))
            above = -above
        else:
            panel.plot(ratio, y, zorder=2.5, **_style(mark))
    for name in filter(table.failure, OURS):
        panel.annotate(f"{name} failed", (ratios[-1][0], y), (8, 0), textcoords="offset points", va="center",
                       fontsize=8, style="italic", color=BLUE)  # fmt: skip
    if ours is not None:
        behind = max(ratio for ratio, _ in ratios if ratio < 1.3 * ours)  # a mark that the number would hide
        panel.annotate(f"{ours:.1f}×", (behind, y), (8, 0), textcoords="offset points", va="center",
                       fontsize=9, fontweight="bold", color=BLUE, zorder=5)  # fmt: skip
