# SPDX-License-Identifier: Apache-2.0
"""Which ``ptxas`` assembles the kernels for compute capability 9.0: not that of CUDA 12.8.

Triton 3.6 and 3.7, which PyTorch 2.10 to 2.12 bring, assemble for 9.0 with the ptxas of CUDA 12.8 (12.8.93). Of the
attention kernel for heads of 48, stage 4 of MobileViT-S, that makes machine code in which the address of an operand of
``wgmma`` is computed from a uniform register that nothing writes. What it holds is what the kernel before left there:
the product reads the wrong part of shared memory, or past its end, which is an illegal memory access. From the same PTX
the ptxas of CUDA 12.9, 13.0, 13.1, 13.3 and 13.5 take the right register. (``tests/gates/machine_code.py`` looks for
registers that are read and never written; this kernel was the only one of 185.)

Both versions of Triton bring a newer ptxas as well (12.9 and 13.1), for Blackwell. So kernels for 9.0 are assembled
with that one. The setting is Triton's, and is changed while one of our kernels is compiled, not for others.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

ARCHITECTURE = 90
SOUND_FROM = (12, 9)
# Triton's cache of compiled kernels does not know that another ptxas was used, but it knows the options. This one only
# asks for a warning, and marks what was assembled here.
_MARK = "--warn-on-spills"
_lock = threading.Lock()


@functools.cache
def problem() -> str:
    """Why kernels for a GPU that is here cannot be assembled; "" if they can."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if (ARCHITECTURE // 10, ARCHITECTURE % 10) not in capabilities or _is_sound(_tool("ptxas")) or _replacement():
        return ""
    return (
        f"Triton's assembler, ptxas of CUDA {_tool('ptxas').version}, miscompiles attention for compute capability "
        "9.0; set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9 or later, or install a newer Triton"
    )


@contextlib.contextmanager
def sound(architecture: int) -> Iterator[dict[str, Any]]:
    """While the context lasts, Triton compiles with a ptxas that is right for the architecture.

    Example:
        >>> with sound(90) as options:
        ...     kernel[grid](*arguments, num_warps=4, **options)

    Args:
        architecture: 80, 86, 89, 90, 100 or 120.

    Yields:
        Options for the launch, which keep what is compiled here apart from what Triton compiled by itself.
    """
    replacement = _replacement() if architecture == ARCHITECTURE and not _is_sound(_tool("ptxas")) else None
    if replacement is None:
        yield {}
        return
    from triton import knobs

    with _lock, knobs.nvidia.scope():
        chosen = knobs.nvidia.ptxas_options
        knobs.nvidia.ptxas = replacement.path
        yield {"ptx_options": f"{chosen} {_MARK}" if chosen else _MARK}


def _tool(name: str) -> Any:
    """Triton's description of an assembler, with a path and a version such as "12.8"; None if Triton has none."""
    from triton import knobs

    return getattr(knobs.nvidia, name, None)


def _is_sound(tool: Any) -> bool:
    return tool is not None and tuple(map(int, tool.version.split("."))) >= SOUND_FROM


def _replacement() -> Any:
    tool = _tool("ptxas_blackwell")
    return tool if _is_sound(tool) else None
