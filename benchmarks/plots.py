# SPDX-License-Identifier: Apache-2.0
"""The report's plots, from tables of results, in the colorblind-safe palette of Okabe and Ito."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import NAMES, NETWORKS, OURS, Line, Table, place, short_place, tables

from mvit_kernels.bench import results

KINDS = {  # kind -> alt text
    "roofline": "Operators of MobileViT-S under the machine's own roofline",
    "scaling": "Cost of MobileViT-S's first transformer against batch and tokens",
}
BLUE, ORANGE, GREEN, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#555555", "#BBBBBB"
BACKENDS = {"cpu": BLUE, "cuda": BLUE, "triton": GREEN}  # ours
MARKERS = {
    "transformer": "o",
    "transformer_layer": "X",
    "patch_attention": "s",
    "layer_norm_mlp": "^",
    "layer_norm_linear": "v",
    "linear_residual": "D",
    "inverted_residual": "P",
}
MOST_PANELS = 6
DPI = 110


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # without matplotlib's version: reproducible bytes


# --------------------------------------------------------------------------------------------------------- networks


def headline(devices: list[list[Table]], path: Path) -> None:
    """Bars of milliseconds with 20th to 80th percentile, one panel per setting: S and XXS on each device."""
    chosen = []
    for found in devices:
        found = [t for t in found if t.any["subject"] in NETWORKS and t.any["clock"] == "wall" and t.ms("eager")]
        found = [t for t in found if t.any["subject"] != "mobilevit_xs" and t.any["size"] == "256"]
        chosen += found[: MOST_PANELS // len(devices)]
    columns = min(2, len(chosen)) or 1
    rows = -(-len(chosen) // columns) or 1
    bars = max((sum(1 for name in NAMES if t.ms(name)) for t in chosen), default=1)
    figure = _figure(5.6 * columns, 0.4 + rows * (0.75 + 0.23 * bars))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_visible(False)
    for panel, table in zip(figure.axes, chosen, strict=False):
        panel.set_visible(True)
        _bars(panel, table)
    if chosen:
        where = "; ".join(dict.fromkeys(f"{place(t.any)}, torch {t.any['torch']}" for t in chosen))
        title = "MobileViT, 256 px: milliseconds a call, medians with 20th to 80th percentile"
        figure.suptitle(f"{title}\n{where}", fontsize=10)
    _save(figure, path)


def _bars(panel: Any, table: Table) -> None:
    names = sorted((name for name in NAMES if table.ms(name)), key=table.ms, reverse=True)
    slowest = max(float(table.lines[name]["p80_ms"]) for name in names)
    for index, name in enumerate(names):
        ms = table.ms(name)
        low, high = (float(table.lines[name][column]) for column in ("p20_ms", "p80_ms"))
        panel.barh(index, ms, color=BLUE if name in OURS else PALE, height=0.72)
        panel.errorbar(ms, index, xerr=[[ms - low], [high - ms]], color="black", linewidth=0.9, capsize=2)
        ratio = "" if name == "eager" else f"  {table.ms('eager') / ms:.2f}×"
        panel.text(high + 0.015 * slowest, index, f"{ms:.3g} ms{ratio}", va="center", fontsize=8)
    panel.set_yticks(range(len(names)), [NAMES[name] for name in names], fontsize=8)
    panel.set_xlim(0, 1.3 * slowest)  # leaves room for the numbers next to the bars
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("ms (blue: ours; ×: times as fast as eager)", fontsize=8)
    panel.set_title(f"{short_place(table.any)}: {table.label}", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------------------- operators


def has(kind: str, operators: list[Table]) -> bool:
    """Whether the tables of the suite ``operators`` contain what a plot of this kind shows."""
    if kind == "roofline":
        return bool(_under_the_roof(operators))
    return any(len(points) > 1 for points in _scaling(operators).values())


def draw(kind: str, folder: Path, path: Path) -> None:
    """Draw one of `KINDS` from the results in `folder` into the PNG file `path`."""
    operators = tables(folder, "operators")
    if kind == "roofline":
        machine = [line for line in results.read(folder / "operators.csv") if line["subject"] == "machine"]
        roofline(_under_the_roof(operators), machine, path)
    else:
        scaling(_scaling(operators), operators[0].any, path)


def _under_the_roof(operators: list[Table]) -> list[Table]:
    """The roofline's tables: S at 256 px, inference, first dtype and batch, by the device clock if there is one."""
    found = [t for t in operators if t.any["stage"].startswith("s/") and t.any["mode"] == "inference"]
    found = [t for t in found if t.any["size"] == "256" and _ours(t) and t.ms("eager")]
    found = [t for t in found if t.any["subject"] in MARKERS]  # layer_norm has no products
    if any(t.any["clock"] == "graph" for t in found):
        found = [t for t in found if t.any["clock"] == "graph"]
    first = found[0].any if found else {}
    return [t for t in found if (t.any["dtype"], t.any["batch"]) == (first["dtype"], first["batch"])]


