# SPDX-License-Identifier: Apache-2.0
"""Classification, detection and segmentation on small real sets, on accelerated blocks and in plain PyTorch.

    python examples/real_data.py DIR            (or: make examples DATA=DIR; DIR has land_use, raccoon and camvid)

Each network is trained twice from the same weights, with the same seed and the same samples: as ``mvit-kernels train``
does it, and in plain PyTorch. What it gets on the photos that it saw and on those held back is compared with what is
wanted, and the wall time stands beside. The exit code is 1 if a figure is below what is wanted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvit_kernels.training.evaluation import evaluate
from mvit_kernels.training.loop import Settings, train
from mvit_kernels.training.recipe import read_recipe
from mvit_kernels.training.seeds import held_back

CHECKPOINT = "land_use/mobilevit_xxs_land_use21.pth"  # MobileViT-XXS, from Apple's ImageNet weights
NORMALISED = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # as it was trained


class Case(NamedTuple):
    """One network and set."""

    folder: str  # below the data
    share: float  # of the samples that are held back, of each class
    recipe: str
    changes: dict[str, Any]
    metric: str
    wanted: dict[str, float]  # "seen" or "held back" -> least figure


CASES = {
    "classification": Case(
        "land_use/train",
        0.25,
        "finetune",
        # A new classifier: the checkpoint's own knows these photos' classes, and perhaps these photos.
        {"epochs": 8, "size": [224, 224], **NORMALISED},
        "top1",
        {"held back": 0.9},
    ),
    "detection": Case(
        "raccoon",
        1 / 3,
        "ssdlite_finetune",
        {
            "epochs": 60,
            "ema": None,
            "size": [224, 224],
            "lr": 1e-3,  # and no distortion: what it saw is to be learnt by heart
            "augmentation.ssd_crop": 0.0,
            "augmentation.photometric": 0.0,
            **NORMALISED,
        },
        "map50",
        {"seen": 0.9},
    ),
    "segmentation": Case(
        "camvid",
        0.25,
        "deeplabv3_finetune",
        {
            "epochs": 100,  # of two steps
            "ema": None,
            "clip_grad": 10.0,
            "size": [288, 384],
            "output_stride": 8,  # poles and signs are a few pixels wide
            "lr": 2e-3,
            "head_lr_factor": 2.0,
            "classifier_dropout": 0.0,
            "augmentation.short_side": [288, 288],
            "augmentation.photometric": 0.0,
            "augmentation.flip": 0.0,
            **NORMALISED,
        },
        "miou",
        {"seen": 0.8},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that has land_use, raccoon and camvid")
    parser.add_argument("--only", choices=CASES, action="append", help="one network (may be repeated)")
    parser.add_argument("--output", type=Path, default=Path("runs", "examples"), help="checkpoints, logs and results")
    parser.add_argument("--no-plain", action="store_true", help="leave out the trainings in plain PyTorch")
    args = parser.parse_args()
    if not (args.data / CHECKPOINT).exists():
        print(f"error: {args.data} has no {CHECKPOINT}; give the folder of the data sets", file=sys.stderr)
        return 2
    rows = []
    for name in args.only or CASES:
        for accelerated in (True,) if args.no_plain else (True, False):
            rows.append(run(name, args.data, args.output / name, accelerated))
            print(told(rows[-1]), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["reached"] for row in rows) else 1


def run(name: str, data: Path, output: Path, accelerated: bool) -> dict[str, Any]:
    """Train one network, and score it on what it saw and on what it did not."""
    case = CASES[name]
    output = output / ("accelerated" if accelerated else "plain")
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as split:
        seen, unseen = parts(data / case.folder, Path(split), case.share)
        settings = Settings(accelerate=accelerated, progress=False, validation=0.0)
        recipe = read_recipe(case.recipe, case.changes)
        start, cpu = time.perf_counter(), time.process_time()
        summary = train(seen, recipe, output, checkpoint=data / CHECKPOINT, settings=settings, new_head=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        figures = {
            when: evaluate(folder, output / "last.pth", settings=Settings(accelerate=accelerated)).figures[case.metric]
            for when, folder in (("seen", seen), ("held back", unseen))
            if folder is not None
        }
    return {
        "task": name,
        "form": "accelerated" if accelerated else "plain",
        "metric": case.metric,
        **figures,
        "reached": all(figures[when] >= least for when, least in case.wanted.items()),
        "steps": summary.step,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),  # of all threads, without the loader's processes
        "threads": torch.get_num_threads(),
    }


def parts(folder: Path, to: Path, share: float) -> tuple[Path, Path | None]:
    """Copies of the samples to train on, and of those held back, by the rule of ``mvit-kernels train``."""
    below = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".jpg", ".png")]
    photos = [path for path in below if "masks" not in path.parts]
    chosen: set[Path] = set()
    for where in {path.parent for path in photos}:
        own = sorted(path for path in photos if path.parent == where)
        chosen.update(own[index] for index in held_back([path.name for path in own], share))
    for path in [*below, *folder.rglob("*.xml")]:
        twin = path if "masks" not in path.parts else folder / "images" / path.name
        held = any(twin.with_suffix(suffix) in chosen for suffix in (".jpg", ".png"))
        target = to / ("held" if held else "seen") / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return to / "seen", to / "held" if chosen else None


def told(row: dict[str, Any]) -> str:
    figures = ", ".join(f"{when} {row[when]:.3f}" for when in ("seen", "held back") if when in row)
    verdict = "" if row["reached"] else "  BELOW WHAT IS WANTED"
    took = f"{row['steps']} steps in {row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU"
    return f"{row['task']:<15} {row['form']:<12} {row['metric']}: {figures}; {took}{verdict}"


if __name__ == "__main__":
    sys.exit(main())
