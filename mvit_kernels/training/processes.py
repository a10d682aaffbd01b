# SPDX-License-Identifier: Apache-2.0
"""The processes of a training: one, or those that torchrun has started; and how they are interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Interruption", "Processes", "processes"]

_PATIENCE = timedelta(hours=2)  # of the others, while the first checks files or writes a checkpoint


class Processes(NamedTuple):
    """This process among all of them, and its device."""

    rank: int
    count: int  # type: ignore[assignment] # not tuple's method of this name
    local_count: int  # on this machine
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def share_state(self, model: nn.Module) -> None:
        """Give all processes the first one's weights and buffers."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun has started, if it has, until the block ends.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU for each process where there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that does not exist.
    """
    from ..zoo import checked_device

    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local, local_count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
    where = checked_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    joins = count > 1 and not dist.is_initialized()
    if joins:
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=where if backend == "nccl" else None)
    try:
        yield Processes(rank, count, local_count, where)
    finally:
        if joins:
            dist.destroy_process_group()


class Interruption:
    """Turns Ctrl-C and SIGTERM into a request that the loop meets between two steps; a second one ends it at once.

    Of several processes the first alone stops by itself, since the others could not know before which step: they wait
    until torchrun ends them, or until their next exchange with the first one fails.

    Example:
        >>> with Interruption() as interruption:
        ...     while not interruption.requested:
        ...         step()
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise KeyboardInterrupt
        self.requested = True
