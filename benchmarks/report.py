# SPDX-License-Identifier: Apache-2.0
"""The README's figures from the committed CSV alone: its sentence, tables and plots. ``make report`` runs this.

    python benchmarks/report.py            # rewrite README.md between its markers, and benchmarks/plots/
    python benchmarks/report.py --check    # change nothing; exit with 1 where README.md is not what the CSV gives

It reads the newest rows of each subject in ``benchmarks/results/<device>/`` (see `mvit_kernels.bench.results`). All
candidates in a row of a table were timed in turns in one process. Missing values are left empty; rows in which another
candidate is faster are kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import plots
from tables import NAMES, NETWORKS, OTHERS, OURS, Table, place, short_place, tables

from mvit_kernels.bench import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "plots"
FIRST_SCREEN = ("mobilevit_s", "mobilevit_xxs")
HEADLINE = {"cpu": ("1", "float32"), "cuda": ("64", "bfloat16")}  # batch and dtype of the headline sentence


def folders(root: Path) -> list[Path]:
    """The result folders that have rows of the suite ``models``, GPUs first."""
    found = [(tables(folder, "models"), folder) for folder in sorted(root.iterdir()) if folder.is_dir()]
    found = [(known[0].any["device"] != "cuda", folder) for known, folder in found if known]
    return [folder for _, folder in sorted(found, key=lambda pair: pair[0])]


# ------------------------------------------------------------------------------------------------------------- words


def milliseconds(value: float) -> str:
    """The value with three significant digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(slow: float, fast: float) -> str:
    return f"{slow / fast:.2f}×"


def sentence(root: Path) -> str:
    """The speedup in one sentence, for the headline setting of each device."""
    parts = []
    for folder in folders(root):
        for table in tables(folder, "models"):
            line = table.any
            ours, other = table.best(OURS), table.best(OTHERS)
            wanted = HEADLINE[line["device"]]
            if line["subject"] != "mobilevit_s" or (line["batch"], line["dtype"]) != wanted or line["size"] != "256":
                continue
            if line["clock"] != "wall" or ours is None or other is None or table.ms("eager") is None:
                continue
            mine = table.ms(ours)
            parts.append(
                f"on {place(line)}, in {line['dtype']} at batch {line['batch']} and 256 px, timm's MobileViT-S "
                f"{NAMES[ours]} takes {milliseconds(mine)} ms a batch: {times(table.ms('eager'), mine)} as fast as "
                f"eager PyTorch and {times(table.ms(other), mine)} as fast as {NAMES[other]}, the fastest of the others"
            )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else "Nothing was measured yet."


def headline_table(root: Path) -> list[str]:
    """One line per setting: eager, the fastest of the others, ours, and the speedups over both."""
    lines = ["| | eager | fastest other | ours | on eager | on the fastest other |", "|---|---|---|---|---|---|"]
    for folder in folders(root):
        found = [t for s in ("models", "training") for t in tables(folder, s)]
        found = [t for t in found if t.any["subject"] in FIRST_SCREEN and t.any["clock"] == "wall"]
        found = [t for t in found if t.any["size"] == "256" and int(t.any["batch"]) <= 64]
        for device, table in ((short_place(table.any), table) for table in found):
            ours, other, eager = table.best(OURS), table.best(OTHERS), table.ms("eager")
            if ours is None or other is None or eager is None:
                continue
            mine, theirs = table.ms(ours), table.ms(other)
            cells = [f"{milliseconds(theirs)} ({NAMES[other]})", f"{milliseconds(mine)} ({NAMES[ours]})"]
            cells[mine < theirs] = f"**{cells[mine < theirs]}**"
            gained = [times(eager, mine), times(theirs, mine)]
            lines.append(f"| {device}, {table.label} | {' | '.join([milliseconds(eager), *cells, *gained])} |")
    return lines


