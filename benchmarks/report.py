# SPDX-License-Identifier: Apache-2.0
"""Figures and plots of README.md and docs/benchmarks.md from the committed CSV alone. ``make report`` runs this.

    python benchmarks/report.py            # rewrite both between their markers, and benchmarks/plots/
    python benchmarks/report.py --check    # change nothing; exit with 1 where a text is not what the CSV gives

It reads the newest rows of each subject in ``benchmarks/results/<device>/`` (see `mvit_kernels.bench.results`). All
candidates in a row of a table were timed in turns in one process. Missing values are left empty; rows in which another
candidate is faster are kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import operator_plots
import plots
from tables import (
    DTYPES,
    FIRST_SCREEN,
    NAMES,
    NETWORKS,
    OTHERS,
    OURS,
    Line,
    Setting,
    Table,
    first_screen,
    label,
    place,
    tables,
)

from mvit_kernels.bench import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "plots"
HEADLINE = {"cpu": ("float32", "1"), "cuda": ("bfloat16", "256")}  # dtype and batch of the headline sentence
INFERENCE = {"cpu": ("1",), "cuda": ("1", "256")}  # batches of the headline table: a GPU's latency, and its throughput
STACKS = {  # candidates of the transformer on a GPU
    "eager": "eager",
    "cuda": "one launch",
    "cuda_mended": "one launch, library mended",
    "cuda_by_operator": "CUDA by operator",
    "triton_by_operator": "Triton by operator",
}
TRAINING = {"cpu": ("float32", "8"), "cuda": ("bfloat16", "64")}  # of the headline table's steps


def folders(root: Path) -> list[Path]:
    """The result folders that have rows of the suite ``models``, GPUs first."""
    found = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and tables(folder, "models")]
    return sorted(found, key=lambda folder: not _is_gpu(folder))


def _is_gpu(folder: Path) -> bool:
    return tables(folder, "models")[0].any["device"] == "cuda"


# ------------------------------------------------------------------------------------------------------------- words


def milliseconds(value: float) -> str:
    """The value with three significant digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(slow: float, fast: float) -> str:
    return f"{slow / fast:.2f}×"


def sentence(root: Path) -> str:
    """The speedup in one sentence, for the headline setting of each machine."""
    parts: list[str] = []
    before = None
    for folder in folders(root):
        for setting, table in first_screen(folder).items():
            line, ours, other = table.any, table.best(OURS), table.best(OTHERS)
            now = (line["dtype"], line["batch"])
            if setting.subject != FIRST_SCREEN[0] or setting.kind or now != HEADLINE[line["device"]] or not ours:
                continue
            gain, lead = times(table.ms("eager"), table.ms(ours)), times(table.ms(other), table.ms(ours))
            where = f"on {place(line)}" if now == before else f"in {now[0]} at batch {now[1]} on {place(line)}"
            if parts:
                parts.append(f"{where}, {NAMES[ours]}, {gain} and {lead} ({NAMES[other]})")
            else:
                parts.append(
                    f"{where}, timm's MobileViT-S {NAMES[ours]} is {gain} as fast as eager PyTorch and {lead} as fast "
                    f"as {NAMES[other]}, the fastest of the others"
                )
            before = now
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else "Nothing was measured yet."


def headline_table(machines: list[dict[Setting, Table]]) -> list[str]:
    """A line a setting, a column a machine: ours, the fastest of the others, and eager; the fastest first."""
    machines = [{s: t for s, t in each.items() if _in_the_table(t.any)} for each in machines]
    machines = [each for each in machines if each]
    names = [label(next(iter(each.values())).any) for each in machines]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for setting in sorted({setting for each in machines for setting in each}):
        cells = [_fastest_first(each[setting]) if setting in each else "not measured" for each in machines]
        what = f"{setting.label}, {DTYPES[setting.dtype]}" + (", training step" if setting.kind else "")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def _in_the_table(line: Line) -> bool:
    if line["mode"] == "inference":
        return line["batch"] in INFERENCE[line["device"]]
    return (line["dtype"], line["batch"]) == TRAINING[line["device"]]


def _fastest_first(table: Table) -> str:
    names = {name for name in ("eager", table.best(OTHERS), table.best(OURS)) if name}
    first, *rest = (f"{NAMES[name]} {milliseconds(table.ms(name))}" for name in sorted(names, key=table.ms))
    text = ", ".join([f"**{first}**", *rest])
    # What would hide a loss if it were left out: a competitor that was not there, and an own candidate that failed.
    if table.any["device"] == "cuda" and not any(table.ms(name) for name in OTHERS if name.startswith("compile")):
        text += "; torch.compile was not measured"
    return text + "".join(f"; {NAMES[name]} **failed**: {why}" for name in OURS if (why := table.failure(name)))


