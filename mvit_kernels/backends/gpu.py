# SPDX-License-Identifier: Apache-2.0
"""What the two GPU backends ask about the GPUs: whether they can be used, and their limits. Nothing is launched."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .._utils.compiling import assume_constant_result

CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores and asynchronous copies


def no_gpu() -> str:
    """Why NVIDIA GPUs cannot be used: there is none, or one of them is too old; "" if all of them can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU, or this build of PyTorch has no CUDA"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(index)
        if found < CAPABILITY:
            return (
                f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability {found[0]}.{found[1]}; "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} is wanted"
            )
    return ""


def capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capabilities of the GPUs here, each once; none without a GPU."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return tuple(dict.fromkeys(found))


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device`, which need not be the current device, is being captured as a CUDA graph:
    what is called then is recorded, and does not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Limits(NamedTuple):
    """What launches are planned for: the smallest values among the GPUs here."""

    multiprocessors: int
    shared_bytes: int  # of shared memory that a block may have, opted in


@assume_constant_result
@functools.cache
def limits() -> Limits:
    """Of the GPUs here. Without a usable GPU they are an H100's: reasons against a call are collected there too."""
    if no_gpu():
        return Limits(132, 232_448)
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Limits(min(p.multi_processor_count for p in found), min(map(_shared_memory, found)))


def _shared_memory(device: Any) -> int:
    return device.shared_memory_per_block_optin  # which torch's types of a device lack
