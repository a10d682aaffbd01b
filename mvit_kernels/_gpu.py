# SPDX-License-Identifier: Apache-2.0
"""What the two GPU backends ask of the devices, without touching one."""

from __future__ import annotations

import torch

CAPABILITY = (8, 0)  # bfloat16 tensor cores and asynchronous copies


def no_gpu() -> str:
    """Why no NVIDIA GPU can be used, or that one of them is too old; "" if all can."""
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