def full_table(found: list[Table]) -> list[str]:
    """Every candidate of every table: ms, and the speedup over eager."""
    names = [name for name in NAMES if any(name in table.lines for table in found)]
    lines = [f"| | {' | '.join(NAMES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for table in found:
        cells = []
        for name in names:
            ms, eager = table.ms(name), table.ms("eager")
            text = "" if ms is None else milliseconds(ms)
            if ms is not None and eager is not None and name != "eager":
                text += f" ({times(eager, ms)})"
            cells.append(f"**{text}**" if name == table.best(names) else text)
        lines.append(f"| {table.label} | {' | '.join(cells)} |")
    return lines


def mobile(found: list[Table]) -> list[str]:
    """A sentence on the paper's protocol: the fastest form of each network."""
    if not found:
        return []
    parts = []
    for table in found:
        best = table.best(table.lines)
        if best is not None:
            name = NETWORKS.get(table.any["subject"], table.any["subject"])
            parts.append(f"{name} at {table.any['size']} px {milliseconds(table.ms(best))} ms ({NAMES[best]})")
    return [
        "",
        f"By the paper's protocol (100 calls at batch 1 in float32), each in its fastest form: {', '.join(parts)}.",
    ]


def boundary(folder: Path) -> list[str]:
    """A sentence on the fixed overhead of a call, for one operator on four tokens."""
    path = folder / "boundary.csv"
    lines = results.latest(results.read(path)) if path.exists() else []
    us = {(one["subject"], one["backend"], one["candidate"]): 1e3 * float(one["median_ms"]) for one in lines}
    name, backend = "layer_norm_linear", "cpu"
    if any((name, backend, path) not in us for path in ("raw", "function", "public")):
        return []
    raw, function, public = (us[name, backend, path] for path in ("raw", "function", "public"))
    return [
        "",
        f"A call's fixed cost on one thread: {raw:.1f} µs for the raw C++ operator on four tokens, "
        f"{public - raw:.1f} µs for the checks and the choice of a backend, {function - raw:.1f} µs for "
        f"autograd around it; `torch.add` takes {us['torch.add', '', 'forward']:.1f} µs.",
    ]


# ---------------------------------------------------------------------------------------------------------- sections


def sections(root: Path = RESULTS) -> dict[str, str]:
    """The generated sections of README.md, by the name of their marker."""
    headline = [
        sentence(root),
        "",
        "![Milliseconds of MobileViT in all its forms](benchmarks/plots/headline.png)",
        "",
        "Milliseconds a call, medians; **bold** is the fastest of all.",
        "",
        *headline_table(root),
    ]
    detail: list[str] = []
    for folder in folders(root):
        found = [table for suite in ("models", "training") for table in tables(folder, suite)]
        line = found[0].any
        commits = ", ".join(dict.fromkeys(t.any["commit"] for t in found))
        dates = sorted({t.any["date"][:10] for t in found})
        libraries = f", {line['libraries'].replace('; ', ', ')}" if line["libraries"] else ""
        driver = f", driver {line['driver']}" if line["driver"] else ""
        name = line["device_name"] if line["device"] == "cuda" else place(line)
        detail += [
            f"### {name[0].upper()}{name[1:]}",
            "",
            f"{line['isa']} on the CPU ({line['cpu']}), torch {line['torch']}{driver}{libraries}; commit {commits}, "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Milliseconds a call, and how many times as fast as "
            f"the eager model in NCHW. Spreads, errors, memory: "
            f"[`results/{folder.name}`](benchmarks/results/{folder.name}).",
            "",
            *full_table(found),
            *mobile([table for table in tables(folder, "mobile")]),
            *boundary(folder),
            "",
        ]
        for kind, alt in plots.KINDS.items():
            if plots.has(kind, tables(folder, "operators")):
                detail += [f"![{alt}](benchmarks/plots/{kind}-{folder.name}.png)", ""]
    return {"headline": "\n".join(headline).rstrip(), "detail": "\n".join(detail).rstrip()}


def rewritten(text: str, new: dict[str, str]) -> str:
    """The README's text with its generated sections replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, body in new.items():
        pattern = re.compile(rf"(<!-- report: {name} -->\n).*?(<!-- end of report: {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no marker <!-- report: {name} -->; put both of its lines back")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, and exit with 1 where README.md is outdated"
    )
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewritten(before, sections())
    if args.check:
        if before != after:
            print("README.md is not what the committed results give: make report", file=sys.stderr)
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    plots.headline([tables(folder, "models") for folder in folders(RESULTS)], PLOTS / "headline.png")
    for folder in folders(RESULTS):
        for kind in plots.KINDS:
            if plots.has(kind, tables(folder, "operators")):
                plots.draw(kind, folder, PLOTS / f"{kind}-{folder.name}.png")
    print(f"README.md and {PLOTS.relative_to(ROOT)} are what the results give")
    return 0


if __name__ == "__main__":
    sys.exit(main())
