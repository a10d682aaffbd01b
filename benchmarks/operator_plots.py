# SPDX-License-Identifier: Apache-2.0
"""The report's plots of a machine's operators: under its roofline, and against batch and tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotting
from plotting import BLUE, GREEN, GREY, GRID, INK, ORANGE, PALE, PURPLE
from tables import Line, Table, place, tables

from mvit_kernels.bench import results

KINDS = {  # kind -> alt text
    "roofline": "Each operator of MobileViT-S, eager and ours, under the machine's own roofline",
    "scaling": "Cost of MobileViT-S's first transformer against batch and tokens, eager and ours",
}
BACKENDS = {"cpu": (BLUE, "o"), "cuda": (BLUE, "o"), "triton": (GREEN, "D")}  # ours -> colour, marker
OPERATORS = (  # of the roofline, in its order; layer_norm has no products
    "transformer",
    "transformer_layer",
    "layer_norm_linear",
    "patch_attention",
    "linear_residual",
    "layer_norm_mlp",
    "inverted_residual",
)
COLUMNS = 3
NEAR = 1.6  # a factor between FLOP a byte, below which two labels would meet


def has(kind: str, operators: list[Table]) -> bool:
    """Whether the tables of the suite ``operators`` contain what a plot of this kind shows."""
    if kind == "roofline":
        return bool(under_the_roof(operators))
    return any(len(points) > 1 for points in _scaling(operators).values())


def draw(kind: str, folder: Path, path: Path) -> None:
    """Draw one of `KINDS` from the results in `folder` into the PNG file `path`."""
    operators = tables(folder, "operators")
    if kind == "roofline":
        machine = [line for line in results.read(folder / "operators.csv") if line["subject"] == "machine"]
        roofline(under_the_roof(operators), machine, path)
    else:
        scaling(_scaling(operators), operators[0].any, path)


# --------------------------------------------------------------------------------------------------------- roofline


def under_the_roof(operators: list[Table]) -> list[Table]:
    """The roofline's tables: S at 256 px, inference, first dtype and batch, by the device clock if there is one."""
    found = [t for t in operators if t.any["stage"].startswith("s/") and t.any["mode"] == "inference"]
    found = [t for t in found if t.any["size"] == "256" and t.best(BACKENDS) and t.ms("eager")]
    found = [t for t in found if t.any["subject"] in OPERATORS]
    if any(t.any["clock"] == "graph" for t in found):
        found = [t for t in found if t.any["clock"] == "graph"]
    first = found[0].any if found else {}
    return [t for t in found if (t.any["dtype"], t.any["batch"]) == (first["dtype"], first["batch"])]


