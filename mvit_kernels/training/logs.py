# SPDX-License-Identifier: Apache-2.0
"""What a training tells: CSV tables that a resumed training continues, TensorBoard, and progress on the screen."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._utils.files import write_whole

__all__ = ["Board", "Progress", "Table"]


class Table:
    """A CSV file that grows by rows, and from which rows behind a resumed place are cut off.

    Its values depend on the training alone, not on the clock: an interrupted and resumed training writes the same
    bytes as an uninterrupted one.

    Args:
        path: the file.
        key: the column that rows are in the order of, such as "step".
        keep: rows whose key is below are kept, the others cut off; None to begin anew.
    """

    def __init__(self, path: Path, key: str, keep: int | None) -> None:
        self.path, self.key = path, key
        self.columns: list[str] | None = None
        if keep is not None and path.exists():
            self._cut(keep)
        # Line by line, so that `tail -f` follows.
        self._file = path.open("w" if keep is None else "a", 1, newline="", encoding="utf-8")

    def _cut(self, keep: int) -> None:
        # A row that was half written when the process was killed has no newline.
        lines = [line for line in self.path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            self.path.write_text("")
            return
        self.columns = next(csv.reader(lines[:1]))
        place = self.columns.index(self.key)
        kept = [line for line in lines[1:] if int(next(csv.reader([line]))[place]) < keep]
        with write_whole(self.path) as file:
            file.write("".join(lines[:1] + kept).encode("utf-8"))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; the first one names the columns."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if self.columns is None:
            self.columns = list(row)
            writer.writerow(self.columns)
        writer.writerow([row.get(column, "") for column in self.columns])
        self._file.write(text.getvalue())

    def sync(self) -> None:
        """Bring the rows to the disk: before a checkpoint that says they are there."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard's events in `folder`, or nothing where TensorBoard is not installed or not wanted."""

    def __init__(self, folder: Path, purge_step: int | None, wanted: bool) -> None:
        self.missing, self._writer = False, None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.missing = True
            return
        self._writer = SummaryWriter(folder, purge_step=purge_step)

    def add(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Append the numbers among `values` as group/name."""
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Progress:
    """Loss, learning rate, images a second and the time left: a bar on a terminal, elsewhere a line now and then.

    Args:
        epochs: of the whole training.
        images: of the whole training, on all processes.
        wanted: False for silence.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(self, epochs: int, images: int, wanted: bool = True, every: float = 10.0) -> None:
        self.epochs, self.images, self.every = epochs, images, every
        self._wanted, self._bar = wanted, None
        self._start = self._told = time.perf_counter()
        self.done = self._start_done = self._told_done = 0
        self.rate = math.nan
        if wanted and sys.stderr.isatty():
            self._bar = self._make_bar()

    def _make_bar(self) -> Any:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return None
        text = "[bold]{task.description}[/] {task.fields[figures]}"
        columns = TextColumn(text), BarColumn(None), TextColumn("{task.percentage:.0f} %")
        bar = Bar(*columns, console=Console(stderr=True))
        self._task = bar.add_task("", total=self.images, completed=self.done, figures="")
        bar.start()
        return bar

    def step(self, epoch: int, step: int, steps: int, images: int, loss: float | None, lr: float) -> None:
        """One step is done: `step` of `steps` in `epoch`, all from 0, with `images` on all processes."""
        self.done += images
        now = time.perf_counter()
        often = 0.5 if self._bar else self.every
        if now - self._told < often and step + 1 < steps:
            return
        rate = (self.done - self._told_done) / max(now - self._told, 1e-9)
        self.rate = rate if math.isnan(self.rate) else 0.7 * self.rate + 0.3 * rate
        self._told, self._told_done = now, self.done
        overall = (self.done - self._start_done) / max(now - self._start, 1e-9)
        left = duration(max(self.images - self.done, 0) / overall)
        shown = "" if loss is None else f"loss {loss:.4f}  "
        figures = f"{shown}lr {lr:.2e}  {self.rate:.1f} images/s  {left} left"
        head = f"epoch {epoch + 1}/{self.epochs}"
        if self._bar:
            self._bar.update(self._task, completed=self.done, description=head, figures=figures)
        elif self._wanted:
            print(f"{head}  step {step + 1}/{steps}  {figures}", file=sys.stderr, flush=True)

    def set_done(self, images: int) -> None:
        """Begin behind this many images."""
        self.done = self._start_done = self._told_done = images

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._wanted:
            print(text, file=sys.stderr, flush=True)

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on other things than steps."""
        self._start += seconds
        self._told += seconds

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 10 s``, ``5 h 02 min``, ``2 d 03 h``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    for big, small, names in ((60, 1, ("min", "s")), (3600, 60, ("h", "min")), (86400, 3600, ("d", "h"))):
        if seconds < big * (60 if big == 60 else 24) or big == 86400:
            return f"{seconds // big} {names[0]} {seconds % big // small:02} {names[1]}"
    raise AssertionError  # the last line always returns