def _ours(table: Table) -> str | None:
    return table.best(BACKENDS)


def roofline(found: list[Table], machine: list[Line], path: Path) -> None:
    """GFLOP/s against FLOP/byte: each operator from eager's point to ours, under the machine's measured roofline."""
    line = found[0].any
    mine = [m for m in machine if m["commit"] == line["commit"] and m["device_name"] == line["device_name"]]
    product = max(float(m["gflop_per_s"]) for m in mine if m["dtype"] == line["dtype"])
    bandwidth = max(float(m["gb_per_s"]) for m in mine if m["gb_per_s"])
    figure = _figure(8.4, 5.4)
    panel = figure.subplots()
    intensities = [float(t.any["gflop"]) / float(t.any["mb"]) * 1e3 for t in found]
    left, right = min(*intensities, product / bandwidth) / 2, max(*intensities, product / bandwidth) * 2
    corner = product / bandwidth
    panel.plot([left, corner, right], [left * bandwidth, product, product], color="black", linewidth=1.6)
    panel.annotate(f"{product:,.0f} GFLOP/s, large products", (right, product), ha="right", va="bottom", fontsize=8)
    panel.annotate(
        f"{bandwidth:,.0f} GB/s, a copy", (left, left * bandwidth), (6, -2), textcoords="offset points", fontsize=8
    )
    for table, x in zip(found, intensities, strict=True):
        marker, ours = MARKERS[table.any["subject"]], _ours(table)
        before, after = (float(table.lines[name]["gflop_per_s"]) for name in ("eager", ours))
        panel.plot([x, x], [before, after], color=PALE, linewidth=1, zorder=1)
        panel.plot(x, before, marker=marker, color=ORANGE, markerfacecolor="white", markersize=7, linestyle="")
        panel.plot(x, after, marker=marker, color=BACKENDS[ours], markersize=7, linestyle="")
        panel.annotate(table.any["stage"][-1], (x, after), xytext=(6, -3), textcoords="offset points", fontsize=7)
    for operator in dict.fromkeys(t.any["subject"] for t in found):
        panel.plot([], [], marker=MARKERS[operator], color=GREY, linestyle="", label=operator)
    panel.plot([], [], marker="o", color=ORANGE, markerfacecolor="white", linestyle="", label="eager PyTorch")
    for ours in dict.fromkeys(map(_ours, found)):
        panel.plot([], [], marker="o", color=BACKENDS[ours], linestyle="", label=f"ours ({ours})")
    panel.set(xscale="log", yscale="log", xlim=(left, right))
    _plain_numbers(panel)
    panel.set_xlabel("FLOP a byte (products, over every input read once and every result written once)")
    panel.set_ylabel("GFLOP/s")
    about = f"{place(line)}, {line['dtype']}, batch {line['batch']}, 256 px"
    panel.set_title(f"Operators of MobileViT-S, numbers are stages\n{about}", fontsize=10)
    panel.grid(True, which="major", color="#E5E5E5")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    _save(figure, path)


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
    """Milliseconds against batch size, and against tokens per sequence, on logarithmic axes."""
    figure = _figure(9.6, 4.2)
    panels = dict(zip(("batch", "tokens"), figure.subplots(1, 2), strict=True))
    styles = {"eager": (ORANGE, "o", "eager PyTorch"), "compile": (GREY, "s", "torch.compile")}
    styles |= {name: (colour, "^" if name == "triton" else "D", f"ours ({name})") for name, colour in BACKENDS.items()}
    for (kind, candidate), points in found.items():
        if len(points) < 2:
            continue
        colour, marker, label = styles[candidate]
        x = [at for at, _ in points]
        panels[kind].plot(x, [float(p["median_ms"]) for _, p in points], color=colour, marker=marker, label=label)
        low, high = ([float(p[column]) for _, p in points] for column in ("p20_ms", "p80_ms"))
        panels[kind].fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    batch = next((p[0][1]["batch"] for (kind, _), p in found.items() if kind == "tokens"), "")
    panels["batch"].set_xlabel("images (N = 256 tokens a sequence)")
    panels["tokens"].set_xlabel(f"tokens a sequence, N (batch {batch})")
    for panel in panels.values():
        panel.set(xscale="log", yscale="log")
        _plain_numbers(panel)
        panel.set_ylabel("ms a call")
        panel.grid(True, which="major", color="#E5E5E5")
        if panel.lines:
            panel.legend(fontsize=8)
            at = sorted({x for one in panel.lines for x in one.get_xdata()})
            panel.set_xticks(at, [f"{x:g}" for x in at], minor=False)
            panel.set_xticks([], minor=True)
    about = f"{place(line)}, {line['dtype']}"
    figure.suptitle(f"Transformer of MobileViT-S, stage 3 (2 layers, d = 144), inference\n{about}", fontsize=10)
    _save(figure, path)


def _plain_numbers(panel: Any) -> None:
    """Label logarithmic axes with 1, 2, 5, 10, ... instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
