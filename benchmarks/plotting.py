# SPDX-License-Identifier: Apache-2.0
"""What the report's plots share: drawn for a page 900 pixels wide, at twice that.

Colours are those of Okabe and Ito, which colour-blind readers tell apart, with a darker purple. The ground is opaque
white, so that the pictures are the same on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, GREY, PALE, GRID = "#222222", "#6B6B6B", "#C8C8C8", "#E8E8E8"
WIDTH, DPI = 9.0, 200  # inches; 900 px at 100 an inch, twice
MARGIN = 0.012  # of the width, left of the title


def figure(height: float, title: str, below: str) -> Any:
    """A figure of the page's width, with a title and a line of explanation below it."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    made = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    made.suptitle(f"{title}\n", x=MARGIN, ha="left", fontsize=12, fontweight="bold", color=INK)
    made.text(MARGIN, 1 - 0.36 / height, below, ha="left", va="center", fontsize=9, color=GREY)
    return made


def save(made: Any, path: Path) -> None:
    made.savefig(path, dpi=DPI, metadata={"Software": None})  # without matplotlib's version: reproducible bytes


def bare(panel: Any, *spines: str) -> None:
    """Take the frame away but for `spines`, and the ticks' marks."""
    for side, spine in panel.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(PALE)
    panel.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    panel.set_axisbelow(True)


def plain_numbers(panel: Any, *axes: str, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """Label the logarithmic axes ("x", "y") with 1, 2, 5, 10, … instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in axes:
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.set_minor_locator(NullLocator())
