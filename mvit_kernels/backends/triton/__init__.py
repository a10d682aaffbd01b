# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: kernels, their launches and their tile tables (see `mvit_kernels.backends.contract`).

The kernels run on NVIDIA GPUs, and in Triton's interpreter on CPU tensors, so that they can be tested without a GPU.
Triton itself is imported when `TritonBackend.unavailable` is first asked about a device that it could serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

from .. import gpu
from ..contract import Backend
from . import assembler, target
from .operators import SUPPORTS


class TritonBackend(Backend):
    """Triton on NVIDIA GPUs of compute capability 8.0 and up, or its interpreter."""

    name = "triton"
    device_type = target.DEVICE_TYPE
    dtypes = target.DTYPES
    supports = SUPPORTS

    def unavailable(self, device_type: str) -> list[str]:
        if device_type != self.device_type:
            where = "Triton's interpreter serves CPU tensors" if target.INTERPRETED else "it is for NVIDIA GPUs"
            return [f"{where}, and the tensors are on {device_type}"]
        if target.INTERPRETED:
            why = _load()
        else:
            why = gpu.no_gpu() or _load() or assembler.problem()
        return [why] if why else []


@functools.cache
def _load() -> str:
    """Import the kernels, which registers them; return "", or why they cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (torch's CUDA builds bring it; `pip install triton` does)"
    try:
        for operator in SUPPORTS:
            importlib.import_module(f"{__name__}.{operator}")
    except (ImportError, AttributeError) as error:  # Triton is too old for what the kernels use
        return f"Triton does not import: {error}"
    return ""


BACKEND = TritonBackend()
