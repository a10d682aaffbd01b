# SPDX-License-Identifier: Apache-2.0
"""What a step needs, in the order that works: model, weights, accelerate, optimizer, average, compile, DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import accelerate, report, restore
from .._utils.third_party import import_timm
from .processes import Processes
from .tasks import Task

__all__ = ["Parts", "Settings", "assemble", "autocast_dtype"]


@dataclass(frozen=True)
class Settings:
    """How a training runs on this machine; what it computes is in the `Recipe`.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that load images, for each training process; None for as many as there are processors, at
            most 8.
        accelerate: run the blocks on this package's operators; False for plain PyTorch, to compare.
        backend: the backend that must serve them; None for each call's own choice.
        channels_last: memory format of weights and images.
        sync_batch_norm: batch norms' statistics over all processes' images, on GPUs.
        compile: run the model through `torch.compile`.
        validation: share of the samples that is held back; see `Task.open`.
        annotations: the COCO file of boxes, where it is not in the folder of the samples (detection).
        save_seconds: a checkpoint at least this often, beside one after each epoch.
        tensorboard: write TensorBoard's events, if it is installed.
        progress: tell on the screen how it goes.
    """

    device: str = "auto"
    workers: int | None = None
    accelerate: bool = True
    backend: str | None = None
    channels_last: bool = True
    sync_batch_norm: bool = False
    compile: bool = False
    validation: float | None = None
    annotations: Path | None = None
    save_seconds: float = 120.0
    tensorboard: bool = True
    progress: bool = True


class Parts(NamedTuple):
    """What a step needs."""

    model: nn.Module  # bare: for parameters, checkpoints and evaluation
    wrapped: nn.Module  # compiled and under DDP: for the steps
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Any  # timm's ModelEmaV3, or None
    dtype: torch.dtype | None  # of autocast

    @property
    def evaluated(self) -> nn.Module:
        """The averaged weights, if there are any."""
        return self.model if self.average is None else self.average.module

    def autocast(self) -> contextlib.AbstractContextManager:
        device = next(self.model.parameters()).device.type
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(device, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training goes on from, apart from its place."""
        state = {"state_dict": dict(self.model.state_dict())}
        if self.average is not None:
            state["state_dict_ema"] = dict(self.average.module.state_dict())
        return {**state, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["state_dict"])
        if self.average is not None:
            self.average.module.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def assemble(
    task: Task,
    classes: Sequence[str],
    checkpoint: Path | None,
    settings: Settings,
    processes: Processes,
) -> Parts:
    """Build everything; equal seeds give equal weights on every process.

    Raises:
        As `Task.build` does; ValueError: an optimizer that timm does not know; ImportError: timm is not installed.
    """
    import_timm()
    from timm.utils import ModelEmaV3

    recipe = task.recipe
    torch.manual_seed(recipe.seed)
    model = task.build(classes, checkpoint)
    # Own models are accelerated from birth. What `accelerate` declines runs as plain PyTorch, and is told.
    model = accelerate(model, backend=settings.backend) if settings.accelerate else restore(model)
    if settings.accelerate:
        found = report(model)
        task.remarks.append(str(found) if found.declined or not found.blocks else str(found).partition("\n")[0])
    else:
        task.remarks.append("plain PyTorch, not accelerated")
    if settings.sync_batch_norm and processes.count > 1 and processes.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    model = model.to(processes.device, memory_format=layout).train()
    optimizer = _optimizer(task, model)
    average = ModelEmaV3(model, recipe.ema, use_warmup=recipe.ema_warmup) if recipe.ema else None
    wrapped = torch.compile(model) if settings.compile else model
    if processes.count > 1:
        places = [processes.device] if processes.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(wrapped, device_ids=places)
    dtype = autocast_dtype(recipe.amp, processes.device)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
    return Parts(model, wrapped, optimizer, scaler, average, dtype)


def _optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """timm's, with groups by decay and by head; timm's schedulers read ``lr_scale``."""
    from timm.optim import create_optimizer_v2

    recipe = task.recipe
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = recipe.decay_norms or parameter.ndim > 1
            groups.setdefault((decays, task.is_head(name)), []).append(parameter)
    try:
        return create_optimizer_v2(
            [
                {
                    "params": parameters,
                    "weight_decay": recipe.weight_decay if decays else 0.0,
                    "lr_scale": recipe.head_lr_factor if head else 1.0,
                }
                for (decays, head), parameters in groups.items()
            ],
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=tuple(recipe.betas),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"optimizer {recipe.optimizer!r}: timm.optim cannot make it ({error})") from error


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast that a recipe's `amp` means on this device; None for no autocast."""
    if amp == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None if amp is None else getattr(torch, amp)
