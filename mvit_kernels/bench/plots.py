# SPDX-License-Identifier: Apache-2.0
"""Plots of a table and of changes, for ``mvit-kernels bench --plot FILE``; in the palette of Okabe and Ito.

Example:
    >>> draw_table(rows, "mobilevit_s, batch 1", Path("bench.png"))
    >>> draw_changes(changes(old, new), Path("changes.svg"))

matplotlib draws them; without it `import_matplotlib` raises an ImportError that says what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .changes import Change
from .results import Row

SUFFIXES = (".png", ".svg", ".pdf")
OURS = ("accelerated", "frozen", "compile_accelerated", "reference", "cpu", "triton", "cuda")
BLUE, ORANGE, PALE = "#0072B2", "#D55E00", "#BBBBBB"
COLOURS = {"slower": ORANGE, "faster": BLUE, "same": PALE}
MOST_LINES = 40  # of changes: what moved most
DPI = 144


def import_matplotlib() -> None:
    """Raise ImportError, with what to install, if there is no matplotlib."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'mvit_kernels[plots]'") from error


def draw_table(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of milliseconds with the 20th to 80th percentile, the slowest at the top; ours in blue.

    Raises:
        ValueError: no candidate was timed.
    """
    timed = [one for one in rows if one["median_ms"] != ""]
    clock = "graph" if any(one["clock"] == "graph" for one in timed) else "wall"
    timed = sorted((one for one in timed if one["clock"] == clock), key=lambda one: -one["median_ms"])
    if not timed:
        raise ValueError("--plot: no candidate was timed, so there is nothing to draw")
    figure, panel = _panel(len(timed))
    right = max(one["p80_ms"] for one in timed)
    for index, one in enumerate(reversed(timed)):
        ms, low, high = (one[name] for name in ("median_ms", "p20_ms", "p80_ms"))
        panel.barh(index, ms, color=BLUE if one["candidate"] in OURS else PALE, height=0.7)
        panel.errorbar(ms, index, xerr=[[ms - low], [high - ms]], color="black", linewidth=0.9, capsize=2)
        ratio = f"  {one['ratio']:.2f}×" if one["ratio"] not in ("", None) and one["candidate"] != "eager" else ""
        panel.text(high + 0.015 * right, index, f"{ms:.3g} ms{ratio}", va="center", fontsize=9)
    panel.set_yticks(range(len(timed)), [one["candidate"] for one in reversed(timed)], fontsize=9)
    panel.set_xlim(0, 1.25 * right)  # leaves room for the numbers beside the bars
    device = ", the device's clock" if clock == "graph" else ""
    panel.set_xlabel(f"ms a call{device}: median, 20th to 80th percentile (blue: ours; ×: times as fast as eager)")
    panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def draw_changes(found: Sequence[Change], path: Path) -> None:
    """New time over old time, of what moved most at the top, with the range of each.

    Raises:
        ValueError: nothing was timed in both sets.
    """
    timed = [change for change in found if change.old and change.new]
    if not timed:
        raise ValueError("--plot: nothing was timed in both, so there is nothing to draw")
    order = sorted(timed, key=lambda change: (change.verdict != "same", abs(change.factor - 1)))
    shown = order[-MOST_LINES:]
    figure, panel = _panel(len(shown))
    for index, change in enumerate(shown):
        colour = COLOURS[change.verdict]
        old, new = (tuple(100 * (value / change.old[0] - 1) for value in range_) for range_ in (change.old, change.new))
        panel.plot(old[1:], (index - 0.15, index - 0.15), color=PALE, linewidth=5, solid_capstyle="butt")
        panel.plot(new[1:], (index + 0.15, index + 0.15), color=colour, linewidth=2)
        panel.plot(new[0], index + 0.15, marker="o", color=colour, markersize=5)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(shown)), [change.about for change in shown], fontsize=8)
    panel.set_xlabel("change of time in %, above 0 slower (grey: range before; dot and line: after)")
    left_out = f", the {len(shown)} that moved most of {len(timed)}" if len(shown) < len(timed) else ""
    panel.set_title(f"What changed{left_out}", fontsize=10)
    figure.savefig(path, dpi=DPI)


def _panel(lines: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(9, 1.2 + 0.32 * lines), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", labelsize=9)
    return figure, panel
