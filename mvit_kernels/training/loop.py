# SPDX-License-Identifier: Apache-2.0
"""The loop: steps, checkpoints and evaluations, on one process or on those that torchrun has started.

What is computed in a step depends on the recipe, the samples and the step's place alone (see `seeds`), so a training
that was killed at any moment, and resumed from its last checkpoint, has the losses of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._utils.files import write_text
from .._utils.third_party import import_timm
from . import outputs
from .assembly import Parts, Settings, assemble
from .loading import evaluation_loader, images_to, to_device, training_loader, training_sampler
from .logs import Board, Progress, Table
from .processes import Interruption, Processes, processes
from .recipe import Recipe, as_dict, to_yaml
from .resuming import check_identity, recipe_of
from .sampler import MultiScaleSampler
from .saving import BEST, LAST, check_space, prepare_folder, read_run, save
from .seeds import hash_of, seed_step
from .tasks import Task, task_of

__all__ = ["Settings", "Summary", "train"]

_FETCH_EVERY = 20  # steps whose losses are fetched from a GPU at once: each fetch waits for the GPU


@dataclass
class Summary:
    """How a training went.

    Attributes:
        output: its folder.
        best: figures of the best weights so far, with "epoch"; None where nothing was evaluated.
        epochs: how many are done.
        step: how many steps are done.
        seconds: of all its runs together.
        interrupted: whether Ctrl-C or SIGTERM ended it; the training continues with ``resume=True``.
        metric: the name of the figure that decided.
    """

    output: Path
    metric: str
    best: dict[str, float] | None = None
    epochs: int = 0
    step: int = 0
    seconds: float = 0.0
    interrupted: bool = False


@dataclass
class _Place:
    """Where the training is. After step k of an epoch, `batch` is k + 1."""

    epoch: int = 0
    batch: int = 0
    step: int = 0  # steps of all epochs
    updates: int = 0  # of the weights
    loss: float = 0.0  # sum over this epoch's steps
    seconds: float = 0.0
    best: dict[str, float] | None = None


def train(
    folder: str | os.PathLike[str],
    recipe: Recipe | None,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Settings | None = None,
    labels: Sequence[str] | None = None,
    new_head: bool | None = None,
) -> Summary:
    """Train on the samples in `folder`, and write everything to `output`.

    Example:
        >>> train("photos", read_recipe("finetune"), "runs/photos", checkpoint="mobilevit_xxs.pth").best
        {'epoch': 12, 'top1': 0.96, 'top5': 1.0, 'loss': 0.21}

    Args:
        folder: see the task, such as `mvit_kernels.training.tasks.classification.Classification`.
        recipe: what to compute; None with `resume` for that of the training.
        output: a folder that has no training in it; with `resume`, that of the training.
        checkpoint: weights to start from, in any layout that `mvit_kernels.load_checkpoint` reads.
        resume: continue where the last checkpoint was written.
        settings: how to run.
        labels: names of the checkpoint's classes, by index.
        new_head: replace the checkpoint's classifier even if it fits.

    Raises:
        ValueError, OSError, ImportError: before the first step, everything that can be found wrong by then.
        RuntimeError: a loss that is not finite; the last checkpoint is from before it.
    """
    output, settings = Path(output), settings or Settings()
    with processes(settings.device) as group, Interruption() as interruption:
        if group.first:
            prepare_folder(output, resume)
        group.barrier()
        state = read_run(output / LAST) if resume else None
        recipe = recipe_of(state, recipe)
        task = task_of(recipe)
        task.labels, task.new_head, task.annotations = labels, new_head, settings.annotations
        share = settings.validation if state is None or settings.validation is not None else state.get("validation")
        training, validation = task.open(Path(folder), validation=share)
        identity = {
            "classes": list(training.classes),
            "samples": len(training),
            "names": hash_of(*getattr(training, "names", ())),
            "world_size": group.count,
            "accelerate": settings.accelerate,
            "validation": share,
        }
        if state is not None:
            check_identity(state, identity)
        weights = Path(checkpoint) if checkpoint is not None and state is None else None
        if state is not None:
            weights = output / LAST  # builds the same network; its values are loaded below
            task.labels, task.new_head = None, False
        parts = assemble(task, training.classes, weights, settings, group)
        if group.first:
            check_space(output, sum(tensor.nbytes for tensor in parts.model.state_dict().values()))
        run = _Run(task, training, validation, parts, settings, group, output, identity, interruption)
        with contextlib.closing(run):
            run.begin(state)
            return run.run()


class _Run:
    """One process's part in one training."""

    def __init__(
        self,
        task: Task,
        training: Dataset,
        validation: Dataset,
        parts: Parts,
        settings: Settings,
        group: Processes,
        output: Path,
        identity: dict[str, Any],
        interruption: Interruption,
    ) -> None:
        self.task, self.recipe, self.parts, self.settings = task, task.recipe, parts, settings
        self.group, self.output, self.identity, self.interruption = group, output, identity, interruption
        self.sampler = training_sampler(self.recipe, training, group)
        self.loader = training_loader(task, training, self.sampler, settings, group)
        self.validation = evaluation_loader(task, validation, settings, group) if len(validation) else None
        self.classes, self.images = training.classes, len(training)
        self.schedule, self.updates_an_epoch = _schedule(task, parts, self.sampler)
        self.place = _Place()
        self.pending: list[tuple[dict[str, Any], Tensor]] = []  # rows whose losses are still on the device

    # ---------------------------------------------------------------------------------------------- begin and end

    def begin(self, state: dict[str, Any] | None) -> None:
        """Start anew, or where `state` was saved."""
        self.started = self.saved = time.perf_counter()
        if state is not None:
            self.parts.load_state_dict(state)
            names = ("epoch", "batch", "step", "updates", "loss", "seconds", "best")
            self.place = _Place(**{name: state[name] for name in names})
        self.seconds_before = self.place.seconds
        place, first = self.place, self.group.first
        self.log = self.epochs = self.board = None
        total = self.recipe.epochs * self.images
        self.progress = Progress(self.recipe.epochs, total, first and self.settings.progress)
        self.progress.set_done(place.epoch * self.images)
        if not first:
            return
        keep = None if state is None else place.step
        self.log = Table(self.output / "log.csv", "step", keep)
        self.epochs = Table(self.output / "epochs.csv", "epoch", None if state is None else place.epoch)
        self.board = Board(self.output / "tensorboard", keep, self.settings.tensorboard)
        if self.board.missing:
            self.task.remarks.append("no TensorBoard: it is not installed (pip install 'mvit_kernels[train]')")
        if state is None:
            write_text(self.output / "recipe.yaml", to_yaml(self.recipe))
            write_text(self.output / "classes.txt", "".join(f"{name}\n" for name in self.classes))
            self._save()  # so that a training can be resumed from its first moment on
        else:
            self.task.remarks.append(f"resumed at epoch {place.epoch + 1}, step {place.batch + 1}")
        for remark in self.task.remarks:
            self.progress.say(remark)

    def close(self) -> None:
        self.progress.close()
        for each in (self.log, self.epochs, self.board):
            if each is not None:
                each.close()

    def run(self) -> Summary:
        place = self.place
        try:
            while place.epoch < self.recipe.epochs and self._epoch():
                self._finish_epoch()
        except RuntimeError:  # an exchange with the first process, which has saved and stopped
            if self.group.first or not self.interruption.requested:
                raise
        interrupted = place.epoch < self.recipe.epochs
        return Summary(self.output, self.task.metric, place.best, place.epoch, place.step, self._seconds(), interrupted)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    # ---------------------------------------------------------------------------------------------------- an epoch

    def _epoch(self) -> bool:
        """The rest of this epoch's steps; False if it was interrupted."""
        place, sampler = self.place, self.sampler
        sampler.set_epoch(place.epoch, place.batch)
        self.parts.wrapped.train()
        for images, targets in self.loader:
            if self.group.first and self.interruption.requested and self._between_updates():
                self._save()
                return False
            self._step(images, targets, sampler.steps)
            if self._between_updates() and self.group.first:
                if time.perf_counter() - self.saved > self.settings.save_seconds:
                    self._save()
        self._fetch()
        return True

    def _between_updates(self) -> bool:
        return self.place.batch % self.recipe.accumulate == 0

    def _step(self, images: Tensor, targets: Any, steps: int) -> None:
        recipe, parts, place = self.recipe, self.parts, self.place
        seed_step(recipe.seed, place.step, self.group.rank)
        position = place.epoch * self.updates_an_epoch + place.batch * self.updates_an_epoch // steps
        self.schedule.step_update(position)
        images = images_to(images, self.group.device, self.settings.channels_last)
        targets = to_device(targets, self.group.device)

        first_of_update = place.batch - place.batch % recipe.accumulate
        parts_of_update = min(recipe.accumulate, steps - first_of_update)
        updates = place.batch + 1 == first_of_update + parts_of_update
        waits = not updates and parts.wrapped is not parts.model and hasattr(parts.wrapped, "no_sync")
        with parts.wrapped.no_sync() if waits else contextlib.nullcontext():
            with parts.autocast():
                losses = self.task.losses(parts.wrapped, images, targets)
            parts.scaler.scale(losses["loss"] / parts_of_update).backward()
        if updates:
            if recipe.clip_grad is not None:
                parts.scaler.unscale_(parts.optimizer)
                torch.nn.utils.clip_grad_norm_(parts.model.parameters(), recipe.clip_grad)
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
            place.updates += 1
            if parts.average is not None:
                parts.average.update(parts.model, step=place.updates)

        row = {
            **{"step": place.step, "epoch": place.epoch, "batch": place.batch, "images": len(images)},
            **{"height": images.shape[-2], "width": images.shape[-1]},
            "lr": parts.optimizer.param_groups[0]["lr"] / parts.optimizer.param_groups[0]["lr_scale"],
            **dict.fromkeys(losses),
        }
        self.pending.append((row, torch.stack([loss.detach().float() for loss in losses.values()])))
        place.batch, place.step = place.batch + 1, place.step + 1
        loss = self._fetch() if images.device.type == "cpu" or len(self.pending) >= _FETCH_EVERY else None
        self.progress.step(place.epoch, place.batch - 1, steps, len(images) * self.group.count, loss, row["lr"])

    def _fetch(self) -> float | None:
        """Log the losses that are still on the device; the last one.

        Raises:
            RuntimeError: one is not finite.
        """
        if not self.pending:
            return None
        rows, self.pending = self.pending, []
        for (row, _), losses in zip(rows, torch.stack([losses for _, losses in rows]).tolist(), strict=True):
            row.update(zip(list(row)[-len(losses) :], losses, strict=True))
            self.place.loss += row["loss"]
            if self.log is not None:
                self.log.add(row)
                self.board.add("train", {key: row[key] for key in list(row)[6:]}, row["step"])
            if not math.isfinite(row["loss"]):
                raise RuntimeError(
                    f"the loss is {row['loss']} at step {row['step']} (epoch {row['epoch'] + 1}); lower --lr, set "
                    f"clip_grad, or train without --amp; {self.output / LAST} is from before"
                )
        return row["loss"]

    def _finish_epoch(self) -> None:
        """Evaluate, keep the best weights, and save at the beginning of the next epoch."""
        place, start = self.place, time.perf_counter()
        row = {"epoch": place.epoch, "steps": self.sampler.steps, "train_loss": place.loss / self.sampler.steps}
        figures = self._evaluate()
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        if self.group.first:
            self.epochs.add({**row, **numbers})
            self.board.add("validation", numbers, place.step)
            self.board.add("speed", {"images_per_second": self.progress.rate}, place.step)
            told = "".join(f"  {name} {value:.4f}" for name, value in numbers.items())
            head = f"epoch {place.epoch + 1}/{self.recipe.epochs}  training loss {row['train_loss']:.4f}"
            self.progress.say(f"{head}  validation{told}" if told else head)
        if figures and (place.best is None or self._decides(numbers) > self._decides(place.best)):
            place.best = {"epoch": place.epoch, **numbers}
            if self.group.first:
                weights = {"state_dict": dict(self.parts.evaluated.state_dict())}
                save(self.output / BEST, {**self._described(), "figures": place.best, **weights})
                outputs.write_figures(self.output, figures, self.classes)
        place.epoch, place.batch, place.loss = place.epoch + 1, 0, 0.0
        if self.group.first:
            self._save()
        self.progress.pause(time.perf_counter() - start)

    def _decides(self, figures: dict[str, float]) -> float:
        """The task's metric; a figure that is not a number is worse than any."""
        value = figures.get(self.task.metric, math.nan)
        return -math.inf if math.isnan(value) else value

    def _evaluate(self) -> dict[str, Any]:
        if self.validation is None:
            return {}
        model = self.parts.evaluated
        self.group.share_state(model)
        was_training = model.training
        with torch.no_grad(), self.parts.autocast():
            figures = self.task.evaluate(model.eval(), self.validation, self.group.device)
        model.train(was_training)
        return figures

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _described(self) -> dict[str, Any]:
        return {"task": self.task.name, "recipe": as_dict(self.recipe), **self.identity}

    def _save(self) -> None:
        """Write last.pth, after the rows of the tables that it counts on."""
        self._fetch()
        self.log.sync()
        self.epochs.sync()
        place = self.place
        place.seconds = self._seconds()
        save(self.output / LAST, {**self._described(), **vars(place), **self.parts.state_dict()})
        self.saved = time.perf_counter()


def _schedule(task: Task, parts: Parts, sampler: MultiScaleSampler) -> tuple[Any, int]:
    """timm's cosine with warm-up over the updates of the whole training, and the updates an epoch.

    Epochs of the multi-scale sampler differ in length. The schedule counts each as long as the first one, so that its
    end is known from the start, and its value at a step depends on the step's place alone.
    """
    import_timm()
    from timm.scheduler import CosineLRScheduler

    recipe = task.recipe
    sampler.set_epoch(0)
    updates = math.ceil(sampler.steps / recipe.accumulate)
    total, warmup = updates * recipe.epochs, recipe.warmup_steps
    if warmup and warmup > total // 2:
        warmup = total // 10
        task.remarks.append(
            f"the warm-up of {recipe.warmup_steps} updates is cut to {warmup}: the whole training has {total}"
        )
    schedule = CosineLRScheduler(
        parts.optimizer,
        t_initial=max(1, total - warmup),
        lr_min=recipe.final_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return schedule, updates
