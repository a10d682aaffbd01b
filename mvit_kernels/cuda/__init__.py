# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's answers: what ``csrc/cuda`` can serve, call by call (see `mvit_kernels.backends`).

Its kernels are for 16-bit floats on tensor cores, with tiles that fit the widths and head dims of the published models.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .._gpu import no_gpu
from .._library import load, loaded_paths
from ..backends import Call
from .operators import DTYPES, dtype_reasons, patch_attention, row_wise
from .plans import is_compiled, one_launch_pays, plan_transformer

DEVICE_TYPE = "cuda"
HEADS = 4
MAX_SEQUENCES = 2**31 - 1


def unavailable(device_type: str) -> list[str]:
    """Why the kernels cannot serve this device at all."""
    if device_type != DEVICE_TYPE:
        return [f"it is for NVIDIA GPUs, and the tensors are on {device_type}"]
    why = no_gpu() or _load()
    return [why] if why else []


@functools.cache
def _load() -> str:
    """Load the library and register what calls it; "" or why it can not be used."""
    why = load("cuda")
    if why:
        return why
    for operator in ("transformer",):  # those with a part in Python
        importlib.import_module(f"{__name__}.{operator}")
    function = ctypes.CDLL(str(loaded_paths["cuda"])).mvit_kernels_cuda_problem
    function.restype = ctypes.c_char_p
    problem = function().decode()
    return f"its library's CUDA runtime cannot be used here: {problem}" if problem else ""


@torch.compiler.assume_constant_result
@functools.cache
def device() -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have: the least of the GPUs here. Without one, an
    H100's, for the questions that are asked all the same."""
    if no_gpu():
        return 132, 232_448
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return min(p.multi_processor_count for p in found), min(p.shared_memory_per_block_optin for p in found)


def _transformer(call: Call) -> list[str]:
    reasons = dtype_reasons(call)
    if not call.fact("same_widths"):
        reasons.append("its layers have different widths")
    if call.fact("num_heads") != HEADS:
        reasons.append(f"{call.fact('num_heads')} heads are not supported; {HEADS} are")
    if call.fact("hidden_features") == 0:
        reasons.append("hidden_features is 0")
    images, height, width, d = call.shape
    ph, pw = call.fact("patch_size")
    if images * ph * pw > MAX_SEQUENCES:
        reasons.append(f"{images * ph * pw} sequences are more than {MAX_SEQUENCES}")
    # Of one sequence: whether there is a plan depends on no number of images, and a trace is not to either.
    plan = plan_transformer(d, call.fact("head_dim"), height // ph * (width // pw), 1, *device())
    return [*reasons, plan] if isinstance(plan, str) else reasons


def in_one_launch(call: Call) -> bool:
    """Whether a stack that both serve is faster in one launch than by one operator after another."""
    images, height, width, _ = call.shape
    ph, pw = call.fact("patch_size")
    return one_launch_pays(height // ph * (width // pw), images * ph * pw, device()[0])


def pack(layers: Sequence, final_norm: tuple[Tensor, Tensor] | None, num_heads: int, dtype: torch.dtype) -> None:
    """Pack a stack's weights before the first call does; nothing where no call will be served."""
    width, inner = layers[0].proj_weight.shape
    served = dtype in DTYPES and num_heads == HEADS and is_compiled(width, inner // num_heads)
    if served and not unavailable(layers[0].proj_weight.device.type):
        from ..ops.transformer import flatten
        from .transformer import packed_weights

        packed_weights(flatten(layers, zeros=False), final_norm, num_heads, dtype)


SUPPORTS = {
    "patch_attention": patch_attention,
    **row_wise(lambda: device()),
    "transformer": _transformer,
}
