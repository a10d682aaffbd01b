# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: the Python part of ``csrc/cuda`` (see `mvit_kernels.backends.contract`).

Its kernels take 16-bit floats, use tensor cores, and have tiles that fit the widths and head dims of the published
models.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import gpu
from ..contract import Backend, Call, StackPlan
from ..library import flatten, load, loaded_paths
from ..preference import one_launch_pays
from .operators import DTYPES, HEADS, SUPPORTS
from .plans import HALF_FILTERS, INVERTED_RESIDUALS, is_compiled


class CudaBackend(Backend):
    """CUDA C++ on NVIDIA GPUs of compute capability 8.0 and up."""

    name = "cuda"
    device_type = "cuda"
    dtypes = DTYPES
    supports = SUPPORTS
    packs_weights = True

    def unavailable(self, device_type: str) -> list[str]:
        if device_type != self.device_type:
            return [f"it is for NVIDIA GPUs, and the tensors are on {device_type}"]
        why = gpu.no_gpu() or _load()
        return [why] if why else []

    def plan_stack(self, stack: Call, attention: Call, dropout: bool, alone: bool) -> StackPlan | None:
        whole = not dropout and not self.reasons_against(stack)
        if whole and _one_launch_pays(stack, alone):
            return StackPlan.WHOLE
        if not self.reasons_against(attention):
            # Inference runs single operators, each on the backend that has it fastest. In training, a fused layer of
            # another backend keeps fewer activations.
            return StackPlan.LAYERS if stack.needs_grad else StackPlan.OPERATORS
        return StackPlan.WHOLE if whole else None

    def pack(self, layers, final_norm, num_heads, dtype) -> None:
        width, inner = layers[0].proj_weight.shape
        served = dtype in DTYPES and num_heads == HEADS and is_compiled(width, inner // num_heads)
        if served and not self.unavailable(layers[0].proj_weight.device.type):
            from .transformer import packed_weights  # registers the operator, so the library must be loaded

            packed_weights(flatten(layers, zeros=False), final_norm, num_heads, dtype)

    def packed_inverted_residual(
        self, weights: Sequence[Tensor], dtype: torch.dtype, stride: int, dilation: int, half_filter: bool = False
    ) -> Tensor | None:
        """An inverted residual's weights in its kernel's order; None if there is no kernel for them here.

        Args:
            weights: the six of `mvit_kernels.inverted_residual`.
            dtype: of the maps.
            stride, dilation: of the depthwise convolution.
            half_filter: for the kernel that filters in float16, which only shapes with `has_half_filter` have.
        """
        known = (weights[0].shape[1], weights[4].shape[0], stride) in INVERTED_RESIDUALS and dilation == 1
        if dtype not in DTYPES or not known or self.unavailable(weights[0].device.type):
            return None
        from .inverted_residual_packing import pack_inverted_residual

        return pack_inverted_residual(*weights, dtype=dtype, half_filter=half_filter)


def has_half_filter(expand_weight: Tensor, project_weight: Tensor, stride: int) -> bool:
    """Whether inverted residuals of this shape have a kernel that filters in float16."""
    return (expand_weight.shape[1], project_weight.shape[0], stride) in HALF_FILTERS


def _one_launch_pays(stack: Call, alone: bool) -> bool:
    """Whether a stack is faster in one launch than operator by operator."""
    images, height, width, _ = stack.shape
    ph, pw = stack.fact("patch_size")
    tokens, sequences = height // ph * (width // pw), images * ph * pw
    return one_launch_pays(tokens, sequences, gpu.limits().multiprocessors, alone=alone)


@functools.cache
def _load() -> str:
    """Load the library and register the operators that call it; return "", or why it cannot be used."""
    why = load("cuda")
    if why:
        return why
    for operator in ("transformer", "inverted_residual"):  # those with a Python part
        importlib.import_module(f"{__name__}.{operator}")
    function = ctypes.CDLL(str(loaded_paths["cuda"])).mvit_kernels_cuda_problem
    function.restype = ctypes.c_char_p
    problem = function().decode()
    return f"its library's CUDA runtime cannot be used here: {problem}" if problem else ""


BACKEND = CudaBackend()
