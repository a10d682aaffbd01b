# SPDX-License-Identifier: Apache-2.0
"""MobileViT-S and -XXS accelerated, frozen, verified on photographs and timed: ``mvit-kernels demo``.

It prints which blocks were swapped, the errors of every block and of the output against float64 next to PyTorch's own,
and a table of milliseconds, which is also written as CSV and as a plot into ``demo_results/``. It takes less than five
minutes on two cores: what does not fit into ``--budget`` is skipped, with a message.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import accelerate, freeze, report, verify
from .._utils.files import write_csv
from .._utils.third_party import import_timm
from ..zoo import calibrate, checked_device, load
from ..zoo.images import preprocess, sample_photos
from .comparison import compare
from .origin import environment
from .peers import PEERS, Subject
from .tables import Result, csv_rows, table
from .timing import interleave

FORMS = {  # candidate -> label in the table and the plot
    "eager": "eager",
    "channels_last": "eager, channels-last",
    "accelerated": "accelerated",
    "frozen": "frozen",
    "compile": "torch.compile",
}
_START = time.perf_counter()


class Setting(NamedTuple):
    """The parameters of one table."""

    model: str
    dtype: torch.dtype
    batch: int

    def __str__(self) -> str:
        return f"{self.model}, {str(self.dtype).removeprefix('torch.')}, batch {self.batch}"


def run(args: argparse.Namespace) -> int:
    """Run the demo with the arguments of `mvit_kernels.cli.demo`.

    Returns:
        The exit code: 0, or 1 if an error was larger than allowed or a candidate of ours did not run.

    Raises:
        ValueError: no photographs are installed, or arguments that do not fit together.
    """
    device = checked_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(args.threads or _threads())
    origin = environment(device)
    place = origin["device_name"] if device.type == "cuda" else f"{origin['device_name']}, threads: {origin['threads']}"
    _step(f"{place}, torch {origin['torch']}, Python {origin['python']}")
    photos = sample_photos()
    if not photos:
        raise ValueError("no sample photographs were found; pip install matplotlib scikit-learn, which ship some")
    images = torch.stack([preprocess(photo, args.size) for _, photo in photos]).to(device)
    _step(f"{len(photos)} photographs, {args.size} × {args.size} px: {', '.join(name for name, _ in photos)}")

    names = _names(args)
    models, right = {}, True
    for name in names:
        models[name] = _prepared(name, args.checkpoint, images)
        right &= _verified(name, models[name], images)

    on_gpu = device.type == "cuda"
    batches = args.batch or ([1, 64] if on_gpu else [1, 8])
    dtypes = [torch.float32, torch.bfloat16] if on_gpu else [torch.float32]
    settings = [Setting(name, dtype, batch) for batch in batches for dtype in dtypes for name in names]
    measured: dict[Setting, list[Result]] = {}
    rows: list[dict[str, Any]] = []
    for index, setting in enumerate(settings):
        subject = Subject(models[setting.model], _repeated(images, setting.batch), setting.dtype)
        left = args.budget - (time.perf_counter() - _START)
        results = _measured(setting, subject, measured, left, len(settings) - index)
        if results:
            measured[setting] = results
            rows += csv_rows(results, subject, setting.model, origin)
            right &= all(result.timing is not None for result in results if PEERS[result.candidate].ours)

    print("\n".join(_summary(measured)))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "demo.csv", rows)
    _step(f"the table: {folder / 'demo.csv'}")
    try:
        plot(measured, f"MobileViT, {args.size} px, {place}, torch {origin['torch']}", folder / "demo.png")
        _step(f"the plot:  {folder / 'demo.png'}")
    except ImportError as error:
        _step(f"no plot: {error}")
    _step(
        "every error is allowed"
        if right
        else "AN ERROR IS LARGER THAN ALLOWED, or accelerated or frozen did not run: see above"
    )
    return 0 if right else 1


# ------------------------------------------------------------------------------------------------------------- steps


def _threads() -> int:
    """PyTorch's default number of threads, or 1 if that is faster at the moment.

    OpenMP threads wait for each other after every layer. If other processes occupy the cores, each wait takes a time
    slice: a forward pass of 60 ms was observed to take two seconds on two threads, and 100 ms on one.
    """
    usual = torch.get_num_threads()
    x, weight = torch.rand(1024, 192, device="cpu"), torch.rand(384, 192, device="cpu")

    def layers(count: int) -> None:
        torch.set_num_threads(count)
        for _ in range(5):
            torch.nn.functional.silu(torch.nn.functional.linear(x, weight))

    counts = {str(count): count for count in (usual, 1)}
    calls = {name: functools.partial(layers, count) for name, count in counts.items()}
    times = interleave(calls, rounds=9, warmup_seconds=0.05)
    best = min(times, key=lambda name: times[name].median)
    if counts[best] != usual:
        slower, faster = times[str(usual)].median, times[best].median
        _step(f"other processes use this machine, so 1 thread is used: {faster:.0f} ms, not {slower:.0f} with {usual}")
    return counts[best]


def _names(args: argparse.Namespace) -> list[str]:
    if args.checkpoint and len(args.model or ()) != 1:
        raise ValueError("--checkpoint requires exactly one --model, the one it belongs to")
    if args.model:
        return args.model
    try:
        import_timm()
        return ["mobilevit_s", "mobilevit_xxs"]
    except ImportError as error:
        _step(f"using this package's own models instead of timm's: {error}")
        return ["own/s", "own/xxs"]


def _prepared(name: str, checkpoint: str | None, images: Tensor) -> nn.Module:
    """The model; without a checkpoint its batch norms get the statistics of the photographs."""
    model = load(name, checkpoint=checkpoint, device=str(images.device))
    if checkpoint:
        _step(f"{name}: weights of {checkpoint}")
    else:
        calibrate(model, views(images))
        _step(f"{name}: random weights (nothing is downloaded), batch norms with the photographs' statistics")
    return model


def views(images: Tensor) -> list[Tensor]:
    """The images as they are, and flipped horizontally, vertically, and both ways."""
    return [images, images.flip(3), images.flip(2), images.flip(2, 3)]


def _verified(name: str, model: nn.Module, images: Tensor) -> bool:
    """Accelerate and freeze copies of the model, print reports and errors; return whether all errors are allowed."""
    fast = accelerate(copy.deepcopy(model))
    print(_indented(str(report(fast))))
    _step(f"{name}: errors of the accelerated model against float64, compared with PyTorch's own")
    accelerated = verify(fast, images, reference=model)
    print(_indented(str(accelerated)))
    frozen = freeze(fast)
    print(_indented(str(frozen.freeze_report)))
    _step(f"{name}: errors of the frozen model against float64, compared with PyTorch's own")
    inference = verify(frozen, images, reference=model)
    print(_indented(str(inference)))
    return accelerated.ok and inference.ok


def _measured(
    setting: Setting, subject: Subject, earlier: dict[Setting, list[Result]], left: float, tables: int
) -> list[Result]:
    """One table, within the `left` seconds for it and the `tables - 1` after it; empty if there is no time."""
    print()
    first = setting.batch == min(s.batch for s in (setting, *earlier))
    reserve = 25.0 * (tables - 1)  # what a table takes on two busy cores, without compiling
    if not first and left < 30:
        _step(f"{setting}: skipped, --budget is nearly spent")
        return []
    # torch.compile takes about as long for every batch size, and for S as for XXS, which have equally many layers: an
    # earlier table tells whether to begin at all.
    forms = list(FORMS)
    compile_seconds = left - reserve - 30
    compiled = [result for results in earlier.values() for result in results if result.candidate == "compile"]
    if compile_seconds < max((1.3 * result.build_seconds for result in compiled), default=10.0):
        forms.remove("compile")
    results = compare(
        subject,
        forms,
        seconds=max(2.0, min(12.0, left / tables / 2)),
        build_seconds=max(compile_seconds, 10.0),
        progress=lambda step: _step(f"{setting}: {step}"),
    )
    if "compile" not in forms:
        results.append(Result("compile", note="skipped: compiling would not fit into --budget"))
    print(_indented(table([result._replace(candidate=FORMS[result.candidate]) for result in results])))
    return results


def _repeated(images: Tensor, batch: int) -> Tensor:
    """The photographs, repeated to a batch of `batch`."""
    return images[torch.arange(batch, device=images.device) % len(images)]


def _summary(measured: dict[Setting, list[Result]]) -> list[str]:
    lines = ["", "how many times as fast as eager PyTorch:"]
    for setting, results in measured.items():
        ratios = [f"{FORMS[r.candidate]} {r.ratio:.2f}" for r in results[1:] if r.ratio is not None]
        lines.append(f"  {setting}: {', '.join(ratios)}")
    return lines


# -------------------------------------------------------------------------------------------------------------- plot


def plot(measured: dict[Setting, list[Result]], title: str, path: Path) -> None:
    """Draw bars of milliseconds, one panel per table, and write them as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    colours = {"eager": "#7f7f7f", "channels_last": "#b0b0b0", "compile": "#e08a2e"}
    rows = list(dict.fromkeys(setting.model for setting in measured))
    columns = list(dict.fromkeys((setting.dtype, setting.batch) for setting in measured))
    figure = Figure(figsize=(1.5 + 5.5 * len(columns), 1.0 + 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.suptitle(f"{title}\nmedian ms a call, 20th to 80th percentile, and how many times as fast as eager PyTorch")
    for panel in axes.flat:
        panel.set_visible(False)
    for setting, results in measured.items():
        panel = axes[rows.index(setting.model), columns.index((setting.dtype, setting.batch))]
        panel.set_visible(True)
        panel.set_title(str(setting), fontsize=10)
        slowest = max((result.timing.p80 for result in results if result.timing), default=1.0)
        for index, result in enumerate(results):
            timing = result.timing
            if timing is None:
                panel.text(0.01 * slowest, index, result.note[:60], va="center", fontsize=8, style="italic")
                continue
            spread = [[timing.median - timing.p20], [timing.p80 - timing.median]]
            panel.barh(index, timing.median, color=colours.get(result.candidate, "#2e6fb0"), height=0.7)
            panel.errorbar(timing.median, index, xerr=spread, color="black", linewidth=1, capsize=2)
            number = f"{timing.median:.0f}" if timing.median >= 100 else f"{timing.median:.3g}"
            text = f"{number} ms" + (f"   {result.ratio:.2f}×" if result.ratio is not None else "")
            panel.text(timing.p80 + 0.02 * slowest, index, text, va="center", fontsize=9)
        panel.set_yticks(range(len(results)), [FORMS[result.candidate] for result in results], fontsize=9)
        panel.set_ylim(len(results) - 0.5, -0.5)
        panel.set_xlim(0, 1.38 * slowest)  # leaves room for the numbers next to the bars
        panel.set_xlabel("ms", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------ output


def _step(text: str) -> None:
    print(f"[{time.perf_counter() - _START:6.1f} s] {text}", flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