def full_tables(heading: str, found: list[Table]) -> list[str]:
    """A table a dtype, each below a heading: ms of every candidate that was timed, and its speedup over eager."""
    lines = []
    for dtype in dict.fromkeys(t.any["dtype"] for t in found):
        group = [t for t in found if t.any["dtype"] == dtype]
        names = dict.fromkeys(("eager", *OURS, *OTHERS))
        names = [name for name in names if any(t.ms(name) or t.failure(name) for t in group)]
        lines += [f"### {heading}, {dtype}", ""]
        lines += [f"| | {' | '.join(NAMES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for table in group:
            cells = [_cell(table, name) for name in names]
            fastest = table.best(names)
            cells = [f"**{cell}**" if name == fastest else cell for name, cell in zip(names, cells, strict=True)]
            lines.append(f"| {table.label} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(table: Table, name: str, unit: float = 1.0) -> str:
    """Its time in milliseconds, or in 1 / `unit` of one, and its speedup over eager; "failed" if it raised an error."""
    ms, eager = table.ms(name), table.ms("eager")
    text = ("failed" if table.failure(name) else "") if ms is None else milliseconds(unit * ms)
    return text if ms is None or eager is None or name == "eager" else f"{text} ({times(eager, ms)})"


def mobile(found: list[Table]) -> list[str]:
    """A table of the paper's protocol: milliseconds of every form and runtime, the fastest of each network in bold."""
    if not found:
        return []
    names = [name for name in NAMES if any(table.ms(name) for table in found)]
    names.sort(key=lambda name: -sum(table.ms(name) is not None for table in found))  # of all networks first
    heads = [f"{NETWORKS.get(t.any['subject'], t.any['subject'])}, {t.any['size']} px" for t in found]
    best = [table.best(names) for table in found]
    lines = [
        "### The paper's protocol",
        "",
        "100 calls at batch 1 in float32, all taking turns; milliseconds, medians.",
        "",
    ]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        cells = ["" if table.ms(name) is None else milliseconds(table.ms(name)) for table in found]
        cells = [f"**{cell}**" if name == one else cell for cell, one in zip(cells, best, strict=True)]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return [*lines, ""]


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
        f"A call's fixed cost on one thread: {raw:.1f} µs for the raw C++ operator on four tokens, "
        f"{public - raw:.1f} µs for the checks and the choice of a backend, {function - raw:.1f} µs for "
        f"autograd around it; `torch.add` takes {us['torch.add', '', 'forward']:.1f} µs.",
    ]


def operators_table(found: list[Table]) -> list[str]:
    """The roofline's points: eager and each backend of ours, and what the fastest reaches of the machine's rates."""
    first = found[0].any
    ours = [name for name in operator_plots.BACKENDS if any(t.ms(name) for t in found)]
    heads = ours if len(ours) > 1 else ["ours"]
    reach = "ours reach" if len(ours) == 1 else "the fastest of ours reaches"
    lines = [
        f"MobileViT-S at 256 px, inference, {first['dtype']}, batch {first['batch']}: microseconds a call, and what "
        f"{reach} of the machine's fastest large product and of its copy beyond the caches.",
        "",
        f"| operator, stage | eager | {' | '.join(heads)} | of the product | of the copy |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for table in found:
        line, fastest = table.lines[table.best(operator_plots.BACKENDS)], table.best(["eager", *ours])
        cells = [_cell(table, name, 1e3) for name in ("eager", *ours)]
        cells = [f"**{cell}**" if n == fastest else cell for n, cell in zip(("eager", *ours), cells, strict=True)]
        cells += [
            f"{float(line[name]):.0f} %" if line[name] else "" for name in ("percent_product", "percent_bandwidth")
        ]
        lines.append(f"| `{line['subject']}`, {line['stage'][-1]} | {' | '.join(cells)} |")
    return lines


def stacks_table(operators: list[Table]) -> list[str]:
    """Ways to run a stack of layers on a GPU: one launch, or operator by operator; nothing without such rows."""
    found = [t for t in operators if t.any["subject"] == "transformer" and t.any["stage"].startswith("s/")]
    found = [t for t in found if any(name in t.lines for name in STACKS if name not in ("eager", "cuda"))]
    if not found:
        return []
    names = [name for name in STACKS if any(t.ms(name) or t.failure(name) for t in found)]
    first = found[0].any
    lines = [
        f"Stacks of layers of MobileViT-S at 256 px, inference, {first['dtype']}: microseconds a call.",
        "",
        f"| stage, batch | {' | '.join(STACKS[name] for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for table in found:
        cells = [_cell(table, name, 1e3) for name in names]
        fastest = table.best(names) if sum(table.ms(name) is not None for name in names) > 1 else None
        cells = [f"**{cell}**" if name == fastest else cell for name, cell in zip(names, cells, strict=True)]
        lines.append(f"| {table.any['stage'][-1]}, {table.any['batch']} | {' | '.join(cells)} |")
    return [*lines, ""]


# ---------------------------------------------------------------------------------------------------------- sections


def headline(root: Path = RESULTS) -> str:
    """README.md's section: a sentence, the chart and a small table."""
    lines = [
        sentence(root),
        "",
        "![Speed of MobileViT in all its forms, relative to eager PyTorch](benchmarks/plots/headline.png)",
        "",
        "Milliseconds a call at 256 px, medians: the fastest of ours, the fastest of the others and eager PyTorch, "
        "sorted, the **first** in bold. [All that was measured](docs/benchmarks.md).",
        "",
        *headline_table([first_screen(folder) for folder in folders(root)]),
    ]
    return "\n".join(lines)


def detail(root: Path = RESULTS) -> str:
    """The section of docs/benchmarks.md: for each machine every candidate, the operators and the plots."""
    found = folders(root)
    lines = [
        "![Speed of MobileViT in all its forms, relative to eager PyTorch](../benchmarks/plots/headline.png)",
        "",
        *([] if any(_is_gpu(folder) for folder in found) else ["There are no rows of a GPU yet.", ""]),
    ]
    for folder in found:
        lines += [*machine(folder), ""]
    return "\n".join(lines).rstrip()


def machine(folder: Path) -> list[str]:
    """All that is known of one machine."""
    networks, steps = tables(folder, "models"), tables(folder, "training")
    line = networks[0].any
    commits = ", ".join(dict.fromkeys(t.any["commit"] for t in [*networks, *steps]))
    dates = sorted({t.any["date"][:10] for t in [*networks, *steps]})
    libraries = f", {line['libraries'].replace('; ', ', ')}" if line["libraries"] else ""
    driver = f", driver {line['driver']}" if line["driver"] else ""
    name = line["device_name"] if line["device"] == "cuda" else place(line)
    host = f"{line['isa']} on the CPU ({line['cpu']}), " if line["cpu"] else ""  # of a GPU it may not be recorded
    triton = f", Triton {line['triton']}" if line["device"] == "cuda" and line["triton"] else ""
    about = folder / "about.md"
    lines = [
        f"## {name[0].upper()}{name[1:]}",
        "",
        f"{host}torch {line['torch']}{triton}{driver}{libraries}; commit {commits}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Spreads, errors and memory: "
        f"[`benchmarks/results/{folder.name}`](../benchmarks/results/{folder.name}).",
        "",
        *([about.read_text(encoding="utf-8").strip(), ""] if about.exists() else []),
        *full_tables("Inference", networks),
        *mobile(tables(folder, "mobile")),
        *full_tables("Training step", steps),
    ]
    operators = tables(folder, "operators")
    for kind, alt in operator_plots.KINDS.items():
        if operator_plots.has(kind, operators):
            heading = ["### Operators", ""] if "### Operators" not in lines else []
            lines += [*heading, f"![{alt}](../benchmarks/plots/{kind}-{folder.name}.png)", ""]
            if kind == "roofline":
                lines += [*operators_table(operator_plots.under_the_roof(operators)), "", *stacks_table(operators)]
    return [*lines, *boundary(folder)]


def rewritten(text: str, name: str, body: str, file: str = "README.md") -> str:
    """The text of a file with its generated section replaced.

    Raises:
        ValueError: a marker is missing.
    """
    pattern = re.compile(rf"(<!-- report: {name} -->\n).*?(<!-- end of report: {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{file} has no marker <!-- report: {name} -->; put both of its lines back")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def written(root: Path = ROOT, results_folder: Path = RESULTS) -> dict[Path, str]:
    """The whole text of each file that has a generated section."""
    sections = {"README.md": ("headline", headline), "docs/benchmarks.md": ("detail", detail)}
    return {
        root / file: rewritten((root / file).read_text(encoding="utf-8"), name, make(results_folder), file)
        for file, (name, make) in sections.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and exit with 1 where a file is outdated")
    args = parser.parse_args()
    outdated = {path: text for path, text in written().items() if path.read_text(encoding="utf-8") != text}
    if args.check:
        for path in outdated:
            print(f"{path.relative_to(ROOT)} is not what the committed results give: make report", file=sys.stderr)
        return int(bool(outdated))
    for path, text in outdated.items():
        path.write_text(text, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    plots.headline([first_screen(folder) for folder in folders(RESULTS)], PLOTS / "headline.png")
    for folder in folders(RESULTS):
        for kind in operator_plots.KINDS:
            if operator_plots.has(kind, tables(folder, "operators")):
                operator_plots.draw(kind, folder, PLOTS / f"{kind}-{folder.name}.png")
    print(f"README.md, docs/benchmarks.md and {PLOTS.relative_to(ROOT)} are what the results give")
    return 0


if __name__ == "__main__":
    sys.exit(main())