def roofline(found: list[Table], machine: list[Line], path: Path) -> None:
    """GFLOP/s against FLOP/byte: a panel an operator, from eager's points to ours, under the machine's roofs."""
    line = found[0].any
    mine = [m for m in machine if m["commit"] == line["commit"] and m["device_name"] == line["device_name"]]
    product = max(float(m["gflop_per_s"]) for m in mine if m["dtype"] == line["dtype"])
    bandwidth = max(float(m["gb_per_s"]) for m in mine if m["gb_per_s"])
    corner = product / bandwidth  # FLOP a byte at which the two roofs meet
    names = [name for name in OPERATORS if any(t.any["subject"] == name for t in found)]
    rows = -(-len(names) // COLUMNS)
    below = f"{place(line)}, {line['dtype']}, batch {line['batch']}, 256 px; numbers are stages"
    below += "; bytes: each input read once, each result written once"
    figure = plotting.figure(1.35 + 2.0 * rows, "Operators of MobileViT-S under the machine's own roofline", below)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    xs = [_intensity(table) for table in found]
    rates = [float(t.lines[name]["gflop_per_s"]) for t in found for name in ("eager", t.best(BACKENDS))]
    left, right = min(*xs, corner) / 1.6, max(*xs, corner) * 1.6
    low, high = min(rates) / 1.5, product * 1.5
    for panel, name in zip(panels.flat, names, strict=False):
        panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
        panel.plot([left, corner, right], [left * bandwidth, product, product], color=INK, linewidth=1.6, zorder=2)
        panel.grid(True, which="major", color=GRID, linewidth=0.8)
        _operator(panel, [t for t in found if t.any["subject"] == name], lambda x: min(product, x * bandwidth))
        plotting.bare(panel, "left", "bottom")
        plotting.plain_numbers(panel, "x", "y")
    for index, panel in enumerate(panels.flat):
        panel.set_visible(index < len(names))
        panel.tick_params(labelbottom=index + COLUMNS >= len(names))  # the last of its column
    for row in panels:
        row[0].set_ylabel("GFLOP/s", fontsize=9)
    for panel in panels.flat[max(len(names) - COLUMNS, 0) : len(names)]:
        panel.set_xlabel("FLOP a byte", fontsize=9)
    _key(figure, found, product, bandwidth)
    plotting.save(figure, path)


def _intensity(table: Table) -> float:
    """FLOP a byte."""
    return float(table.any["gflop"]) / float(table.any["mb"]) * 1e3


def _operator(panel: Any, found: list[Table], roof: Callable[[float], float]) -> None:
    """The points of one operator, with their stages, and what ours reach of the roof as a title."""
    found = sorted(found, key=_intensity)
    shares = []
    for index, table in enumerate(found):
        x, ours = _intensity(table), table.best(BACKENDS)
        before, after = (float(table.lines[name]["gflop_per_s"]) for name in ("eager", ours))
        colour, marker = BACKENDS[ours]
        panel.plot([x, x], [before, after], color=PALE, linewidth=1.4, zorder=3)
        panel.plot(x, before, marker="o", color=ORANGE, markerfacecolor="white", markersize=5.5, zorder=4)
        panel.plot(x, after, marker=marker, color=colour, markeredgecolor="white", markersize=7.5, zorder=5)
        shares.append(100 * after / roof(x))
        # Beside eager's point, where there is room; below it between two that are near.
        left, right = (
            0 <= i < len(found) and 1 / NEAR < x / _intensity(found[i]) < NEAR for i in (index - 1, index + 1)
        )
        at, align = (
            ((0, -11), "center") if left and right else ((-6, -3), "right") if right or not index else ((6, -3), "left")
        )
        text = table.any["stage"][-1]
        panel.annotate(text, (x, before), at, textcoords="offset points", ha=align, fontsize=9, color=INK)
    low, high = (f"{share:.0f}" for share in (min(shares), max(shares)))
    panel.set_title(found[0].any["subject"], loc="left", fontsize=9.5, fontweight="bold", color=INK)
    text = f"{low} to {high} % of the roof" if low != high else f"{low} % of the roof"
    panel.set_title(text, loc="right", fontsize=8.5, color=GREY)


def _key(figure: Any, found: list[Table], product: float, bandwidth: float) -> None:
    """What the marks and the two roofs are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=ORANGE, markerfacecolor="white", markersize=5.5, label="eager")
    ]
    for name in dict.fromkeys(t.best(BACKENDS) for t in found):
        colour, marker = BACKENDS[name]
        handles.append(
            Line2D([], [], linestyle="", marker=marker, color=colour, markersize=7.5, label=f"ours ({name})")
        )
    roofs = f"roofs: {product:,.0f} GFLOP/s, the fastest large product; {bandwidth:,.0f} GB/s, a copy beyond the caches"
    handles.append(Line2D([], [], color=INK, linewidth=1.6, label=roofs))
    columns = len(handles) if len(handles) <= 3 else 2  # four in a row are wider than the page
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handletextpad=0.4
    )


# ---------------------------------------------------------------------------------------------------------- scaling

Points = list[tuple[float, Line]]


def _scaling(operators: list[Table]) -> dict[tuple[str, str], Points]:
    """("batch" or "tokens", candidate) -> [(x, line), …] for the transformer at stage 3 of S."""
    found: dict[tuple[str, str], Points] = {}
    wanted = ("transformer", "s/3", "inference")
    mine = [t for t in operators if results.key(t.any, ("subject", "stage", "mode")) == wanted]
    if not mine:
        return found
    clock = "graph" if any(t.any["clock"] == "graph" for t in mine) else "wall"
    mine = [t for t in mine if t.any["clock"] == clock and t.any["dtype"] == mine[0].any["dtype"]]
    base = next((t.any["batch"] for t in mine if t.any["size"] == "256"), mine[0].any["batch"])
    for table in mine:
        for candidate in ("eager", "compile", *BACKENDS):
            line = table.lines.get(candidate)
            if line is None or table.ms(candidate) is None:
                continue
            if line["size"] == "256":
                found.setdefault(("batch", candidate), []).append((float(line["batch"]), line))
            if line["batch"] == base:
                found.setdefault(("tokens", candidate), []).append((float(line["sequence"]), line))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def scaling(found: dict[tuple[str, str], Points], line: Line, path: Path) -> None:
    """Milliseconds against batch size, and against tokens per sequence, with ours' speedup over eager at each point."""
    below = f"{place(line)}, {line['dtype']}; medians, shaded from the 20th to the 80th percentile"
    below += "; ×: times as fast as eager"
    figure = plotting.figure(3.9, "Transformer of MobileViT-S, stage 3 (2 layers, d = 144), inference", below)
    panels = dict(zip(("batch", "tokens"), figure.subplots(1, 2, sharey=True), strict=True))
    styles = {"eager": (ORANGE, "o", "eager PyTorch"), "compile": (PURPLE, "v", "torch.compile")}
    styles |= {name: (*style, f"ours ({name})") for name, style in BACKENDS.items()}
    batch = next((p[0][1]["batch"] for (kind, _), p in found.items() if kind == "tokens"), "")
    panels["batch"].set_xlabel("images (256 tokens a sequence)", fontsize=9)
    panels["tokens"].set_xlabel(f"tokens a sequence (batch {batch})", fontsize=9)
    panels["batch"].set_ylabel("milliseconds a call", fontsize=9)
    for kind, panel in panels.items():
        panel.set(xscale="log", yscale="log")
        curves = {name: points for (which, name), points in found.items() if which == kind and len(points) > 1}
        _curves(panel, curves, styles)
        at = sorted({x for points in curves.values() for x, _ in points})
        panel.set_xticks([], minor=True)
        panel.set_xticks(at, [f"{x:g}" for x in at])
        panel.grid(True, which="major", color=GRID, linewidth=0.8)
        panel.margins(0.1, 0.1)
        plotting.bare(panel, "left", "bottom")
    if panels["batch"].lines:
        panels["batch"].legend(fontsize=9, frameon=False)
    plotting.plain_numbers(panels["batch"], "y")
    plotting.save(figure, path)


def _curves(panel: Any, curves: dict[str, Points], styles: dict[str, tuple[str, str, str]]) -> None:
    eager = {x: float(line["median_ms"]) for x, line in curves.get("eager", [])}
    for candidate, points in curves.items():
        colour, marker, label = styles[candidate]
        x = [at for at, _ in points]
        ms, low, high = ([float(p[name]) for _, p in points] for name in ("median_ms", "p20_ms", "p80_ms"))
        panel.plot(x, ms, color=colour, marker=marker, markersize=6.5, markeredgecolor="white", linewidth=1.8,
                   label=label)  # fmt: skip
        panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        for at, value in zip(x, ms, strict=True):
            if candidate in BACKENDS and at in eager:
                panel.annotate(f"{eager[at] / value:.1f}×", (at, value), (3, -11), textcoords="offset points",
                               fontsize=8.5, color=colour)  # fmt: skip
