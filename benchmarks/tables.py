# SPDX-License-Identifier: Apache-2.0
"""The newest results of a device as tables, from which the report's text and plots are made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mvit_kernels.bench import results

OURS = {
    "accelerated": "accelerated",
    "frozen": "frozen",
    "runtime": "frozen, without PyTorch",
    "compile_accelerated": "accelerated, compiled",
}
OTHERS = {
    "eager": "eager",
    "channels_last": "channels-last",
    "compile": "torch.compile",
    "compile_channels_last": "torch.compile, channels-last",
    "compile_freezing": "torch.compile, freezing",
    "compile_reduce_overhead": "torch.compile, reduce-overhead",
    "compile_max_autotune": "torch.compile, max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino_by_image": "OpenVINO by image",
    "onnxruntime_exported": "ONNX Runtime, our export",
    "openvino_exported": "OpenVINO, our export",
    "ncnn": "ncnn, our export",
    "litert": "LiteRT, our export",
    "executorch": "ExecuTorch, our export",
}
NAMES = OTHERS | OURS
NETWORKS = {"mobilevit_s": "S", "mobilevit_xs": "XS", "mobilevit_xxs": "XXS", "mobilenetv2_100": "MobileNetV2"}
FIRST_SCREEN = ("mobilevit_s", "mobilevit_xxs")
MODES = {"inference": "Inference", "step": "Training step"}
DTYPES = ("float32", "bfloat16")
LIBRARIES = {"huggingface": "Hugging Face's", "kornia": "Kornia's", "own": "our"}

Line = dict[str, str]


class Table(NamedTuple):
    """The lines of one subject that were timed in turns, by candidate; including those without times."""

    lines: dict[str, Line]

    @property
    def any(self) -> Line:
        return next(iter(self.lines.values()))

    def ms(self, candidate: str) -> float | None:
        text = self.lines.get(candidate, {}).get("median_ms")
        return float(text) if text else None

    def ratio(self, candidate: str) -> float | None:
        """How many times as fast as eager; None if one of the two was not timed."""
        ms, eager = self.ms(candidate), self.ms("eager")
        return None if ms is None or eager is None else eager / ms

    def failure(self, candidate: str) -> str | None:
        """Why it raised an error where it was to be timed, in a few words; None if it did not, or was not tried."""
        _, failed, why = self.lines.get(candidate, {}).get("note", "").partition("not measured: ")
        return re.sub(r"^\w+Error: ", "", why.partition(";")[0]) if failed else None

    def best(self, names: Iterable[str]) -> str | None:
        """The fastest of `names`; None if none was timed."""
        timed = [name for name in names if self.ms(name)]
        return min(timed, key=self.ms, default=None)

    @property
    def label(self) -> str:
        """What it is beside others of its mode and dtype, at 256 px unless it says so."""
        line = self.any
        library, slash, variant = line["subject"].rpartition("/")
        name = f"{LIBRARIES.get(library, library)} {variant.upper()}" if slash else NETWORKS.get(variant, variant)
        what = f"{name}, batch {line['batch']}" + (f", {line['size']} px" if line["size"] != "256" else "")
        what += ", whole recipe step" if line["mode"] == "recipe" else ""
        return what + (", device's clock" if line["clock"] == "graph" else "")


def tables(folder: Path, suite: str) -> list[Table]:
    """The newest tables of a suite in the order of the file, without the machine's own rates."""
    path = folder / f"{suite}.csv"
    lines = results.latest(results.read(path)) if path.exists() else []
    found: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        if line["suite"] == suite and line["subject"] != "machine":
            found.setdefault(results.key(line, (*results.SUBJECT, "clock")), {})[line["candidate"]] = line
    return [Table(group) for group in found.values()]


class Setting(NamedTuple):
    """What the first screen compares machines in; sorts in its order."""

    kind: int  # index in MODES
    dtype: int  # index in DTYPES
    subject: str
    batch: int

    @property
    def heading(self) -> str:
        return f"{list(MODES.values())[self.kind]}, {DTYPES[self.dtype]}"

    @property
    def label(self) -> str:
        return f"{NETWORKS[self.subject]}, batch {self.batch}"


def first_screen(folder: Path) -> dict[Setting, Table]:
    """What the first screen shows of a machine: timm's S and XXS, plain calls at small and usual batches."""
    wanted = {"subject": FIRST_SCREEN, "mode": MODES, "dtype": DTYPES, "batch": ("1", "8", "64", "256")}
    wanted |= {"size": ("256",), "clock": ("wall",)}
    found = {}
    for table in (t for suite in ("models", "training") for t in tables(folder, suite)):
        line = table.any
        if table.ms("eager") and all(line[name] in values for name, values in wanted.items()):
            kind, dtype = list(MODES).index(line["mode"]), DTYPES.index(line["dtype"])
            found[Setting(kind, dtype, line["subject"], int(line["batch"]))] = table
    return found


def place(line: Line) -> str:
    """The device as a phrase for sentences and titles."""
    if line["device"] == "cuda":
        return f"one {line['device_name']}"
    generation = line["cpu"].partition(": ")[2] or line["cpu"]
    return f"{threads(line)} of an {line['device_name'].replace('(R)', '').removesuffix(' Processor')}" + (
        f" ({generation})" if generation else ""
    )


def threads(line: Line) -> str:
    return "1 thread" if line["threads"] == "1" else f"{line['threads']} threads"


def short_place(line: Line) -> str:
    """The device as a short label: "H200", "AMD Zen 5", "Intel Emerald Rapids"."""
    if line["device"] == "cuda":
        return line["device_name"].removeprefix("NVIDIA ")
    vendor = re.match(r"\w+", line["device_name"])
    generation = line["cpu"].partition(": ")[2] or line["cpu"]
    return f"{vendor[0]} {generation}" if vendor and generation else "CPU"


def label(line: Line) -> str:
    """The device as a heading: "H200", "AMD Zen 5, 2 threads"."""
    return short_place(line) + (f", {threads(line)}" if line["device"] == "cpu" else "")
